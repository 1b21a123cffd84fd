// What the sweeps borrow from their host, and the number types they work in. Free of torch.
//
// T, float or double, is the type of all sums and epilogues; P that of the operands of the matrix
// products: T itself, or Bf16 with float.
#pragma once

#include <cstdint>
#include <functional>

#include "bf16.h"

namespace fino {

// Calls body(begin, end) over pieces of [0, n), on several threads.
using Parallel = void (*)(int64_t n, const std::function<void(int64_t, int64_t)>& body);

template <typename T, typename P = T>
struct Runtime {
  // c [m, n] = alpha · op(a) op(b) (+ c where `accumulate`); a is [m, k], or [k, m] where
  // transposed, and so on; ld* are the row lengths in memory.
  using Gemm = void (*)(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                        const P* a, int64_t lda, const P* b, int64_t ldb, bool accumulate, T* c,
                        int64_t ldc);
  Gemm gemm;
  Parallel parallel;
};

}  // namespace fino
