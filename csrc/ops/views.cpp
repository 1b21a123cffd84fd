// Views of decoded images.

#include "../cpu/views.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace fino {
namespace {

using at::Tensor;

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

TORCH_LIBRARY_FRAGMENT(fino, m) {
  m.def(
      "cut_views(Tensor[] images, Tensor boxes, Tensor mirror_x, Tensor mirror_y, Tensor shift, "
      "Tensor divisor, Tensor(a!) out) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fino, CPU, m) {
  m.impl("cut_views", cut_views);
}

}  // namespace fino
