// Operators of the native backend: schemas, argument checks, and the step from tensors to the
// torch-free kernels of csrc/cpu. The only file of csrc that knows tensors.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/contrastive.h"
#include "cpu/heads.h"
#include "cpu/orthogonal.h"
#include "cpu/rows.h"
#include "cpu/views.h"
#include "cpu/wide_head.h"

// MKL's product of bf16 with sums in fp32, which PyTorch exports where it is built with MKL and has no
// operator for. Null elsewhere.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(
    int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
    const fino::Bf16* a, int lda, const fino::Bf16* b, int ldb, float beta, float* c, int ldc);

// MKL's number of threads for the calling thread; returns the one before. Null without MKL.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace fino {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

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

void gemm_bf16(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
               const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, bool accumulate, float* c,
               int64_t ldc) {
  constexpr int row_major = 101, plain = 111, transposed = 112;  // CBLAS's own numbers
  cblas_gemm_bf16bf16f32(row_major, transpose_a ? transposed : plain,
                         transpose_b ? transposed : plain, int(m), int(n), int(k), alpha, a, int(lda),
                         b, int(ldb), accumulate ? 1 : 0, c, int(ldc));
}

void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
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
template <typename T, typename P, typename Runtime<T, P>::Gemm product>
void strip_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                const P* a, int64_t lda, const P* b, int64_t ldb, bool accumulate, T* c,
                int64_t ldc) {
  const bool by_rows = m > n;
  const int64_t length = std::max(m, n), most = 32, shortest = 128;
  const int64_t strip = std::max((length + most - 1) / most, shortest);
  at::parallel_for(0, (length + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
    const OneThread one;
    for (int64_t first = begin * strip; first < std::min(end * strip, length); first += strip) {
      const int64_t count = std::min(strip, length - first);
      if (by_rows)
        product(transpose_a, transpose_b, count, n, k, alpha, a + first * (transpose_a ? 1 : lda), lda,
                b, ldb, accumulate, c + first * ldc, ldc);
      else
        product(transpose_a, transpose_b, m, count, k, alpha, a, lda,
                b + first * (transpose_b ? ldb : 1), ldb, accumulate, c + first, ldc);
    }
  });
}

// T is the type of the sums, P that of the products' operands (cpu/runtime.h).
template <typename T, typename P>
Runtime<T, P> runtime(bool deterministic) {
  if constexpr (std::is_same_v<P, Bf16>)
    return {deterministic ? strip_gemm<T, P, gemm_bf16> : gemm_bf16, parallel};
  else
    return {deterministic ? strip_gemm<T, P, gemm<T>> : gemm<T>, parallel};
}

// Calls run(T, P) with the types that serve rows of this dtype.
template <typename Run>
auto by_precision(at::ScalarType rows, const Run& run) {
  if (rows == at::kDouble) return run(double(), double());
  if (rows == at::kBFloat16 && multiplies_bf16() && cblas_gemm_bf16bf16f32 != nullptr)
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

// A contiguous matrix as operand of the products; a copy only where its dtype is another.
template <typename P>
class Matrix {
 public:
  explicit Matrix(const Tensor& x)
      : tensor_(x.to(std::is_same_v<P, Bf16> ? at::kBFloat16 : scalar_type<P>).contiguous()) {}
  const P* data() const { return static_cast<const P*>(tensor_.const_data_ptr()); }
  const P* row(int64_t i) const { return data() + i * width(); }
  int64_t height() const { return tensor_.size(0); }
  int64_t width() const { return tensor_.size(1); }

 private:
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

// ---------------------------------------------------------------------------- contrastive

struct Batch {
  int64_t views, local, images, first;  // images per rank, images of all ranks, first local image
  bool two_tower, deterministic;
};

Batch checked_batch(const Tensor& rows, const Tensor& columns, int64_t views, int64_t first,
                    bool two_tower, bool deterministic) {
  TORCH_CHECK(rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1),
              "fino: rows and columns must be [N, P] and [M, P], found ", rows.sizes(), " and ",
              columns.sizes());
  TORCH_CHECK(rows.scalar_type() == columns.scalar_type(), "fino: rows and columns differ in dtype");
  TORCH_CHECK(views >= 2 && rows.size(0) > 0 && rows.size(0) % views == 0 &&
                  columns.size(0) % views == 0,
              "fino: ", rows.size(0), " rows and ", columns.size(0), " columns are not ", views,
              " ≥ 2 views each");
  TORCH_CHECK(!two_tower || views == 2, "fino: two towers need 2 views, found ", views);
  const Batch batch{views, rows.size(0) / views, columns.size(0) / views, first, two_tower,
                    deterministic};
  TORCH_CHECK(first >= 0 && first + batch.local <= batch.images, "fino: images ", first, " to ",
              first + batch.local, " are not among the ", batch.images, " of the columns");
  return batch;
}

// Calls visit(first row, first column, columns, column that row 0 leaves out or −1) for every view
// of the local rows.
template <typename Visit>
void for_each_view(const Batch& batch, const Visit& visit) {
  for (int64_t view = 0; view < batch.views; ++view) {
    const int64_t row = view * batch.local;
    if (batch.two_tower)
      visit(row, (1 - view) * batch.images, batch.images, -1);
    else
      visit(row, 0, batch.views * batch.images, view * batch.images + batch.first);
  }
}

// Sum over the positives of every local row: the other views of its image. [N, P]
Tensor positives(const Tensor& rows, const Tensor& columns, const Batch& batch) {
  const int64_t width = rows.size(1);
  const Tensor sums = columns.view({batch.views, batch.images, width})
                          .narrow(1, batch.first, batch.local)
                          .sum(0, /*keepdim=*/true);
  return (sums - rows.view({batch.views, batch.local, width})).view({-1, width});
}

// Log-sum-exps [N] of unit rows that meet the unit columns.
template <typename T, typename P>
Tensor cross_logsumexps(const Matrix<P>& rows, const Matrix<P>& columns, double scale,
                        const Batch& batch, const Tensor& like) {
  const Runtime<T, P> host = runtime<T, P>(batch.deterministic);
  Tensor lse = at::empty_like(like);
  for_each_view(batch, [&](int64_t row, int64_t column, int64_t count, int64_t skip) {
    cross_logsumexp<T, P>(host, rows.row(row), batch.local, columns.row(column), count, rows.width(),
                          T(scale), skip, lse.data_ptr<T>() + row);
  });
  return lse;
}

// g [N, P] = Σ_j (softmax_ij + softmax_ji) x̂_j.
template <typename T, typename P>
void cross_gradients(const Matrix<P>& rows, const Matrix<P>& columns, double scale,
                     const Batch& batch, const Tensor& row_lse, const Tensor& column_lse, Tensor& g) {
  const Runtime<T, P> host = runtime<T, P>(batch.deterministic);
  for_each_view(batch, [&](int64_t row, int64_t column, int64_t count, int64_t skip) {
    cross_gradient<T, P>(host, rows.row(row), batch.local, columns.row(column), count, rows.width(),
                         T(scale), skip, row_lse.const_data_ptr<T>() + row,
                         column_lse.const_data_ptr<T>() + column,
                         g.data_ptr<T>() + row * rows.width());
  });
}

// The local rows' share of the loss.
template <typename T>
Tensor contrastive_loss(const Unit<T>& rows, const Tensor& positive, const Tensor& lse, double scale,
                        const Batch& batch) {
  const Tensor mean = (rows.rows * positive).sum(1) * (scale / (batch.views - 1));
  return at::scalar_tensor(total<T>(lse - mean) / double(batch.views * batch.images), lse.options());
}

// Σ_j (softmax_ij + softmax_ji) x̂_j becomes factor · ∂loss/∂rows, in place; returns
// factor · ∂loss/∂scale.
template <typename T>
Tensor finish_gradient(Tensor& g, const Unit<T>& rows, const Tensor& positive, double scale,
                       double factor, const Batch& batch) {
  g.sub_(positive, 2.0 / (batch.views - 1));  // the positives of both directions
  g.mul_(factor * scale / double(batch.views * batch.images));
  Tensor along = at::empty_like(rows.norms);
  normalize_rows_backward<T>(parallel, g.data_ptr<T>(), rows.rows.template data_ptr<T>(),
                             rows.norms.template data_ptr<T>(), g.size(0), g.size(1),
                             along.template data_ptr<T>());
  // ⟨g_i, x̂_i⟩ = scale · Σ_j (A_ij + A_ji) c_ij with A = ∂L/∂s; over all rows twice scale·∂L/∂scale.
  return at::scalar_tensor(total<T>(along) / (2 * scale), along.options());
}

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> contrastive_of(const Tensor& rows_in, double scale,
                                                  bool want_gradient, const Batch& batch) {
  const Unit<T> rows(dense<T>(rows_in));
  const Matrix<P> unit(rows.rows);
  Tensor lse = at::empty_like(rows.norms);
  Tensor g = want_gradient ? at::zeros_like(rows.rows) : at::empty({0}, rows.norms.options());
  if (scale <= max_bounded_scale) {
    // Every thread has products of its own: they are the same from any number.
    pair_terms<T, P>(runtime<T, P>(false), unit.data(), unit.height(), unit.width(), T(scale),
                     batch.two_tower, lse.data_ptr<T>(), want_gradient ? g.data_ptr<T>() : nullptr);
  } else {
    lse = cross_logsumexps<T, P>(unit, unit, scale, batch, rows.norms);
    if (want_gradient) cross_gradients<T, P>(unit, unit, scale, batch, lse, lse, g);
  }
  const Tensor positive = positives(rows.rows, rows.rows, batch);
  const Tensor loss = contrastive_loss(rows, positive, lse, scale, batch);
  if (!want_gradient) return {loss, g, at::empty({0}, lse.options())};
  const Tensor grad_scale = finish_gradient(g, rows, positive, scale, 1, batch);
  return {loss, g, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_forward(const Tensor& rows, const Tensor& logit_scale,
                                                       int64_t views, bool two_tower,
                                                       bool want_gradient, bool deterministic) {
  const Batch batch = checked_batch(rows, rows, views, 0, two_tower, deterministic);
  const double scale = logit_scale.item<double>();
  return by_precision(rows.scalar_type(), [&](auto t, auto p) {
    return contrastive_of<decltype(t), decltype(p)>(rows, scale, want_gradient, batch);
  });
}

template <typename T, typename P>
std::tuple<Tensor, Tensor> ranks_contrastive_forward_of(const Tensor& rows_in,
                                                        const Tensor& columns_in, double scale,
                                                        const Batch& batch) {
  const Unit<T> rows(dense<T>(rows_in)), columns(dense<T>(columns_in));
  const Matrix<P> left(rows.rows), right(columns.rows);
  const Tensor lse = cross_logsumexps<T, P>(left, right, scale, batch, rows.norms);
  const Tensor positive = positives(rows.rows, columns.rows, batch);
  return {contrastive_loss(rows, positive, lse, scale, batch), lse};
}

template <typename T, typename P>
std::tuple<Tensor, Tensor> ranks_contrastive_backward_of(double upstream, const Tensor& rows_in,
                                                         const Tensor& columns_in, double scale,
                                                         const Tensor& lse_rows,
                                                         const Tensor& lse_columns,
                                                         const Batch& batch) {
  const Unit<T> rows(dense<T>(rows_in)), columns(dense<T>(columns_in));
  const Matrix<P> left(rows.rows), right(columns.rows);
  Tensor g = at::empty_like(rows.rows);
  cross_gradients<T, P>(left, right, scale, batch, dense<T>(lse_rows), dense<T>(lse_columns), g);
  const Tensor positive = positives(rows.rows, columns.rows, batch);
  const Tensor grad_scale = finish_gradient(g, rows, positive, scale, upstream, batch);
  return {g.to(rows_in.scalar_type()), grad_scale};
}

std::tuple<Tensor, Tensor> ranks_contrastive_forward(const Tensor& rows, const Tensor& columns,
                                                     const Tensor& logit_scale, int64_t views,
                                                     int64_t first, bool two_tower,
                                                     bool deterministic) {
  const Batch batch = checked_batch(rows, columns, views, first, two_tower, deterministic);
  const double scale = logit_scale.item<double>();
  return by_precision(rows.scalar_type(), [&](auto t, auto p) {
    return ranks_contrastive_forward_of<decltype(t), decltype(p)>(rows, columns, scale, batch);
  });
}

std::tuple<Tensor, Tensor> ranks_contrastive_backward(
    const Tensor& grad, const Tensor& rows, const Tensor& columns, const Tensor& logit_scale,
    const Tensor& lse_rows, const Tensor& lse_columns, int64_t views, int64_t first, bool two_tower,
    bool deterministic) {
  const Batch batch = checked_batch(rows, columns, views, first, two_tower, deterministic);
  TORCH_CHECK(lse_rows.numel() == rows.size(0) && lse_columns.numel() == columns.size(0),
              "fino: lse_rows and lse_columns must be [N] and [M]");
  const double upstream = grad.item<double>(), scale = logit_scale.item<double>();
  auto [grad_rows, grad_scale] = by_precision(rows.scalar_type(), [&](auto t, auto p) {
    return ranks_contrastive_backward_of<decltype(t), decltype(p)>(
        upstream, rows, columns, scale, lse_rows, lse_columns, batch);
  });
  return {grad_rows, grad_scale.to(logit_scale.scalar_type())};
}

// ---------------------------------------------------------------------------------- heads

// What describes the heads of one step: one entry a head, but for the rows, one a group of heads whose
// weighted sum is wanted.
struct HeadLists {
  at::TensorList x, bank, offset, target, inv_count, counts, guidance;
  at::ArrayRef<double> weight, smoothing;
  at::IntArrayRef kind, group;
  bool deterministic;

  size_t size() const { return bank.size(); }
  const Tensor& rows(size_t f) const { return x[static_cast<size_t>(group[f])]; }
  HeadKind kind_of(size_t f) const { return static_cast<HeadKind>(kind[f]); }
  bool classifies(size_t f) const {
    return kind_of(f) == HeadKind::linear || kind_of(f) == HeadKind::prototype;
  }

  void check() const {
    const size_t n = size();
    TORCH_CHECK(n > 0, "fino: there are no heads");
    TORCH_CHECK(offset.size() == n && target.size() == n && inv_count.size() == n &&
                    counts.size() == n && guidance.size() == n && weight.size() == n &&
                    smoothing.size() == n && kind.size() == n && group.size() == n,
                "fino: the lists that describe the heads differ in length");
    for (size_t f = 0; f < n; ++f) check(f);
  }

 private:
  void check(size_t f) const {
    TORCH_CHECK(group[f] >= 0 && static_cast<size_t>(group[f]) < x.size(), "fino: head ", f,
                ": there is no group ", group[f]);
    TORCH_CHECK(kind[f] >= 0 && kind[f] <= static_cast<int64_t>(HeadKind::tanh),
                "fino: head ", f, " is of unknown kind ", kind[f]);
    TORCH_CHECK((rows(f).scalar_type() == at::kDouble) == (x[0].scalar_type() == at::kDouble),
                "fino: rows in fp64 and in another precision");
    TORCH_CHECK(rows(f).dim() == 2 && bank[f].dim() == 2 && rows(f).size(1) == bank[f].size(1),
                "fino: head ", f, ": x and bank must be [N, D] and [K, D], found ", rows(f).sizes(),
                " and ", bank[f].sizes());
    const int64_t n = rows(f).size(0), k = bank[f].size(0);
    TORCH_CHECK(offset[f].numel() == k, "fino: head ", f, ": offset must be [K=", k, "]");
    TORCH_CHECK(target[f].numel() == (classifies(f) ? n : n * k), "fino: head ", f,
                ": target must be [N] or [N, K], found ", target[f].sizes());
    TORCH_CHECK(!classifies(f) || target[f].scalar_type() == at::kLong, "fino: head ", f,
                ": target must be int64");
    TORCH_CHECK(!classifies(f) || n == 0 || target[f].max().item<int64_t>() < k, "fino: head ", f,
                ": a target is not below K=", k);
    TORCH_CHECK(kind_of(f) != HeadKind::prototype || counts[f].numel() == k, "fino: head ", f,
                ": counts must be [K=", k, "]");
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

struct HeadOutput {
  double loss, metric;
  Tensor grad_bank, grad_offset;
};

// `grad_x` [N, D] may be undefined: not wanted.
template <typename T, typename P>
HeadOutput head_of(const HeadLists& in, size_t f, const Tensor& grad_x, bool accumulate,
                   bool want_bank) {
  const auto options = at::TensorOptions().dtype(scalar_type<T>);
  const bool prototype = in.kind_of(f) == HeadKind::prototype, classes = in.classifies(f);
  want_bank = want_bank && !prototype;
  const Tensor& x = in.rows(f);
  const Matrix<P> bank(in.bank[f]);
  Tensor offset = dense<T>(in.offset[f]), scale, target = in.target[f].contiguous();
  if (prototype) {
    const Tensor unseen = in.counts[f] <= 0;
    const Tensor length = at::linalg_vector_norm(in.bank[f], 2, at::IntArrayRef{1}, false,
                                                 scalar_type<T>).clamp_min(normalize_eps);
    scale = (length * offset).reciprocal().masked_fill_(unseen, 0);
    offset = at::zeros_like(scale).masked_fill_(unseen, std::numeric_limits<T>::lowest());
  } else if (!classes) {
    target = dense<T>(target);
  }
  HeadOutput out;
  out.grad_bank = want_bank ? at::empty(in.bank[f].sizes(), options) : at::empty({0}, options);
  out.grad_offset = want_bank ? at::zeros_like(offset) : at::empty({0}, options);

  const T inv_count = in.inv_count[f].item<T>();
  Head<T, P> head{};
  head.kind = in.kind_of(f);
  head.rows = labelled_rows<T>(x, in.target[f], classes);
  head.bank = bank.data();
  head.scale = prototype ? scale.data_ptr<T>() : nullptr;
  head.offset = offset.data_ptr<T>();
  head.target = classes ? target.data_ptr<int64_t>() : nullptr;
  head.value = classes ? nullptr : target.data_ptr<T>();
  head.n = x.size(0);
  head.k = in.bank[f].size(0);
  head.d = x.size(1);
  head.smoothing = T(in.smoothing[f]);
  head.weight = T(in.weight[f]) * inv_count;
  head.guidance = in.guidance[f].item<T>();
  head.grad_x = grad_x.defined() ? grad_x.data_ptr<T>() : nullptr;
  head.accumulate = accumulate;
  head.grad_bank = want_bank ? out.grad_bank.data_ptr<T>() : nullptr;
  head.grad_offset = want_bank ? out.grad_offset.data_ptr<T>() : nullptr;
  const RowLoss<double> sum = head_sweep<T, P>(runtime<T, P>(in.deterministic), head);
  out.loss = sum.loss * inv_count;
  out.metric = sum.metric * inv_count;
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> heads_forward(
    at::TensorList x, at::TensorList bank, at::TensorList offset, at::TensorList target,
    at::TensorList inv_count, at::TensorList counts, at::TensorList guidance,
    at::ArrayRef<double> weight, at::IntArrayRef kind, at::ArrayRef<double> smoothing,
    at::IntArrayRef group, bool want_x, bool want_bank, bool deterministic) {
  const HeadLists in{x,        bank,   offset,    target, inv_count, counts,
                     guidance, weight, smoothing, kind,   group,     deterministic};
  in.check();
  const auto options = at::TensorOptions().dtype(x[0].scalar_type() == at::kDouble ? at::kDouble
                                                                                   : at::kFloat);
  // Not in the inputs' precision: the gradients are still to be multiplied by the upstream one, and a
  // loss scale that keeps fp16 from underflowing is part of that.
  Tensors grad_x, grad_bank, grad_offset;
  for (const Tensor& rows : x)
    grad_x.push_back(at::empty(want_x ? rows.sizes() : at::IntArrayRef{0}, options));
  std::vector<double> sums(x.size(), 0.0), losses, metrics;
  std::vector<bool> begun(x.size(), false);
  for (size_t f = 0; f < in.size(); ++f) {
    const auto g = static_cast<size_t>(group[f]);
    const HeadOutput out = by_precision(x[g].scalar_type(), [&](auto t, auto p) {
      return head_of<decltype(t), decltype(p)>(in, f, want_x ? grad_x[g] : Tensor(), begun[g],
                                               want_bank);
    });
    begun[g] = true;
    sums[g] += weight[f] * out.loss;
    losses.push_back(out.loss);
    metrics.push_back(out.metric);
    grad_bank.push_back(out.grad_bank);
    grad_offset.push_back(out.grad_offset);
  }
  for (size_t g = 0; g < x.size(); ++g)
    TORCH_CHECK(begun[g], "fino: group ", g, " has no head");
  return {at::tensor(sums, options), at::tensor(losses, options), at::tensor(metrics, options),
          grad_x, grad_bank, grad_offset};
}

// ------------------------------------------------------------------------------ wide head

// The linear head of a bank whose gradient is not held from the forward to the backward pass.
struct WideTensors {
  Tensor x, bank, offset, target;
  double smoothing;

  void check() const {
    const int64_t n = x.size(0), k = bank.size(0);
    TORCH_CHECK(x.dim() == 2 && bank.dim() == 2 && x.size(1) == bank.size(1),
                "fino: x and bank must be [N, D] and [K, D], found ", x.sizes(), " and ",
                bank.sizes());
    TORCH_CHECK(offset.numel() == k, "fino: offset must be [K=", k, "]");
    TORCH_CHECK(target.numel() == n && target.scalar_type() == at::kLong,
                "fino: target must be int64 [N=", n, "]");
    TORCH_CHECK(n == 0 || target.max().item<int64_t>() < k, "fino: a target is not below K=", k);
  }
};

template <typename T, typename P, typename Run>
auto with_wide_head(const WideTensors& in, const Run& run) {
  const Matrix<P> bank(in.bank);
  const Tensor offset = dense<T>(in.offset), target = in.target.contiguous();
  const WideHead<T, P> head{labelled_rows<T>(in.x, target, /*classes=*/true),
                            bank.data(),
                            offset.data_ptr<T>(),
                            target.data_ptr<int64_t>(),
                            in.x.size(0),
                            in.bank.size(0),
                            in.x.size(1),
                            T(in.smoothing)};
  return run(head);
}

std::tuple<Tensor, Tensor, Tensor> wide_head_forward(const Tensor& x, const Tensor& bank,
                                                     const Tensor& offset, const Tensor& target,
                                                     const Tensor& inv_count, double smoothing,
                                                     bool deterministic) {
  const WideTensors in{x, bank, offset, target, smoothing};
  in.check();
  return by_precision(x.scalar_type(), [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    return with_wide_head<T, P>(in, [&](const WideHead<T, P>& head) {
      Tensor lse = at::empty({head.n}, at::TensorOptions().dtype(scalar_type<T>));
      const RowLoss<double> sum = wide_head_loss(runtime<T, P>(deterministic), head, lse.data_ptr<T>());
      const double count = inv_count.item<T>();
      return std::tuple{at::scalar_tensor(sum.loss * count, lse.options()),
                        at::scalar_tensor(sum.metric * count, lse.options()), lse};
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> wide_head_backward(
    const Tensor& grad, const Tensor& x, const Tensor& bank, const Tensor& offset,
    const Tensor& target, const Tensor& inv_count, const Tensor& lse, double smoothing, bool want_x,
    bool want_bank, bool deterministic) {
  const WideTensors in{x, bank, offset, target, smoothing};
  in.check();
  TORCH_CHECK(lse.numel() == x.size(0), "fino: lse must be [N=", x.size(0), "]");
  return by_precision(x.scalar_type(), [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    return with_wide_head<T, P>(in, [&](const WideHead<T, P>& head) {
      const auto options = at::TensorOptions().dtype(scalar_type<T>);
      const auto gradient = [&](const Tensor& like, bool wanted) {
        return at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, options);
      };
      Tensor grad_x = gradient(x, want_x), grad_bank = gradient(bank, want_bank),
             grad_offset = gradient(offset, want_bank);
      const Tensor row_lse = dense<T>(lse);
      wide_head_gradient(runtime<T, P>(deterministic), head, row_lse.data_ptr<T>(),
                         grad.item<T>() * inv_count.item<T>(),
                         want_x ? grad_x.data_ptr<T>() : nullptr,
                         want_bank ? grad_bank.data_ptr<T>() : nullptr,
                         want_bank ? grad_offset.data_ptr<T>() : nullptr);
      return std::tuple{grad_x.to(x.scalar_type()), grad_bank.to(bank.scalar_type()),
                        grad_offset.to(offset.scalar_type())};
    });
  });
}

// ----------------------------------------------------------------------------- orthogonal

// A factor's projector; owns what the kernel points to.
template <typename T>
class Design {
 public:
  explicit Design(const Tensor& design) {
    if (design.dim() == 1) {
      Tensor labels;
      std::tie(labels, slots_, sizes_) =
          at::_unique2(design.clamp_min(-1), /*sorted=*/true, /*return_inverse=*/true,
                       /*return_counts=*/true);
      if (labels.numel() > 0 && labels[0].item<int64_t>() < 0) {  // the first slot: the missing
        slots_ = slots_ - 1;
        sizes_ = sizes_.slice(0, 1);
      }
      sizes_ = dense<T>(sizes_);
    } else {
      basis_ = dense<T>(design);
      sizes_ = at::ones({basis_.size(1)}, basis_.options());
    }
  }

  Projector<T> projector() const {
    return {slots_.defined() ? slots_.const_data_ptr<int64_t>() : nullptr,
            basis_.defined() ? basis_.const_data_ptr<T>() : nullptr, sizes_.const_data_ptr<T>(),
            sizes_.numel()};
  }

 private:
  Tensor slots_, basis_, sizes_;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> orthogonal_of(const Tensor& z, at::TensorList designs,
                                                 const c10::List<bool>& preserve,
                                                 at::ArrayRef<double> weight, double guidance,
                                                 bool deterministic) {
  const Runtime<T> host = runtime<T, T>(deterministic);
  const Rows<T> rows = rows_of<T>(z);
  Tensor grad = at::zeros(z.sizes(), at::TensorOptions().dtype(scalar_type<T>));
  std::vector<double> values;
  double sum = 0;
  for (size_t f = 0; f < designs.size(); ++f) {
    const Design<T> design(designs[f]);
    values.push_back(orthogonal<T>(host, rows, z.size(0), z.size(1), design.projector(),
                                   preserve[f] ? Overlap::shared : Overlap::explained,
                                   T(weight[f] * guidance), grad.data_ptr<T>()));
    sum += weight[f] * values.back();
  }
  return {at::scalar_tensor(sum, grad.options()), at::tensor(values, grad.options()), grad};
}

std::tuple<Tensor, Tensor, Tensor> orthogonal_forward(const Tensor& z, at::TensorList designs,
                                                      const c10::List<bool>& preserve,
                                                      at::ArrayRef<double> weight,
                                                      const Tensor& guidance, bool deterministic) {
  TORCH_CHECK(z.dim() == 2, "fino: z must be [N, D], found ", z.sizes());
  TORCH_CHECK(designs.size() > 0 && preserve.size() == designs.size() &&
                  weight.size() == designs.size(),
              "fino: the lists that describe the factors are empty or differ in length");
  for (const Tensor& design : designs)
    TORCH_CHECK(design.dim() >= 1 && design.size(0) == z.size(0) &&
                    (design.dim() == 1 ? design.scalar_type() == at::kLong
                                       : design.dim() == 2 && design.size(1) >= 1),
                "fino: the design must be int64 [N=", z.size(0), "] or float [N, d], found ",
                design.scalar_type(), " ", design.sizes());
  const double lambda = guidance.item<double>();
  return z.scalar_type() == at::kDouble
             ? orthogonal_of<double>(z, designs, preserve, weight, lambda, deterministic)
             : orthogonal_of<float>(z, designs, preserve, weight, lambda, deterministic);
}

// ---------------------------------------------------------------------------------- views

// Calls run(T) with the type of the pixels.
template <typename Run>
void by_pixel(const Tensor& image, const Run& run) {
  switch (image.scalar_type()) {
    case at::kByte: return run(uint8_t());
    case at::kUInt16: return run(uint16_t());
    case at::kFloat: return run(float());
    default:
      TORCH_CHECK(false, "fino: pixels must be uint8, uint16 or float32, found ",
                  image.scalar_type());
  }
}

void cut_views(at::TensorList images, const Tensor& boxes, const Tensor& mirror_x,
               const Tensor& mirror_y, const Tensor& shift, const Tensor& divisor, const Tensor& out) {
  TORCH_CHECK(out.dim() == 5 && out.scalar_type() == at::kFloat && out.size(3) == out.size(4) &&
                  (out.numel() == 0 || out[0][0].is_contiguous()),
              "fino: out must be float32 [V, B, C, S, S] of contiguous views, found ", out.sizes());
  const int64_t views = out.size(0), n = out.size(1), planes = out.size(2), size = out.size(3);
  const auto is = [&](const Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
    return x.scalar_type() == type && x.sizes() == sizes && x.is_contiguous();
  };
  TORCH_CHECK(static_cast<int64_t>(images.size()) == n, "fino: ", images.size(), " images for ", n);
  TORCH_CHECK(is(boxes, at::kLong, {views, n, 4}), "fino: boxes must be contiguous int64 [V, B, 4]");
  TORCH_CHECK(is(mirror_x, at::kBool, {views, n}) && is(mirror_y, at::kBool, {views, n}),
              "fino: mirror_x and mirror_y must be contiguous bool [V, B]");
  TORCH_CHECK(is(shift, at::kFloat, {views, n, planes}) && is(divisor, at::kFloat, {views, n, planes}),
              "fino: shift and divisor must be contiguous float32 [V, B, C]");
  const auto box_of = [&](int64_t v, int64_t i) {
    const int64_t* edges = boxes.const_data_ptr<int64_t>() + (v * n + i) * 4;
    return Box{edges[0], edges[1], edges[2], edges[3]};
  };
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& image = images[i];
    TORCH_CHECK(image.dim() == 3 && image.is_contiguous() &&
                    (image.size(2) == planes || image.size(2) == 1),
                "fino: image ", i, " must be contiguous [H, W, ", planes, " or 1], found ",
                image.sizes());
    by_pixel(image, [](auto) {});
    for (int64_t v = 0; v < views; ++v) {
      const Box box = box_of(v, i);
      TORCH_CHECK(0 <= box.left && box.left < box.right && box.right <= image.size(1) &&
                      0 <= box.top && box.top < box.bottom && box.bottom <= image.size(0),
                  "fino: box ", box.left, ", ", box.top, ", ", box.right, ", ", box.bottom,
                  " is empty or leaves image ", i, " of ", image.sizes());
    }
  }
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      by_pixel(images[i], [&](auto pixel) {
        using Pixel = decltype(pixel);
        const Picture<Pixel> picture{images[i].const_data_ptr<Pixel>(), images[i].size(1),
                                     images[i].size(2)};
        for (int64_t v = 0; v < views; ++v) {
          const int64_t place = v * n + i;
          cut_view(picture, box_of(v, i), mirror_x.const_data_ptr<bool>()[place],
                   mirror_y.const_data_ptr<bool>()[place], size, planes,
                   shift.const_data_ptr<float>() + place * planes,
                   divisor.const_data_ptr<float>() + place * planes,
                   out.data_ptr<float>() + v * out.stride(0) + i * out.stride(1));
        }
      });
  });
}

}  // namespace

TORCH_LIBRARY(fino, m) {
  m.def(
      "contrastive_forward(Tensor rows, Tensor logit_scale, int views, bool two_tower, "
      "bool want_gradient, bool deterministic=False) "
      "-> (Tensor loss, Tensor grad_rows, Tensor grad_logit_scale)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "ranks_contrastive_forward(Tensor rows, Tensor columns, Tensor logit_scale, int views, "
      "int first, bool two_tower, bool deterministic=False) -> (Tensor loss, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "ranks_contrastive_backward(Tensor grad, Tensor rows, Tensor columns, Tensor logit_scale, "
      "Tensor lse_rows, Tensor lse_columns, int views, int first, bool two_tower, "
      "bool deterministic=False) -> (Tensor grad_rows, Tensor grad_logit_scale)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "heads_forward(Tensor[] x, Tensor[] bank, Tensor[] offset, Tensor[] target, "
      "Tensor[] inv_count, Tensor[] counts, Tensor[] guidance, float[] weight, int[] kind, "
      "float[] smoothing, int[] group, bool want_x, bool want_bank, bool deterministic=False) "
      "-> (Tensor sums, "
      "Tensor losses, Tensor metrics, Tensor[] grad_x, Tensor[] grad_bank, Tensor[] grad_offset)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "wide_head_forward(Tensor x, Tensor bank, Tensor offset, Tensor target, Tensor inv_count, "
      "float smoothing, bool deterministic=False) -> (Tensor loss, Tensor metric, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "wide_head_backward(Tensor grad, Tensor x, Tensor bank, Tensor offset, Tensor target, "
      "Tensor inv_count, Tensor lse, float smoothing, bool want_x, bool want_bank, "
      "bool deterministic=False) -> (Tensor grad_x, Tensor grad_bank, Tensor grad_offset)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "orthogonal_forward(Tensor z, Tensor[] designs, bool[] preserve, float[] weight, "
      "Tensor guidance, bool deterministic=False) -> (Tensor sum, Tensor values, Tensor grad_z)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "cut_views(Tensor[] images, Tensor boxes, Tensor mirror_x, Tensor mirror_y, Tensor shift, "
      "Tensor divisor, Tensor(a!) out) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("contrastive_forward", contrastive_forward);
  m.impl("ranks_contrastive_forward", ranks_contrastive_forward);
  m.impl("ranks_contrastive_backward", ranks_contrastive_backward);
  m.impl("heads_forward", heads_forward);
  m.impl("wide_head_forward", wide_head_forward);
  m.impl("wide_head_backward", wide_head_backward);
  m.impl("orthogonal_forward", orthogonal_forward);
  m.impl("cut_views", cut_views);
}

}  // namespace fino
