#include "heads.h"

#include <algorithm>
#include <vector>

#include "operand.h"
#include "rows.h"
#include "sweep.h"

namespace fino {
namespace {

template <typename T, typename P>
class HeadSweep {
 public:
  HeadSweep(const Runtime<T, P>& runtime, const Head<T, P>& head)
      : runtime_(runtime), head_(head), step_(block_step(head)),
        loaded_(scratch<T>(step_ * head.d)), operand_(step_ * head.d),
        coefficients_(gradient() ? step_ * head.k : 0),
        unit_(scratch<T>(prototype() ? step_ * head.d : 0)),
        norms_(prototype() ? step_ : 0), along_(norms_.size()),
        at_unit_(scratch<T>(prototype() && head.grad_x != nullptr ? step_ * head.d : 0)),
        // One entry a row, added up in order: the same sum from any number of threads.
        per_row_(head.n),
        grad_offsets_(scratch<T>(head.grad_offset != nullptr ? groups(step_) * head.k : 0)) {}

  RowLoss<double> run() {
    const int64_t k = head_.k;
    block_sweep(
        runtime_, head_.n, head_.bank, k, head_.d, step_,
        [&](int64_t first, int64_t count) { return load(first, count); },
        [&](T* block, int64_t first, int64_t count) {
          runtime_.parallel(groups(count), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * group_rows; i < std::min(end * group_rows, count); ++i) {
              per_row_[first + i] = row(block + i * k, first + i);
              if (gradient()) coefficients_.fill(block, i * k, k);
              if (head_.grad_offset != nullptr)  // while the row is in cache
                epilogues<T>().scaled(block + i * k, T(1), i % group_rows > 0,
                                      grad_offsets_.get() + i / group_rows * k, k);
            }
          });
          if (gradient()) gradients(block, first, count);
        });
    RowLoss<double> sum{0, 0};
    for (const RowLoss<T>& row : per_row_) {
      sum.loss += row.loss;
      sum.metric += row.metric;
    }
    return sum;
  }

 private:
  // Rows whose gradients of the offsets one thread adds up.
  static constexpr int64_t group_rows = 32;
  static int64_t groups(int64_t rows) { return (rows + group_rows - 1) / group_rows; }

  static int64_t block_step(const Head<T, P>& head) {
    const int64_t bytes = head.grad_bank != nullptr ? trained_scratch_bytes : scratch_bytes;
    return std::min(block_rows<T, P>(head.n, head.k, bytes), head.n);
  }

  bool gradient() const { return head_.grad_x != nullptr || head_.grad_bank != nullptr; }
  bool prototype() const { return head_.kind == HeadKind::prototype; }

  template <typename Body>
  void for_rows(int64_t count, const Body& body) {
    runtime_.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // The operand [count, d] of a block.
  const P* load(int64_t first, int64_t count) {
    x_ = head_.rows(first, count, loaded_.get());
    if (prototype()) {
      normalize_rows(runtime_.parallel, x_, count, head_.d, unit_.get(), norms_.data());
      x_ = unit_.get();
    }
    operand_.fill(x_, 0, count * head_.d);
    return operand_.get(x_);
  }

  // Turns a row of products into ∂/∂products, where gradients are wanted.
  RowLoss<T> row(T* row, int64_t index) {
    const Epilogues<T>& e = epilogues<T>();
    if (head_.kind == HeadKind::linear || prototype()) {
      if (head_.target[index] < 0) {
        if (gradient()) std::fill(row, row + head_.k, T(0));
        return {0, 0};
      }
      return e.cross_entropy(row, head_.k, head_.scale, head_.offset, head_.target[index],
                             head_.smoothing, head_.weight, gradient());
    }
    const Activation activation = head_.kind == HeadKind::identity  ? Activation::identity
                                  : head_.kind == HeadKind::sigmoid ? Activation::sigmoid
                                                                    : Activation::tanh;
    return e.squared_error(row, head_.k, head_.offset, head_.value + index * head_.k, activation,
                           head_.weight, gradient());
  }

  void gradients(const T* block, int64_t first, int64_t count) {
    const int64_t k = head_.k, d = head_.d;
    const P* coefficients = coefficients_.get(block);
    if (head_.grad_x != nullptr) {
      T* grad_x = head_.grad_x + first * d;
      if (prototype()) {
        runtime_.gemm(false, false, count, d, k, T(1), coefficients, k, head_.bank, d, false,
                      at_unit_.get(), d);
        normalize_rows_backward(runtime_.parallel, at_unit_.get(), unit_.get(), norms_.data(), count,
                                d, along_.data());
        for_rows(count, [&](int64_t i) {
          epilogues<T>().scaled(at_unit_.get() + i * d, head_.guidance, head_.accumulate,
                                grad_x + i * d, d);
        });
      } else {
        runtime_.gemm(false, false, count, d, k, head_.guidance, coefficients, k, head_.bank, d,
                      head_.accumulate, grad_x, d);
      }
    }
    if (head_.grad_bank != nullptr)
      runtime_.gemm(true, false, k, d, count, T(1), coefficients, k, operand_.get(x_), d, first > 0,
                    head_.grad_bank, d);
    if (head_.grad_offset != nullptr)
      runtime_.parallel(k, [&](int64_t begin, int64_t end) {
        for (int64_t group = 0; group < groups(count); ++group)
          epilogues<T>().scaled(grad_offsets_.get() + group * k + begin, T(1), true,
                                head_.grad_offset + begin, end - begin);
      });
  }

  const Runtime<T, P>& runtime_;
  const Head<T, P>& head_;
  const int64_t step_;
  const T* x_ = nullptr;       // rows of the block, of unit length for prototypes
  Scratch<T> loaded_;
  Operand<T, P> operand_;       // x_ as P
  Operand<T, P> coefficients_;  // ∂/∂products of the block as P
  Scratch<T> unit_;
  std::vector<T> norms_, along_;
  Scratch<T> at_unit_;  // gradient at the unit rows
  std::vector<RowLoss<T>> per_row_;
  Scratch<T> grad_offsets_;  // [groups, k]
};

}  // namespace

template <typename T, typename P>
RowLoss<double> head_sweep(const Runtime<T, P>& runtime, const Head<T, P>& head) {
  return HeadSweep<T, P>(runtime, head).run();
}

template RowLoss<double> head_sweep(const Runtime<float>&, const Head<float, float>&);
template RowLoss<double> head_sweep(const Runtime<double>&, const Head<double, double>&);
template RowLoss<double> head_sweep(const Runtime<float, Bf16>&, const Head<float, Bf16>&);

}  // namespace fino
