#include "views.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fino {
namespace {

// Output rows that are made together; side by side they are what the filter along x is vectorised over.
constexpr int64_t lanes = 16;

// The input pixels that make each output pixel along one axis, and their weights.
class Filter {
 public:
  Filter(int64_t input, int64_t output) : first_(output), count_(output) {
    const double step = double(input) / double(output), reach = std::max(step, 1.0);
    most_ = 2 * int64_t(std::ceil(reach)) + 1;
    weights_.resize(output * most_);
    for (int64_t i = 0; i < output; ++i) {
      const double centre = step * (double(i) + 0.5);
      first_[i] = std::max<int64_t>(int64_t(centre - reach + 0.5), 0);
      count_[i] = std::min<int64_t>(int64_t(centre + reach + 0.5), input) - first_[i];
      float* weight = weights_.data() + i * most_;
      double total = 0;
      for (int64_t k = 0; k < count_[i]; ++k) {
        const double distance = std::abs(double(first_[i] + k) + 0.5 - centre) / reach;
        weight[k] = float(std::max(0.0, 1 - distance));
        total += weight[k];
      }
      for (int64_t k = 0; k < count_[i]; ++k) weight[k] = float(weight[k] / total);
    }
  }

  int64_t first(int64_t i) const { return first_[i]; }
  int64_t count(int64_t i) const { return count_[i]; }
  const float* weights(int64_t i) const { return weights_.data() + i * most_; }

 private:
  int64_t most_;
  std::vector<int64_t> first_, count_;
  std::vector<float> weights_;
};

// out = Σ_k weight[k] · rows[k], of n values each.
template <typename T>
void blend(const T* rows, int64_t stride, const float* weight, int64_t count, int64_t n, float* out) {
  const T* second = rows + (count > 1 ? stride : 0);
  const float first_weight = weight[0], second_weight = count > 1 ? weight[1] : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    out[j] = first_weight * float(rows[j]) + second_weight * float(second[j]);
  for (int64_t k = 2; k < count; ++k) {
    const T* row = rows + k * stride;
    const float further = weight[k];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += further * float(row[j]);
  }
}

}  // namespace

template <typename T>
void cut_view(const Picture<T>& picture, const Box& box, bool mirror_x, bool mirror_y, int64_t size,
              int64_t planes, const float* shift, const float* divisor, float* out) {
  const Filter down(box.bottom - box.top, size), across(box.right - box.left, size);
  const int64_t channels = picture.channels, stride = picture.width * channels;
  const int64_t n = (box.right - box.left) * channels;
  const T* corner = picture.pixels + box.top * stride + box.left * channels;
  std::vector<float> rows(lanes * n), columns(n * lanes), strip(size * lanes);
  for (int64_t top = 0; top < size; top += lanes) {
    const int64_t count = std::min(lanes, size - top);
    for (int64_t l = 0; l < count; ++l)
      blend(corner + down.first(top + l) * stride, stride, down.weights(top + l),
            down.count(top + l), n, rows.data() + l * n);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t l = 0; l < lanes; ++l) columns[j * lanes + l] = rows[l * n + j];
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t channel = channels == 1 ? 0 : plane;
      for (int64_t x = 0; x < size; ++x) {
        const float* taps = columns.data() + (across.first(x) * channels + channel) * lanes;
        const float* weight = across.weights(x);
        float sum[lanes] = {};
        for (int64_t k = 0; k < across.count(x); ++k) {
#pragma omp simd
          for (int64_t l = 0; l < lanes; ++l) sum[l] += weight[k] * taps[k * channels * lanes + l];
        }
        float* to = strip.data() + (mirror_x ? size - 1 - x : x) * lanes;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) to[l] = (sum[l] - shift[plane]) / divisor[plane];
      }
      for (int64_t l = 0; l < count; ++l) {
        const int64_t y = mirror_y ? size - 1 - top - l : top + l;
        float* row = out + (plane * size + y) * size;
        for (int64_t x = 0; x < size; ++x) row[x] = strip[x * lanes + l];
      }
    }
  }
}

template void cut_view(const Picture<uint8_t>&, const Box&, bool, bool, int64_t, int64_t, const float*,
                       const float*, float*);
template void cut_view(const Picture<uint16_t>&, const Box&, bool, bool, int64_t, int64_t, const float*,
                       const float*, float*);
template void cut_view(const Picture<float>&, const Box&, bool, bool, int64_t, int64_t, const float*,
                       const float*, float*);

}  // namespace fino
