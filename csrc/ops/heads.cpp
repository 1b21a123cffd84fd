// The heads of a step, with all gradients.

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../cpu/heads.h"
#include "host.h"

namespace fino {
namespace {

using Tensors = std::vector<Tensor>;

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
    const HeadOutput out = by_precision(x[g], bank[f].size(0), [&](auto t, auto p) {
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(fino, m) {
  m.def(
      "heads_forward(Tensor[] x, Tensor[] bank, Tensor[] offset, Tensor[] target, "
      "Tensor[] inv_count, Tensor[] counts, Tensor[] guidance, float[] weight, int[] kind, "
      "float[] smoothing, int[] group, bool want_x, bool want_bank, bool deterministic) "
      "-> (Tensor sums, "
      "Tensor losses, Tensor metrics, Tensor[] grad_x, Tensor[] grad_bank, Tensor[] grad_offset)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("heads_forward", heads_forward);
}

}  // namespace fino
