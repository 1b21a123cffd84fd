// The gradient of the orthogonal terms of all factors at z, from those at U and M, which the sweep
// gives, and from the coefficients of overlap_shares.cuh.
//
// The rows of U sum to zero in every group and those of S over all, and so do all parts of the
// gradient: what the means send back to the rows is nothing, and each row stands for itself.

#pragma once

#include "block.cuh"
#include "launch.h"

namespace fino {

template <typename T>
struct OverlapGradient {
  FinoOverlapGradient overlaps[kFinoMaxFactors];
  int64_t overlap_count;
  const T* z;  // [count, width]
  T* out;      // [count, width]
  int64_t count, width;
  bool add;  // to what is in `out`
};

// Entry (row, column) of the gradient of one factor's term.
template <typename T>
__device__ double overlap_gradient_at(const FinoOverlapGradient& overlap, const T* z, int64_t row,
                                      int64_t column, int64_t width) {
  const double by_signal = *overlap.scale * overlap.coefficients[0],
               by_rest = *overlap.scale * overlap.coefficients[1];
  double gradient = 0, signal = 0;
  const auto add_signal = [&](int64_t group, double share) {
    const int64_t at = group * width + column;
    signal += share * overlap.means[at];
    gradient += share * by_signal * overlap.means[at];
    if (overlap.at_means != nullptr)
      gradient += share * overlap.at_means[at] / overlap.sizes[group];
  };
  if (overlap.basis == nullptr)
    add_signal(overlap.group[row], 1.0);
  else
    for (int64_t j = 0; j < overlap.groups; ++j)
      add_signal(j, overlap.basis[row * overlap.groups + j]);

  const int64_t at = row * width + column;
  gradient += by_rest * (double(float(z[at])) - overlap.mean[column] - signal);
  if (overlap.at_rest != nullptr)
    gradient += double(float(static_cast<const T*>(overlap.at_rest)[at]));
  return gradient;
}

// Grid: (⌈count · width / kThreads⌉) blocks of kThreads; a thread has one entry.
template <typename T>
__global__ void overlap_gradient(OverlapGradient<T> a) {
  const int64_t entry = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= a.count * a.width) return;
  const int64_t row = entry / a.width, column = entry % a.width;
  double sum = a.add ? double(float(a.out[entry])) : 0.0;
  for (int64_t f = 0; f < a.overlap_count; ++f)
    if (a.overlaps[f].group[row] >= 0)
      sum += overlap_gradient_at(a.overlaps[f], a.z, row, column, a.width);
  a.out[entry] = T(float(sum));
}

}  // namespace fino
