#include "wide_head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "operand.h"
#include "sweep.h"

namespace fino {
namespace {

constexpr int64_t tile_columns = 2048;

template <typename T, typename P>
int64_t tile_rows(const WideHead<T, P>& head) {
  return std::min(block_rows<T, P>(head.n, tile_columns), head.n);
}

// Visits every tile of logits, all blocks of rows of some classes before the next classes:
// visit(tile, its rows' operand, first row, rows, first class, classes).
template <typename T, typename P, typename Visit>
void tile_sweep(const Runtime<T, P>& runtime, const WideHead<T, P>& head, const Visit& visit) {
  const int64_t columns = std::min(tile_columns, head.k), rows = tile_rows(head);
  const auto tile = scratch<T>(rows * columns), loaded = scratch<T>(rows * head.d);
  Operand<T, P> operand(rows * head.d);
  for (int64_t c = 0; c < head.k; c += columns) {
    const int64_t classes = std::min(columns, head.k - c);
    for (int64_t r = 0; r < head.n; r += rows) {
      const int64_t count = std::min(rows, head.n - r);
      const T* x = head.rows(r, count, loaded.get());
      operand.fill(x, 0, count * head.d);
      runtime.gemm(false, true, count, classes, head.d, T(1), operand.get(x), head.d,
                   head.bank + c * head.d, head.d, false, tile.get(), classes);
      visit(tile.get(), operand.get(x), r, count, c, classes);
    }
  }
}

}  // namespace

template <typename T, typename P>
RowLoss<double> wide_head_loss(const Runtime<T, P>& runtime, const WideHead<T, P>& head, T* lse) {
  std::vector<RunningLogits<T>> running(
      head.n, {std::numeric_limits<T>::lowest(), T(0), T(0), T(0), int64_t{-1}});
  tile_sweep(runtime, head,
             [&](T* tile, const P*, int64_t r, int64_t count, int64_t c, int64_t classes) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RunningLogits<T>& row = running[r + i];
        T* logits = tile + i * classes;
        epilogues<T>().extend(logits, head.offset + c, classes, c, row);
        const int64_t own = head.target[r + i] - c;
        if (own >= 0 && own < classes) row.own = logits[own];
      }
    });
  });
  RowLoss<double> sum{0, 0};
  for (int64_t i = 0; i < head.n; ++i) {
    const RunningLogits<T>& row = running[i];
    lse[i] = row.top + std::log(row.sum);
    if (head.target[i] < 0) continue;
    sum.loss += lse[i] - (1 - head.smoothing) * row.own;
    if (head.smoothing != 0) sum.loss -= head.smoothing / T(head.k) * row.total;
    sum.metric += row.best == head.target[i];
  }
  return sum;
}

template <typename T, typename P>
void wide_head_gradient(const Runtime<T, P>& runtime, const WideHead<T, P>& head, const T* lse,
                        T weight, T* grad_x, T* grad_bank, T* grad_offset) {
  const int64_t d = head.d;
  const T uniform = weight * head.smoothing / T(head.k);
  Operand<T, P> coefficients(tile_rows(head) * std::min(tile_columns, head.k));
  tile_sweep(runtime, head,
             [&](T* tile, const P* x, int64_t r, int64_t count, int64_t c, int64_t classes) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = tile + i * classes;
        const int64_t target = head.target[r + i];
        if (target < 0) {
          std::fill(row, row + classes, T(0));
        } else {
          epilogues<T>().softmax_gradient(row, head.offset + c, classes, lse[r + i], weight, uniform);
          if (target >= c && target < c + classes) row[target - c] -= weight * (1 - head.smoothing);
        }
        coefficients.fill(tile, i * classes, classes);
      }
    });
    const P* g = coefficients.get(tile);
    if (grad_x != nullptr)
      runtime.gemm(false, false, count, d, classes, T(1), g, classes, head.bank + c * d, d,
                   c > 0, grad_x + r * d, d);
    if (grad_bank == nullptr) return;
    runtime.gemm(true, false, classes, d, count, T(1), g, classes, x, d, r > 0, grad_bank + c * d, d);
    runtime.parallel(classes, [&](int64_t begin, int64_t end) {
      if (r == 0) std::fill(grad_offset + c + begin, grad_offset + c + end, T(0));
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = begin; k < end; ++k) grad_offset[c + k] += tile[i * classes + k];
    });
  });
}

#define FINO_INSTANTIATE(T, P)                                                                    \
  template RowLoss<double> wide_head_loss(const Runtime<T, P>&, const WideHead<T, P>&, T*);       \
  template void wide_head_gradient(const Runtime<T, P>&, const WideHead<T, P>&, const T*, T, T*,  \
                                   T*, T*);
FINO_INSTANTIATE(float, float)
FINO_INSTANTIATE(double, double)
FINO_INSTANTIATE(float, Bf16)

}  // namespace fino
