// What the kernels of this folder share: sums over a block, and groups of sorted rows.
//
// The device code is free of torch and of the CUDA headers' types, so that a test can compile the
// same source for the host (tests/cuda/host_shim.h).

#pragma once

#include <cstdint>

namespace fino {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

// Sum of `value` over the threads of the warp, the same in every thread, in a fixed order.
template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum of `value` over the kBlock threads of the block, the same in every thread, in a fixed order.
template <int kBlock = kThreads, typename T>
__device__ T block_sum(T value) {
  __shared__ T warps[kBlock / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < kBlock / kWarp; ++warp) total += warps[warp];
  __syncthreads();  // the next sum writes `warps` again
  return total;
}

// Rows sorted by label: sorted position i holds row order[i] with label labels[i], ascending.
struct SortedRows {
  const int64_t* order;
  const int64_t* labels;
  int64_t count;

  // Whether a group begins at sorted position i. The host never learns, nor waits for, the number
  // of groups.
  __device__ bool begins(int64_t i) const { return i == 0 || labels[i - 1] != labels[i]; }

  // One past the last position of the group that begins at `first`.
  __device__ int64_t end(int64_t first) const {
    const int64_t label = labels[first];
    return partition(first + 1, [&](int64_t other) { return other == label; });
  }

  // The first position whose label is not −1, which is missing.
  __device__ int64_t first_valid() const {
    return partition(0, [](int64_t label) { return label < 0; });
  }

 private:
  // The first position from `low` on whose label does not belong to the labels before it.
  template <typename Belongs>
  __device__ int64_t partition(int64_t low, Belongs belongs) const {
    int64_t high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (belongs(labels[middle]))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace fino
