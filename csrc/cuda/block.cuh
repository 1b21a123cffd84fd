// What the kernels of this folder share: sums over a block, and groups of sorted rows.
//
// The device code is free of torch and of the CUDA headers' types, so that a test can compile the
// same source for the host (tests/cuda/host_shim.h).

#pragma once

#include <cstdint>

namespace fino {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

// Sum of `value` over the kThreads threads of the block, the same in every thread, in a fixed order.
__device__ inline float block_sum(float value) {
  __shared__ float warps[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += warps[warp];
  __syncthreads();  // the next sum writes `warps` again
  return total;
}

// Rows sorted by label: sorted position i holds row order[i] with label labels[i], ascending.
struct SortedRows {
  const int64_t* order;
  const int64_t* labels;
  int64_t count;

  // Whether a group begins at sorted position i. One block serves each position and leaves at
  // once where none does: the host never learns, nor waits for, the number of groups.
  __device__ bool begins(int64_t i) const { return i == 0 || labels[i - 1] != labels[i]; }

  // One past the last position of the group that begins at `first`.
  __device__ int64_t end(int64_t first) const {
    int64_t low = first + 1, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (labels[middle] == labels[first])
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace fino
