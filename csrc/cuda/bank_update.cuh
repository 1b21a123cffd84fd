// Update of a prototype bank from the rows of one view; fino_fast/heads.py has the formula.
//
// Only the rows of the classes in the batch are touched. Every class has one block, which takes
// its rows in a fixed order: the result is the same to the bit on every run.

#pragma once

#include <cassert>
#include <cmath>

#include "block.cuh"

namespace fino {

struct BankUpdate {
  SortedRows rows;       // label −1 is missing
  const float* teacher;  // [count, width]
  float* scratch;        // [count, width], sums of the unit rows of the group that begins there
  int64_t width, classes;
  float momentum;
  bool unit_norm;        // concentration="fixed": centroids are unit vectors, φ stays
  float* centroids;      // [K, width]
  float* temperatures;   // [K], φ
  int64_t* counts;       // [K]
};

constexpr float kNormEps = 1e-12f;  // x̂ = x / max(‖x‖, kNormEps)

// 1 / max(‖row‖, kNormEps).
__device__ inline float inverse_norm(const float* row, int64_t width) {
  float squares = 0;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) squares += row[d] * row[d];
  return 1.0f / fmaxf(sqrtf(block_sum(squares)), kNormEps);
}

// Grid: count blocks of kThreads.
__global__ void bank_update(BankUpdate a) {
  const int64_t first = blockIdx.x;
  const int64_t label = a.rows.labels[first];
  if (label < 0 || !a.rows.begins(first)) return;
  assert(label < a.classes);
  const int64_t end = a.rows.end(first);
  float* centroid = a.centroids + label * a.width;
  float* sums = a.scratch + first * a.width;
  const bool known = a.counts[label] > 0;
  const float old_scale = inverse_norm(centroid, a.width);
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads) sums[d] = 0;

  float size = 0, spread = 0;
  for (int64_t i = first; i < end; ++i) {
    const float* row = a.teacher + a.rows.order[i] * a.width;
    float faults = 0;
    for (int64_t d = threadIdx.x; d < a.width; d += kThreads) faults += isfinite(row[d]) ? 0 : 1;
    // One overflow must not destroy a bank for ever.
    if (block_sum(faults) > 0) continue;
    const float scale = inverse_norm(row, a.width);
    float distance = 0;
    for (int64_t d = threadIdx.x; d < a.width; d += kThreads) {
      const float unit = row[d] * scale, apart = unit - centroid[d] * old_scale;
      sums[d] += unit;
      distance += apart * apart;
    }
    spread += block_sum(distance);
    size += 1;
  }
  if (size == 0) return;

  const float m = known ? a.momentum : 0.0f;
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads)
    sums[d] = (known ? m * centroid[d] : 0.0f) + (1.0f - m) * (sums[d] / size);
  const float new_scale = a.unit_norm ? inverse_norm(sums, a.width) : 1.0f;
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads) centroid[d] = sums[d] * new_scale;
  if (threadIdx.x == 0) {
    if (!a.unit_norm && known && size >= 2)
      a.temperatures[label] = m * a.temperatures[label] + (1.0f - m) * sqrtf(spread / size);
    a.counts[label] += int64_t(size);
  }
}

}  // namespace fino
