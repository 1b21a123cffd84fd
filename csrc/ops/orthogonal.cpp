// The orthogonal terms of a step, with one gradient.

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../cpu/orthogonal.h"
#include "host.h"

namespace fino {
namespace {

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(fino, m) {
  m.def(
      "orthogonal_forward(Tensor z, Tensor[] designs, bool[] preserve, float[] weight, "
      "Tensor guidance, bool deterministic) -> (Tensor sum, Tensor values, Tensor grad_z)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("orthogonal_forward", orthogonal_forward);
}

}  // namespace fino
