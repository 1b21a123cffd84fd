// CUDA's execution model on the host, for tests: blocks one after another, the threads of a block as
// coroutines that change at barriers and warp shuffles.
//
// Between two barriers a thread runs alone, in ascending or descending order: where a barrier is
// missing, a thread sees what others have not yet written, or already overwritten, every time.
// Threads that wait at different barriers end the test.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(threads)

using std::isfinite;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

inline Index threadIdx, blockIdx, gridDim;
inline bool descending = false;  // order of the threads

using __half = _Float16;

struct __nv_bfloat16 {
  uint16_t bits;
  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = std::isnan(value) ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

namespace host {

enum class State { running, at_warp_barrier, at_block_barrier, done };

struct Thread {
  ucontext_t context;
  State state;
  std::unique_ptr<char[]> stack;
};

constexpr unsigned warp = 32, most_threads = 1024;
constexpr size_t stack_bytes = 1 << 16;
inline Thread threads[most_threads];
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline double shuffled[most_threads];

inline void wait(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}

inline void enter() {
  body();
  threads[current].state = State::done;
}

// Lets the threads [first, end) go on if all that are not done wait in `state`.
inline bool release(unsigned first, unsigned end, State state) {
  bool any = false;
  for (unsigned t = first; t < end; ++t) {
    if (threads[t].state == State::done) continue;
    if (threads[t].state != state) return false;
    any = true;
  }
  for (unsigned t = first; t < end; ++t)
    if (threads[t].state == state) threads[t].state = State::running;
  return any;
}

inline bool go_on(unsigned count) {
  bool released = false;
  for (unsigned first = 0; first < count; first += warp)
    released |= release(first, first + warp, State::at_warp_barrier);
  return released || release(0, count, State::at_block_barrier);
}

inline void run_block(unsigned count) {
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(stack_bytes);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, stack_bytes};
    thread.context.uc_link = &scheduler;
    thread.state = State::running;
    makecontext(&thread.context, enter, 0);
  }
  do {
    for (unsigned i = 0; i < count; ++i) {
      current = descending ? count - 1 - i : i;
      if (threads[current].state != State::running) continue;
      threadIdx = {current};
      swapcontext(&scheduler, &threads[current].context);
    }
  } while (go_on(count));
  for (unsigned t = 0; t < count; ++t)
    if (threads[t].state != State::done) {
      std::fprintf(stderr, "thread %u waits at a barrier that others do not reach\n", t);
      std::abort();
    }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::State::at_block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  host::shuffled[threadIdx.x] = value;
  host::wait(host::State::at_warp_barrier);
  const T other = T(host::shuffled[threadIdx.x ^ unsigned(mask)]);
  host::wait(host::State::at_warp_barrier);
  return other;
}

template <typename Arguments>
int launch(void (*kernel)(Arguments), unsigned grid_x, unsigned grid_y, unsigned threads,
           const Arguments& arguments, void*) {
  host::body = [&] { kernel(arguments); };
  gridDim = {grid_x, grid_y};
  for (unsigned y = 0; y < grid_y; ++y)
    for (unsigned x = 0; x < grid_x; ++x) {
      blockIdx = {x, y};
      host::run_block(threads);
    }
  return 0;
}
