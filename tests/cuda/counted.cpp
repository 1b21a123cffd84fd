// The launchers on the host, as in host_launch.cpp, with a count of what the threads load and store.
//
// Built with -fsanitize=thread, but without its runtime: the compiler calls the functions below at
// every access to memory, of which those to watched ranges count. What it keeps in registers, as a
// GPU's would, it does not load again.

#include <cstddef>
#include <cstdint>

namespace counted {

struct Range {
  uintptr_t begin, end;
  int64_t read, written;
};

constexpr int most = 64;
inline Range ranges[most];
inline int used = 0;

__attribute__((no_sanitize("thread"))) inline void access(const void* at, int64_t bytes,
                                                          bool write) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (int r = 0; r < used; ++r)
    if (address >= ranges[r].begin && address < ranges[r].end)
      (write ? ranges[r].written : ranges[r].read) += bytes;
}

}  // namespace counted

extern "C" {
#define FINO_COUNTED(bytes)                                                             \
  __attribute__((no_sanitize("thread"))) void __tsan_read##bytes(void* at) {            \
    counted::access(at, bytes, false);                                                  \
  }                                                                                     \
  __attribute__((no_sanitize("thread"))) void __tsan_write##bytes(void* at) {           \
    counted::access(at, bytes, true);                                                   \
  }
FINO_COUNTED(1)
FINO_COUNTED(2)
FINO_COUNTED(4)
FINO_COUNTED(8)
FINO_COUNTED(16)
#undef FINO_COUNTED
__attribute__((no_sanitize("thread"))) void __tsan_read_range(void* at, size_t bytes) {
  counted::access(at, int64_t(bytes), false);
}
__attribute__((no_sanitize("thread"))) void __tsan_write_range(void* at, size_t bytes) {
  counted::access(at, int64_t(bytes), true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Counts from now on what is loaded from, and stored to, [begin, begin + bytes); its number.
__attribute__((no_sanitize("thread"))) int host_watch(const void* begin, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  counted::ranges[counted::used] = {address, address + uintptr_t(bytes), 0, 0};
  return counted::used++;
}

__attribute__((no_sanitize("thread"))) int64_t host_read(int range) {
  return counted::ranges[range].read;
}

__attribute__((no_sanitize("thread"))) int64_t host_written(int range) {
  return counted::ranges[range].written;
}

__attribute__((no_sanitize("thread"))) void host_forget() { counted::used = 0; }
}

#include "host_launch.cpp"
