// Update of prototype banks from the rows of all views; fino_fast/heads.py has the formula.
//
// One launch serves all banks. Only the rows of the classes in the batch are touched. Every class of
// a bank has one block, which takes the views one after another and the rows of each in a fixed
// order: the result is the same to the bit on every run.

#pragma once

#include <cassert>
#include <cmath>

#include "block.cuh"
#include "launch.h"

namespace fino {

struct BankUpdates {
  FinoBank banks[kFinoMaxBanks];
  const float* teacher;  // [views, count, width]
  int64_t views, count, width;
};

constexpr float kNormEps = 1e-12f;  // x̂ = x / max(‖x‖, kNormEps)

// 1 / max(‖row‖, kNormEps).
__device__ inline float inverse_norm(const float* row, int64_t width) {
  float squares = 0;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) squares += row[d] * row[d];
  return 1.0f / fmaxf(sqrtf(block_sum(squares)), kNormEps);
}

// Moves one centroid towards the rows of one view; returns how many there were.
__device__ inline int64_t move_centroid(const FinoBank& bank, const SortedRows& rows, int64_t first,
                                        int64_t end, const float* teacher, int64_t width,
                                        bool known) {
  const int64_t label = rows.labels[first];
  float* centroid = bank.centroids + label * width;
  float* sums = bank.scratch + first * width;
  const float old_scale = inverse_norm(centroid, width);
  for (int64_t d = threadIdx.x; d < width; d += kThreads) sums[d] = 0;

  float size = 0, spread = 0;
  for (int64_t i = first; i < end; ++i) {
    const float* row = teacher + rows.order[i] * width;
    float faults = 0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) faults += isfinite(row[d]) ? 0 : 1;
    // One overflow must not destroy a bank for ever.
    if (block_sum(faults) > 0) continue;
    const float scale = inverse_norm(row, width);
    float distance = 0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) {
      const float unit = row[d] * scale, apart = unit - centroid[d] * old_scale;
      sums[d] += unit;
      distance += apart * apart;
    }
    spread += block_sum(distance);
    size += 1;
  }
  if (size == 0) return 0;

  const float m = known ? bank.momentum : 0.0f;
  for (int64_t d = threadIdx.x; d < width; d += kThreads)
    sums[d] = (known ? m * centroid[d] : 0.0f) + (1.0f - m) * (sums[d] / size);
  const float new_scale = bank.unit_norm ? inverse_norm(sums, width) : 1.0f;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) centroid[d] = sums[d] * new_scale;
  if (threadIdx.x == 0 && !bank.unit_norm && known && size >= 2)
    bank.temperatures[label] = m * bank.temperatures[label] + (1.0f - m) * sqrtf(spread / size);
  return int64_t(size);
}

// Grid: (count, banks) blocks of kThreads.
__global__ void bank_update(BankUpdates a) {
  const FinoBank& bank = a.banks[blockIdx.y];
  const SortedRows rows{bank.order, bank.labels, a.count};
  const int64_t first = blockIdx.x, label = rows.labels[first];
  if (label < 0 || !rows.begins(first)) return;
  assert(label < bank.classes);
  const int64_t end = rows.end(first), before = bank.counts[label];
  int64_t seen = before;
  for (int64_t view = 0; view < a.views; ++view)
    seen += move_centroid(bank, rows, first, end, a.teacher + view * a.count * a.width, a.width,
                          seen > 0);
  __syncthreads();  // all threads have read the count
  if (threadIdx.x == 0) bank.counts[label] = seen;
}

}  // namespace fino
