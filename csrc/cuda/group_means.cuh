// S = ΠZ of the orthogonal term of a categorical factor: every row becomes the mean of its group.
//
// Π is symmetric, so the same kernel takes the gradient at S to the gradient at Z.

#pragma once

#include "block.cuh"

namespace fino {

constexpr int kColumns = 32;                    // columns of a block, one a lane
constexpr int kRowLanes = kThreads / kColumns;  // rows that a block reads at once

struct GroupMeans {
  SortedRows rows;  // label −1 is missing
  const float* z;   // [count, width]
  float* out;       // [count, width]; rows without label become 0
  int64_t width;
};

// Grid: (count, ⌈width / kColumns⌉) blocks of kThreads.
__global__ void group_means(GroupMeans a) {
  __shared__ float partial[kRowLanes][kColumns];
  const int64_t first = blockIdx.x;
  if (!a.rows.begins(first)) return;
  const int64_t end = a.rows.end(first);
  const int lane = threadIdx.x / kColumns, column_lane = threadIdx.x % kColumns;
  const int64_t column = int64_t(blockIdx.y) * kColumns + column_lane;
  const bool present = column < a.width;
  float sum = 0;
  if (present && a.rows.labels[first] >= 0)
    for (int64_t i = first + lane; i < end; i += kRowLanes)
      sum += a.z[a.rows.order[i] * a.width + column];
  partial[lane][column_lane] = sum;
  __syncthreads();
  float mean = 0;
  for (int row = 0; row < kRowLanes; ++row) mean += partial[row][column_lane];
  mean /= float(end - first);
  if (present)
    for (int64_t i = first + lane; i < end; i += kRowLanes)
      a.out[a.rows.order[i] * a.width + column] = mean;
}

}  // namespace fino
