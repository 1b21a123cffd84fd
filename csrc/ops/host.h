// What the operators share: torch's products and threads for the torch-free kernels of csrc/cpu, and the
// step from tensors to their pointers.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "../cpu/rows.h"
#include "../cpu/runtime.h"
#include "../cpu/scratch.h"
#include "bf16.h"

// MKL's number of threads for the calling thread; returns the one before. Null without MKL.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace fino {

using at::Tensor;

template <typename T>
constexpr at::ScalarType scalar_type = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

// Torch's own matrix product on raw pointers.
template <typename T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
          int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto options = at::TensorOptions().dtype(scalar_type<T>);
  const auto matrix = [&](const T* data, bool transpose, int64_t rows, int64_t columns,
                          int64_t ld) {
    const int64_t strides[2] = {transpose ? 1 : ld, transpose ? ld : 1}, sizes[2] = {rows, columns};
    return at::from_blob(const_cast<T*>(data), sizes, strides, options);
  };
  Tensor out = matrix(c, false, m, n, ldc);
  const Tensor left = matrix(a, transpose_a, m, k, lda), right = matrix(b, transpose_b, k, n, ldb);
  if (accumulate || alpha != T(1))
    at::addmm_out(out, out, left, right, /*beta=*/accumulate ? 1 : 0, /*alpha=*/alpha);
  else
    at::mm_out(out, left, right);
}

inline void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, n, 1, body);
}

// While it lives the library uses one thread for the products of this thread.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// The same product with the same bits from any number of threads. The library chooses its blocking by
// the number of its threads; so the result is cut into strips by its size alone, each the work of one.
template <typename T>
void strip_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                const T* a, int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c,
                int64_t ldc) {
  const bool by_rows = m > n;
  const int64_t length = std::max(m, n), most = 32, shortest = 128;
  const int64_t strip = std::max((length + most - 1) / most, shortest);
  at::parallel_for(0, (length + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
    const OneThread one;
    for (int64_t first = begin * strip; first < std::min(end * strip, length); first += strip) {
      const int64_t count = std::min(strip, length - first);
      if (by_rows)
        gemm(transpose_a, transpose_b, count, n, k, alpha, a + first * (transpose_a ? 1 : lda), lda, b,
             ldb, accumulate, c + first * ldc, ldc);
      else
        gemm(transpose_a, transpose_b, m, count, k, alpha, a, lda,
             b + first * (transpose_b ? ldb : 1), ldb, accumulate, c + first, ldc);
    }
  });
}

// T is the type of the sums, P that of the products' operands (cpu/runtime.h).
template <typename T, typename P>
Runtime<T, P> runtime(bool deterministic) {
  if constexpr (std::is_same_v<P, Bf16>)
    return {gemm_bf16, parallel};
  else
    return {deterministic ? strip_gemm<T> : gemm<T>, parallel};
}

// Calls run(T, P) with the types that serve the products of these rows [N, D] with k vectors.
template <typename Run>
auto by_precision(const Tensor& rows, int64_t k, const Run& run) {
  if (rows.scalar_type() == at::kDouble) return run(double(), double());
  if (rows.scalar_type() == at::kBFloat16 && takes_bf16(rows.size(0), k, rows.size(1)))
    return run(float(), Bf16());
  return run(float(), float());
}

// In one order, whatever the number of threads.
template <typename T>
double total(const Tensor& values) {
  const T* data = values.data_ptr<T>();
  double sum = 0;
  for (int64_t i = 0; i < values.numel(); ++i) sum += data[i];
  return sum;
}

// All sums are in fp32, or in fp64 for fp64 input.
template <typename T>
Tensor dense(const Tensor& x) {
  return x.to(scalar_type<T>).contiguous();
}

// A matrix as operand of the products: where it is if it can be read there, else a copy in working memory.
template <typename P>
class Matrix {
 public:
  explicit Matrix(const Tensor& x) : tensor_(x) {
    constexpr auto type = std::is_same_v<P, Bf16> ? at::kBFloat16 : scalar_type<P>;
    if (x.scalar_type() == type && x.is_contiguous()) return;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    copy_ = scratch<P>(x.numel());
    tensor_ = at::from_blob(copy_.get(), x.sizes(), type);
    tensor_.copy_(x);
  }
  const P* data() const { return static_cast<const P*>(tensor_.const_data_ptr()); }
  const P* row(int64_t i) const { return data() + i * width(); }
  int64_t height() const { return tensor_.size(0); }
  int64_t width() const { return tensor_.size(1); }

 private:
  Scratch<P> copy_;
  Tensor tensor_;
};

template <typename T>
struct Unit {
  Tensor rows, norms;

  explicit Unit(const Tensor& x) : rows(at::empty_like(x)), norms(at::empty({x.size(0)}, x.options())) {
    normalize_rows<T>(parallel, x.data_ptr<T>(), x.size(0), x.size(1), rows.data_ptr<T>(),
                      norms.data_ptr<T>());
  }
};

// The rows of x as T, where they are if they can be read there. `left_out` [N] become zeros; undefined:
// none do.
template <typename T>
Rows<T> rows_of(const Tensor& x, const Tensor& left_out = {}) {
  if (!left_out.defined() && x.scalar_type() == scalar_type<T> && x.is_contiguous())
    return [x](int64_t first, int64_t, T*) { return x.const_data_ptr<T>() + first * x.size(1); };
  return [x, left_out](int64_t first, int64_t count, T* buffer) -> const T* {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor rows = at::from_blob(buffer, {count, x.size(1)}, scalar_type<T>);
    rows.copy_(x.narrow(0, first, count));
    if (left_out.defined()) rows.masked_fill_(left_out.narrow(0, first, count).unsqueeze(1), 0);
    return buffer;
  };
}

// The same with zeros for the rows without a label or an observed value: they may hold anything, and
// 0 · NaN in the products would let it in.
template <typename T>
Rows<T> labelled_rows(const Tensor& x, const Tensor& target, bool classes) {
  const Tensor unlabelled = classes ? target < 0 : target.isnan().view({x.size(0), -1}).all(1);
  return rows_of<T>(x, unlabelled.any().item<bool>() ? unlabelled : Tensor());
}

}  // namespace fino
