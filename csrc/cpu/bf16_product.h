// Products of bf16 matrices with sums in fp32, around a micro-kernel that the host brings.
#pragma once

#include <cstdint>

#include "bf16.h"
#include "runtime.h"

namespace fino {

// Columns of b that the micro-kernel takes at a time.
constexpr int64_t bf16_columns = 64;
// Most rows of a, and most entries of a sum, that it gets at a time.
constexpr int64_t bf16_rows = 64, bf16_depth = 1024;

// c [m, 64] = a·b, m ≤ bf16_rows; a is [m, depth] in rows of `lda`; b is
// [depth / 2, 64, 2], pairs of rows with their entries side by side; depth is even and ≤ bf16_depth.
using Bf16Kernel = void (*)(int64_t m, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b,
                            float* c);
// Bf16Kernel in plain C++: slow, and everywhere.
void plain_bf16_kernel(int64_t m, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b,
                       float* c);

// Called by every thread when it has no more tiles.
using Bf16Done = void (*)();

// Runtime::Gemm for Bf16. The same bits from any number of threads.
void bf16_product(Parallel parallel, Bf16Kernel kernel, Bf16Done done, bool transpose_a,
                  bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const Bf16* a,
                  int64_t lda, const Bf16* b, int64_t ldb, bool accumulate, float* c, int64_t ldc);

}  // namespace fino
