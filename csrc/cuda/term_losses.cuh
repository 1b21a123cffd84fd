// The losses and metrics of heads and contrastive term, of the sums that the sweep leaves.
//
// Every row has, for each part of the bank that a program swept, the log-sum-exp of its logits, the
// largest of them and its class, the logit of its target (of a contrastive term the mean over the
// positives) and the sum of all; or a squared error. With labels smoothed by ε its loss is
//
//   log Σ_k exp(s_k) − (1 − ε) s_target − ε/K Σ_k s_k

#pragma once

#include "block.cuh"
#include "launch.h"

namespace fino {

constexpr int kTermThreads = 1024;

struct TermLosses {
  FinoTerm terms[kFinoMaxTerms];
  int64_t plane, count;
};

// log(exp(a) + exp(b)); NaN where one is.
inline __device__ float log_add(float a, float b) {
  const bool less = a < b;
  const float high = less ? b : a, low = less ? a : b;
  return high + log1pf(expf(low - high));
}

// Grid: (terms) blocks of kTermThreads. A thread has every kTermThreads-th row.
__global__ void __launch_bounds__(kTermThreads) term_losses(TermLosses a) {
  const FinoTerm& term = a.terms[blockIdx.x];
  const float* const partial = term.sums;
  const float* const peaks = partial + a.plane;
  const float* const at_target = peaks + a.plane;
  const float* const all_logits = at_target + a.plane;
  const double smoothing = term.smoothing, spread = smoothing / double(term.classes);
  double loss = 0, metric = 0;
  for (int64_t row = threadIdx.x; row < a.count; row += kTermThreads) {
    const int64_t end = row + term.splits * a.count;
    float lse = partial[row];
    double target = at_target[row];
    for (int64_t at = row + a.count; at < end; at += a.count) {
      lse = log_add(lse, partial[at]);
      target += at_target[at];
    }
    term.lse[row] = lse;
    if (term.is_error) {
      loss += target;
      continue;
    }
    const bool labelled = term.labels != nullptr;
    const int64_t label = labelled ? term.labels[row] : 0;
    if (label < 0) continue;  // the row may hold anything
    double row_loss = lse - (1 - smoothing) * target;
    if (smoothing > 0) {
      double all = 0;
      for (int64_t at = row; at < end; at += a.count) all += all_logits[at];
      row_loss -= spread * all;
    }
    loss += row_loss;
    if (!labelled) continue;
    float peak = peaks[row];
    int64_t best = row;  // the first of equal ones, as within a part
    for (int64_t at = row + a.count; at < end; at += a.count) {
      const float other = peaks[at];
      if (other > peak) {
        peak = other;
        best = at;
      }
    }
    metric += term.best[best] == label;
  }
  loss = block_sum<kTermThreads>(loss);
  metric = block_sum<kTermThreads>(metric);
  if (threadIdx.x != 0) return;
  const double mean = *term.inv_count;
  *term.loss = float(loss * mean);
  *term.metric = float((term.is_error ? loss : metric) * mean);
  *term.weighted = float(term.weight * loss * mean);
}

}  // namespace fino
