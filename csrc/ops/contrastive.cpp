// The contrastive term, of one process and of all ranks.

#include <torch/library.h>

#include <tuple>

#include "../cpu/contrastive.h"
#include "../cpu/rows.h"
#include "host.h"

namespace fino {
namespace {

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

struct Share {
  Tensor loss, grad_scale;
};

// The local rows' share of the loss, and factor · its gradients: g, Σ_j (softmax_ij + softmax_ji) x̂_j on
// entry, becomes that of the rows. An empty g: no gradient is wanted.
template <typename T>
Share finish(const Unit<T>& rows, const Tensor& lse, double scale, double factor, const Batch& batch,
             Tensor& g) {
  const bool want_gradient = g.numel() > 0;
  const double pairs = double(batch.views * batch.images);
  const Positives positive = positives<T>(
      parallel, rows.rows.template const_data_ptr<T>(), rows.norms.template const_data_ptr<T>(),
      batch.views, batch.local, rows.rows.size(1), factor * scale / pairs,
      want_gradient ? g.data_ptr<T>() : nullptr);
  const double loss = total<T>(lse) - scale / (batch.views - 1) * positive.cosines;
  // ⟨g_i, x̂_i⟩ = scale · Σ_j (A_ij + A_ji) c_ij with A = ∂L/∂s; over all rows twice scale·∂L/∂scale.
  return {at::scalar_tensor(loss / pairs, lse.options()),
          want_gradient ? at::scalar_tensor(positive.along / (2 * scale), lse.options())
                        : at::empty({0}, lse.options())};
}

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> contrastive_of(const Tensor& rows_in, double scale,
                                                  bool want_gradient, const Batch& batch) {
  const Unit<T> rows(dense<T>(rows_in));
  const Matrix<P> unit(rows.rows);
  Tensor lse = at::empty_like(rows.norms);
  Tensor g = want_gradient ? at::empty_like(rows.rows) : at::empty({0}, rows.norms.options());
  if (scale <= max_bounded_scale) {
    // Every thread has products of its own: they are the same from any number.
    pair_terms<T, P>(runtime<T, P>(false), unit.data(), unit.height(), unit.width(), T(scale),
                     batch.two_tower, lse.data_ptr<T>(), want_gradient ? g.data_ptr<T>() : nullptr);
  } else {
    lse = cross_logsumexps<T, P>(unit, unit, scale, batch, rows.norms);
    if (want_gradient) cross_gradients<T, P>(unit, unit, scale, batch, lse, lse, g);
  }
  const Share share = finish(rows, lse, scale, 1, batch, g);
  return {share.loss, g, share.grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_forward(const Tensor& rows, const Tensor& logit_scale,
                                                       int64_t views, bool two_tower,
                                                       bool want_gradient, bool deterministic) {
  const Batch batch = checked_batch(rows, rows, views, 0, two_tower, deterministic);
  const double scale = logit_scale.item<double>();
  return by_precision(rows, rows.size(0), [&](auto t, auto p) {
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
  Tensor no_gradient = at::empty({0}, lse.options());
  return {finish(rows, lse, scale, 1, batch, no_gradient).loss, lse};
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
  const Tensor lse = dense<T>(lse_rows);
  cross_gradients<T, P>(left, right, scale, batch, lse, dense<T>(lse_columns), g);
  const Tensor grad_scale = finish(rows, lse, scale, upstream, batch, g).grad_scale;
  return {g.to(rows_in.scalar_type()), grad_scale};
}

std::tuple<Tensor, Tensor> ranks_contrastive_forward(const Tensor& rows, const Tensor& columns,
                                                     const Tensor& logit_scale, int64_t views,
                                                     int64_t first, bool two_tower,
                                                     bool deterministic) {
  const Batch batch = checked_batch(rows, columns, views, first, two_tower, deterministic);
  const double scale = logit_scale.item<double>();
  return by_precision(rows, columns.size(0), [&](auto t, auto p) {
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
  auto [grad_rows, grad_scale] = by_precision(rows, columns.size(0), [&](auto t, auto p) {
    return ranks_contrastive_backward_of<decltype(t), decltype(p)>(
        upstream, rows, columns, scale, lse_rows, lse_columns, batch);
  });
  return {grad_rows, grad_scale.to(logit_scale.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fino, m) {
  m.def(
      "contrastive_forward(Tensor rows, Tensor logit_scale, int views, bool two_tower, "
      "bool want_gradient, bool deterministic) "
      "-> (Tensor loss, Tensor grad_rows, Tensor grad_logit_scale)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "ranks_contrastive_forward(Tensor rows, Tensor columns, Tensor logit_scale, int views, "
      "int first, bool two_tower, bool deterministic) -> (Tensor loss, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "ranks_contrastive_backward(Tensor grad, Tensor rows, Tensor columns, Tensor logit_scale, "
      "Tensor lse_rows, Tensor lse_columns, int views, int first, bool two_tower, "
      "bool deterministic) -> (Tensor grad_rows, Tensor grad_logit_scale)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("contrastive_forward", contrastive_forward);
  m.impl("ranks_contrastive_forward", ranks_contrastive_forward);
  m.impl("ranks_contrastive_backward", ranks_contrastive_backward);
}

}  // namespace fino
