// Numbers of the sums' type T as operands of a product in P: themselves, or narrowed into memory of
// their own.
#pragma once

#include "epilogues.h"
#include "scratch.h"

namespace fino {

template <typename T, typename P>
class Operand {
 public:
  explicit Operand(int64_t count) : memory_(scratch<P>(count)) {}

  // Entries [first, first + count) of x.
  void fill(const T* x, int64_t first, int64_t count) {
    epilogues<T>().narrow(x + first, memory_.get() + first, count);
  }
  const P* get(const T*) const { return memory_.get(); }

 private:
  Scratch<P> memory_;
};

template <typename T>
class Operand<T, T> {
 public:
  explicit Operand(int64_t) {}
  void fill(const T*, int64_t, int64_t) {}
  const T* get(const T* x) const { return x; }
};

}  // namespace fino
