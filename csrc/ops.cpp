// Operators of the native backend: schemas, argument checks, and the step from tensors to the
// torch-free kernels of csrc/cpu. The only file of csrc that knows tensors.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "cpu/orthogonal.h"
#include "cpu/sweep.h"

namespace fino {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

template <typename T>
constexpr at::ScalarType scalar_type = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

// Torch's own matrix product on raw pointers.
template <typename T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
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
  if (accumulate)
    at::addmm_out(out, out, left, right);
  else
    at::mm_out(out, left, right);
}

template <typename T>
const Runtime<T> runtime = {
    gemm<T>,
    [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
      at::parallel_for(0, n, 1, body);
    },
};

// In one order, whatever the number of threads.
template <typename T>
double total(const Tensor& values) {
  const T* data = values.data_ptr<T>();
  double sum = 0;
  for (int64_t i = 0; i < values.numel(); ++i) sum += data[i];
  return sum;
}

// All sums are in fp32, or in fp64 for fp64 input; products of half precision are taken in fp32.
template <typename T>
Tensor dense(const Tensor& x) {
  return x.to(scalar_type<T>).contiguous();
}

template <typename T>
struct Unit {
  Tensor rows, norms;

  explicit Unit(const Tensor& x) : rows(at::empty_like(x)), norms(at::empty({x.size(0)}, x.options())) {
    normalize_rows<T>(runtime<T>, x.data_ptr<T>(), x.size(0), x.size(1), rows.data_ptr<T>(),
                      norms.data_ptr<T>());
  }
};

// ---------------------------------------------------------------------------- contrastive

struct Batch {
  int64_t views, local, images, first;  // images per rank, images of all ranks, first local image
  bool two_tower;
};

Batch checked_batch(const Tensor& rows, const Tensor& columns, int64_t views, int64_t first,
                    bool two_tower) {
  TORCH_CHECK(rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1),
              "fino: rows and columns must be [N, P] and [M, P], found ", rows.sizes(), " and ",
              columns.sizes());
  TORCH_CHECK(rows.scalar_type() == columns.scalar_type(), "fino: rows and columns differ in dtype");
  TORCH_CHECK(views >= 2 && rows.size(0) > 0 && rows.size(0) % views == 0 &&
                  columns.size(0) % views == 0,
              "fino: ", rows.size(0), " rows and ", columns.size(0), " columns are not ", views,
              " ≥ 2 views each");
  TORCH_CHECK(!two_tower || views == 2, "fino: two towers need 2 views, found ", views);
  const Batch batch{views, rows.size(0) / views, columns.size(0) / views, first, two_tower};
  TORCH_CHECK(first >= 0 && first + batch.local <= batch.images, "fino: images ", first, " to ",
              first + batch.local, " are not among the ", batch.images, " of the columns");
  return batch;
}

// Whether every pair can be visited once: rows and columns are the same batch, and the logits are
// bounded tightly enough to do without a running maximum.
bool symmetric(const Batch& batch, double scale) {
  return batch.local == batch.images && scale <= max_bounded_scale;
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

template <typename T>
std::tuple<Tensor, Tensor> contrastive_forward_of(const Tensor& rows_in, const Tensor& columns_in,
                                                  double scale, const Batch& batch) {
  const bool whole = batch.local == batch.images;
  const Unit<T> rows(dense<T>(rows_in));
  const Tensor columns = whole ? rows.rows : Unit<T>(dense<T>(columns_in)).rows;
  const int64_t n = rows_in.size(0), d = rows_in.size(1);
  const T *x = rows.rows.template data_ptr<T>(), *y = columns.template data_ptr<T>();
  Tensor lse = at::empty({n}, rows.norms.options());
  T* out = lse.data_ptr<T>();
  if (symmetric(batch, scale)) {
    pair_logsumexp<T>(runtime<T>, x, n, d, T(scale), batch.two_tower, out);
  } else {
    for_each_view(batch, [&](int64_t row, int64_t column, int64_t count, int64_t skip) {
      cross_logsumexp<T>(runtime<T>, x + row * d, batch.local, y + column * d, count, d, T(scale),
                         skip, out + row);
    });
  }
  const Tensor positive =
      (rows.rows * positives(rows.rows, columns, batch)).sum(1) * (scale / (batch.views - 1));
  const double loss = total<T>(lse - positive) / double(columns_in.size(0));
  return {at::scalar_tensor(loss, lse.options()), lse};
}

template <typename T>
std::tuple<Tensor, Tensor> contrastive_backward_of(double upstream, const Tensor& rows_in,
                                                   const Tensor& columns_in, double scale,
                                                   const Tensor& lse_rows,
                                                   const Tensor& lse_columns, const Batch& batch) {
  const bool whole = batch.local == batch.images;
  const Unit<T> rows(dense<T>(rows_in));
  const Tensor columns = whole ? rows.rows : Unit<T>(dense<T>(columns_in)).rows;
  const int64_t n = rows_in.size(0), d = rows_in.size(1);
  const T *x = rows.rows.template data_ptr<T>(), *y = columns.template data_ptr<T>();
  const Tensor row_lse = dense<T>(lse_rows), column_lse = dense<T>(lse_columns);
  // Σ_j (softmax_ij + softmax_ji) x̂_j, less the positives of both directions.
  Tensor g = at::zeros_like(rows.rows);
  if (symmetric(batch, scale)) {
    pair_gradient<T>(runtime<T>, x, n, d, T(scale), batch.two_tower, row_lse.data_ptr<T>(),
                     g.data_ptr<T>());
  } else {
    for_each_view(batch, [&](int64_t row, int64_t column, int64_t count, int64_t skip) {
      cross_gradient<T>(runtime<T>, x + row * d, batch.local, y + column * d, count, d, T(scale),
                        skip, row_lse.data_ptr<T>() + row, column_lse.data_ptr<T>() + column,
                        g.data_ptr<T>() + row * d);
    });
  }
  g.sub_(positives(rows.rows, columns, batch), 2.0 / (batch.views - 1));
  g.mul_(upstream * scale / columns_in.size(0));
  Tensor along = at::empty_like(rows.norms);
  normalize_rows_backward<T>(runtime<T>, g.data_ptr<T>(), x, rows.norms.template data_ptr<T>(), n,
                             d, along.data_ptr<T>());
  // ⟨g_i, x̂_i⟩ = scale · Σ_j (A_ij + A_ji) c_ij with A = ∂L/∂s; over all rows twice scale·∂L/∂scale.
  const double grad_scale = total<T>(along) / (2 * scale);
  return {g.to(rows_in.scalar_type()), at::scalar_tensor(grad_scale, along.options())};
}

std::tuple<Tensor, Tensor> contrastive_forward(const Tensor& rows, const Tensor& columns,
                                               const Tensor& logit_scale, int64_t views,
                                               int64_t first, bool two_tower) {
  const Batch batch = checked_batch(rows, columns, views, first, two_tower);
  const double scale = logit_scale.item<double>();
  return rows.scalar_type() == at::kDouble
             ? contrastive_forward_of<double>(rows, columns, scale, batch)
             : contrastive_forward_of<float>(rows, columns, scale, batch);
}

std::tuple<Tensor, Tensor> contrastive_backward(const Tensor& grad, const Tensor& rows,
                                                const Tensor& columns, const Tensor& logit_scale,
                                                const Tensor& lse_rows, const Tensor& lse_columns,
                                                int64_t views, int64_t first, bool two_tower) {
  const Batch batch = checked_batch(rows, columns, views, first, two_tower);
  TORCH_CHECK(lse_rows.numel() == rows.size(0) && lse_columns.numel() == columns.size(0),
              "fino: lse_rows and lse_columns must be [N] and [M]");
  const double upstream = grad.item<double>(), scale = logit_scale.item<double>();
  const auto backward = rows.scalar_type() == at::kDouble ? contrastive_backward_of<double>
                                                          : contrastive_backward_of<float>;
  auto [grad_rows, grad_scale] =
      backward(upstream, rows, columns, scale, lse_rows, lse_columns, batch);
  return {grad_rows, grad_scale.to(logit_scale.scalar_type())};
}

// ---------------------------------------------------------------------------------- heads

struct HeadTensors {
  Tensor x, bank, offset, target, inv_count, counts;
  HeadKind kind;
  double smoothing;
};

HeadTensors checked_head(at::TensorList x, at::TensorList bank, at::TensorList offset,
                         at::TensorList target, at::TensorList inv_count, at::TensorList counts,
                         at::IntArrayRef kind, at::ArrayRef<double> smoothing, size_t f) {
  TORCH_CHECK(bank.size() == x.size() && offset.size() == x.size() && target.size() == x.size() &&
                  inv_count.size() == x.size() && counts.size() == x.size() &&
                  kind.size() == x.size() && smoothing.size() == x.size(),
              "fino: the lists that describe the heads differ in length");
  TORCH_CHECK(kind[f] >= 0 && kind[f] <= static_cast<int64_t>(HeadKind::tanh),
              "fino: head ", f, " is of unknown kind ", kind[f]);
  const HeadTensors head{x[f],         bank[f],   offset[f], target[f],
                         inv_count[f], counts[f], static_cast<HeadKind>(kind[f]), smoothing[f]};
  const int64_t n = head.x.size(0), k = head.bank.size(0);
  TORCH_CHECK(head.x.dim() == 2 && head.bank.dim() == 2 && head.x.size(1) == head.bank.size(1),
              "fino: head ", f, ": x and bank must be [N, D] and [K, D], found ", head.x.sizes(),
              " and ", head.bank.sizes());
  TORCH_CHECK(head.offset.numel() == k, "fino: head ", f, ": offset must be [K=", k, "]");
  const bool classes = head.kind == HeadKind::linear || head.kind == HeadKind::prototype;
  TORCH_CHECK(head.target.numel() == (classes ? n : n * k), "fino: head ", f,
              ": target must be [N] or [N, K], found ", head.target.sizes());
  TORCH_CHECK(!classes || head.target.scalar_type() == at::kLong, "fino: head ", f,
              ": target must be int64");
  TORCH_CHECK(!classes || n == 0 || head.target.max().item<int64_t>() < k, "fino: head ", f,
              ": a target is not below K=", k);
  TORCH_CHECK(head.kind != HeadKind::prototype || head.counts.numel() == k, "fino: head ", f,
              ": counts must be [K=", k, "]");
  return head;
}

struct HeadOutput {
  double loss, metric;
  Tensor grad_x, grad_bank, grad_offset;
};

// The rows with a label or an observed value, and zeros: a row that takes no part may hold anything,
// and 0 · NaN in the products would let it in. Copies only where there is such a row.
Tensor without_unlabelled(const Tensor& x, const Tensor& target, bool classes) {
  const Tensor unlabelled = classes ? target < 0 : target.isnan().view({x.size(0), -1}).all(1);
  return unlabelled.any().item<bool>() ? x.masked_fill(unlabelled.unsqueeze(1), 0) : x;
}

template <typename T>
HeadOutput head_of(const HeadTensors& in, bool want_x, bool want_bank) {
  const auto options = at::TensorOptions().dtype(scalar_type<T>);
  const bool prototype = in.kind == HeadKind::prototype;
  want_bank = want_bank && !prototype;
  const bool classes = prototype || in.kind == HeadKind::linear;
  Tensor x = without_unlabelled(dense<T>(in.x), in.target, classes), norms;
  const Tensor bank = dense<T>(in.bank);
  Tensor offset = dense<T>(in.offset), scale, target = in.target.contiguous();
  if (prototype) {
    const Unit<T> unit(x);
    x = unit.rows;
    norms = unit.norms;
    const Tensor unseen = in.counts <= 0;
    const Tensor length = at::linalg_vector_norm(bank, 2, at::IntArrayRef{1}).clamp_min(1e-12);
    scale = (length * offset).reciprocal().masked_fill_(unseen, 0);
    offset = at::zeros_like(scale).masked_fill_(unseen, std::numeric_limits<T>::lowest());
  } else if (!classes) {
    target = dense<T>(target);
  }
  HeadOutput out;
  out.grad_x = want_x ? at::empty_like(x) : at::empty({0}, options);
  out.grad_bank = want_bank ? at::zeros_like(bank) : at::empty({0}, options);
  out.grad_offset = want_bank ? at::zeros_like(offset) : at::empty({0}, options);

  Head<T> head{};
  head.kind = in.kind;
  head.x = x.data_ptr<T>();
  head.bank = bank.data_ptr<T>();
  head.scale = prototype ? scale.data_ptr<T>() : nullptr;
  head.offset = offset.data_ptr<T>();
  head.target = classes ? target.data_ptr<int64_t>() : nullptr;
  head.value = classes ? nullptr : target.data_ptr<T>();
  head.n = x.size(0);
  head.k = bank.size(0);
  head.d = x.size(1);
  head.smoothing = T(in.smoothing);
  head.weight = in.inv_count.item<T>();
  head.grad_x = want_x ? out.grad_x.data_ptr<T>() : nullptr;
  head.grad_bank = want_bank ? out.grad_bank.data_ptr<T>() : nullptr;
  head.grad_offset = want_bank ? out.grad_offset.data_ptr<T>() : nullptr;
  const RowLoss<double> sum = head_sweep<T>(runtime<T>, head);
  out.loss = sum.loss * head.weight;
  out.metric = sum.metric * head.weight;
  if (want_x && prototype) {
    Tensor along = at::empty_like(norms);
    normalize_rows_backward<T>(runtime<T>, head.grad_x, head.x, norms.data_ptr<T>(), head.n,
                               head.d, along.data_ptr<T>());
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors> heads_forward(
    at::TensorList x, at::TensorList bank, at::TensorList offset, at::TensorList target,
    at::TensorList inv_count, at::TensorList counts, at::IntArrayRef kind,
    at::ArrayRef<double> smoothing, bool want_x, bool want_bank) {
  TORCH_CHECK(!x.empty(), "fino: there are no heads");
  const bool wide = x[0].scalar_type() == at::kDouble;
  Tensors grad_x, grad_bank, grad_offset;
  const auto options = at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat);
  const auto size = static_cast<int64_t>(x.size());
  Tensor losses = at::empty({size}, options), metrics = at::empty({size}, options);
  for (size_t f = 0; f < x.size(); ++f) {
    const HeadTensors in =
        checked_head(x, bank, offset, target, inv_count, counts, kind, smoothing, f);
    HeadOutput out = wide ? head_of<double>(in, want_x, want_bank)
                          : head_of<float>(in, want_x, want_bank);
    losses[static_cast<int64_t>(f)] = out.loss;
    metrics[static_cast<int64_t>(f)] = out.metric;
    // Not in the inputs' precision: they are still to be multiplied by the upstream gradient, and
    // a loss scale that keeps fp16 from underflowing is part of that.
    grad_x.push_back(out.grad_x);
    grad_bank.push_back(out.grad_bank);
    grad_offset.push_back(out.grad_offset);
  }
  return {losses, metrics, grad_x, grad_bank, grad_offset};
}

// ----------------------------------------------------------------------------- orthogonal

template <typename T>
std::tuple<Tensor, Tensor> orthogonal_of(const Tensor& z_in, const Tensor& design, bool preserve) {
  const Tensor z = dense<T>(z_in);
  Projector<T> projector{};
  Tensor slots, sizes, basis;
  if (design.dim() == 1) {
    Tensor labels;
    std::tie(labels, slots, sizes) =
        at::_unique2(design.clamp_min(-1), /*sorted=*/true, /*return_inverse=*/true,
                     /*return_counts=*/true);
    if (labels.numel() > 0 && labels[0].item<int64_t>() < 0) {  // the first slot: the missing
      slots = slots - 1;
      sizes = sizes.slice(0, 1);
    }
    sizes = dense<T>(sizes);
    projector.slot = slots.data_ptr<int64_t>();
  } else {
    basis = dense<T>(design);
    sizes = at::ones({basis.size(1)}, basis.options());
    projector.basis = basis.data_ptr<T>();
  }
  projector.size = sizes.data_ptr<T>();
  projector.k = sizes.numel();
  Tensor grad = at::empty_like(z);
  const double value =
      orthogonal<T>(runtime<T>, z.data_ptr<T>(), z.size(0), z.size(1), projector,
                    preserve ? Overlap::shared : Overlap::explained, grad.data_ptr<T>());
  return {at::scalar_tensor(value, z.options()), grad};
}

std::tuple<Tensor, Tensor> orthogonal_forward(const Tensor& z, const Tensor& design,
                                              bool preserve) {
  TORCH_CHECK(z.dim() == 2, "fino: z must be [N, D], found ", z.sizes());
  TORCH_CHECK(design.dim() >= 1 && design.size(0) == z.size(0) &&
                  (design.dim() == 1 ? design.scalar_type() == at::kLong
                                     : design.dim() == 2 && design.size(1) >= 1),
              "fino: the design must be int64 [N=", z.size(0), "] or float [N, d], found ",
              design.scalar_type(), " ", design.sizes());
  return z.scalar_type() == at::kDouble ? orthogonal_of<double>(z, design, preserve)
                                        : orthogonal_of<float>(z, design, preserve);
}

}  // namespace

TORCH_LIBRARY(fino, m) {
  m.def(
      "contrastive_forward(Tensor rows, Tensor columns, Tensor logit_scale, int views, int first, "
      "bool two_tower) -> (Tensor loss, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "contrastive_backward(Tensor grad, Tensor rows, Tensor columns, Tensor logit_scale, "
      "Tensor lse_rows, Tensor lse_columns, int views, int first, bool two_tower) "
      "-> (Tensor grad_rows, Tensor grad_logit_scale)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "heads_forward(Tensor[] x, Tensor[] bank, Tensor[] offset, Tensor[] target, "
      "Tensor[] inv_count, Tensor[] counts, int[] kind, float[] smoothing, bool want_x, "
      "bool want_bank) -> (Tensor losses, Tensor metrics, Tensor[] grad_x, Tensor[] grad_bank, "
      "Tensor[] grad_offset)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "orthogonal_forward(Tensor z, Tensor design, bool preserve) -> (Tensor value, Tensor grad_z)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("contrastive_forward", contrastive_forward);
  m.impl("contrastive_backward", contrastive_backward);
  m.impl("heads_forward", heads_forward);
  m.impl("orthogonal_forward", orthogonal_forward);
}

}  // namespace fino
