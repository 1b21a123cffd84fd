#include "bf16.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "../cpu/bf16_product.h"
#include "../cpu/capability.h"
#include "host.h"

namespace fino {
namespace {

// Less is done before a kernel is looked up, and loses less in fp32; fewer vectors are padded to 64.
constexpr int64_t fewest_multiplications = int64_t{1} << 22, fewest_vectors = 16;

#ifdef CPUBLAS_BRGEMM_BF16BF16F32
// oneDNN's micro-kernel, which it makes for every shape once a thread.
void micro_kernel(int64_t m, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b, float* c) {
  at::native::cpublas::brgemm(m, bf16_columns, depth, lda, bf16_columns, bf16_columns,
                              /*add_C=*/false, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

void release() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }

// Whether oneDNN has the kernel for this processor: it says so only when it is asked for one.
bool has_micro_kernel() {
  static const bool works = [] {
    const Bf16 one{0x3f80}, a[2] = {one, one};
    Bf16 b[2 * bf16_columns];
    std::fill(b, b + 2 * bf16_columns, one);
    float c[bf16_columns] = {};
    try {
      micro_kernel(1, 2, a, 2, b, c);
      release();
    } catch (const c10::Error&) {
      return false;
    }
    return c[0] == 2 && c[bf16_columns - 1] == 2;
  }();
  return works && at::globalContext().userEnabledMkldnn();
}
#else
constexpr Bf16Kernel micro_kernel = plain_bf16_kernel;
void release() {}
bool has_micro_kernel() { return false; }
#endif

}  // namespace

bool takes_bf16(int64_t n, int64_t k, int64_t d) {
  if (bf16_products() != Bf16Products::by_level) return bf16_products() == Bf16Products::always;
  return has_bf16_instructions() && k >= fewest_vectors && n * k * d >= fewest_multiplications &&
         has_micro_kernel();
}

void gemm_bf16(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
               const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, bool accumulate, float* c,
               int64_t ldc) {
  const bool own = !has_micro_kernel();
  bf16_product(parallel, own ? plain_bf16_kernel : micro_kernel, own ? [] {} : release, transpose_a,
               transpose_b, m, n, k, alpha, a, lda, b, ldb, accumulate, c, ldc);
}

}  // namespace fino
