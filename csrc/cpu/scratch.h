// Working memory of the sweeps: uninitialised, aligned, and backed by huge pages where it is large.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fino {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], Free>;

// `count` uninitialised numbers. The allocator hands large blocks back to the system at once, so that
// every call would pay a page fault for each 4 KB; a huge page is one fault for 2 MB.
template <typename T>
Scratch<T> scratch(int64_t count) {
  constexpr size_t line = 64, huge = size_t{2} << 20;
  const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 1;
  const size_t alignment = bytes >= 2 * huge ? huge : line;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == huge) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  return Scratch<T>(static_cast<T*>(memory));
}

}  // namespace fino
