// Matrix products of bf16 with sums in fp32, for which torch has no operator on a CPU.
#pragma once

#include <cstdint>

#include "../cpu/bf16.h"

namespace fino {

// Whether bf16 rows [n, d] are multiplied with k vectors as they are: where the processor has
// instructions for it and they pay, or where choose_bf16_products says so.
bool takes_bf16(int64_t n, int64_t k, int64_t d);

// Runtime<float, Bf16>::Gemm. The same bits from any number of threads.
void gemm_bf16(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
               const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, bool accumulate, float* c,
               int64_t ldc);

}  // namespace fino
