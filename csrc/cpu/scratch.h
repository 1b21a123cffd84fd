// Working memory of the sweeps: uninitialised, aligned, and used again by the next call where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fino {

// Most that is kept between calls: a block of products each for the contrastive sweep and a trained head,
// and what is narrowed or widened beside them.
constexpr size_t most_kept_bytes = size_t{96} << 20;

// At least `bytes` of memory, which `bytes` is raised to. Large blocks come from those that earlier calls
// gave back; throws std::bad_alloc.
void* take_scratch(size_t& bytes);

// Keeps the block for a later call, or hands it to the system where enough is kept already.
void give_back_scratch(void* memory, size_t bytes);

// Hands all kept blocks to the system; returns their bytes.
size_t release_scratch();

struct GiveBack {
  size_t bytes = 0;
  void operator()(void* memory) const { give_back_scratch(memory, bytes); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], GiveBack>;

// `count` uninitialised numbers.
template <typename T>
Scratch<T> scratch(int64_t count) {
  size_t bytes = static_cast<size_t>(count) * sizeof(T) + 1;
  void* memory = take_scratch(bytes);
  return Scratch<T>(static_cast<T*>(memory), GiveBack{bytes});
}

}  // namespace fino
