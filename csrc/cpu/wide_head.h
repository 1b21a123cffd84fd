// The linear head of a bank so large that its gradient is not held from the forward to the backward
// pass: two visits by tiles of classes, each of which finishes a class's gradient at once. Free of
// torch; T and P as in runtime.h.
#pragma once

#include <cstdint>

#include "heads.h"

namespace fino {

template <typename T, typename P>
struct WideHead {
  Rows<T> rows;           // [n, d], finite
  const P* bank;          // [k, d]
  const T* offset;        // [k]
  const int64_t* target;  // [n], < 0 takes no part
  int64_t n, k, d;
  T smoothing;
};

// (Σ loss, Σ hits) over the rows; lse [n].
template <typename T, typename P>
RowLoss<double> wide_head_loss(const Runtime<T, P>& runtime, const WideHead<T, P>& head, T* lse);

// Gradients of weight · Σ loss, overwritten: grad_x [n, d], grad_bank [k, d], grad_offset [k]; null
// where not wanted.
template <typename T, typename P>
void wide_head_gradient(const Runtime<T, P>& runtime, const WideHead<T, P>& head, const T* lse,
                        T weight, T* grad_x, T* grad_bank, T* grad_offset);

}  // namespace fino
