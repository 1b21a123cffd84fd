// A linear head whose gradients are computed in the backward pass.

#include <torch/library.h>

#include <tuple>

#include "../cpu/wide_head.h"
#include "host.h"

namespace fino {
namespace {

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
  return by_precision(x, bank.size(0), [&](auto t, auto p) {
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
  return by_precision(x, bank.size(0), [&](auto t, auto p) {
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(fino, m) {
  m.def(
      "wide_head_forward(Tensor x, Tensor bank, Tensor offset, Tensor target, Tensor inv_count, "
      "float smoothing, bool deterministic) -> (Tensor loss, Tensor metric, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "wide_head_backward(Tensor grad, Tensor x, Tensor bank, Tensor offset, Tensor target, "
      "Tensor inv_count, Tensor lse, float smoothing, bool want_x, bool want_bank, "
      "bool deterministic) -> (Tensor grad_x, Tensor grad_bank, Tensor grad_offset)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("wide_head_forward", wide_head_forward);
  m.impl("wide_head_backward", wide_head_backward);
}

}  // namespace fino
