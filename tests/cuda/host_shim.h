// CUDA's execution model on the host, for tests: blocks one after another, the threads of a block
// as threads, barriers and warp shuffles included.

#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

inline thread_local Index threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline float shuffled[1024];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  shuffled[threadIdx.x] = value;
  __syncthreads();
  const float other = shuffled[threadIdx.x ^ unsigned(mask)];
  __syncthreads();
  return other;
}

template <typename Kernel, typename Arguments>
void launch(unsigned grid_x, unsigned grid_y, unsigned threads, Kernel kernel, Arguments arguments) {
  for (unsigned y = 0; y < grid_y; ++y)
    for (unsigned x = 0; x < grid_x; ++x) {
      block_barrier = std::make_unique<std::barrier<>>(threads);
      std::vector<std::jthread> block;
      for (unsigned t = 0; t < threads; ++t)
        block.emplace_back([=] {
          threadIdx = {t}, blockIdx = {x, y};
          kernel(arguments);
        });
    }
}
