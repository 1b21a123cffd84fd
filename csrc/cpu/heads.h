// The metadata heads: rows against a bank, the loss and its gradients in one visit. Free of torch; T
// and P as in runtime.h.
#pragma once

#include <cstdint>

#include "epilogues.h"
#include "rows.h"
#include "runtime.h"

namespace fino {

enum class HeadKind { linear, prototype, identity, sigmoid, tanh };

// One head over n rows. Gradients are left alone where their pointer is null.
template <typename T, typename P>
struct Head {
  HeadKind kind;
  Rows<T> rows;             // [n, d], finite; prototype: of any length, they are normalised here
  const P* bank;            // [k, d]
  const T* scale;           // [k]; prototype: 1 / (‖c‖·φ), 0 where unseen; else null
  const T* offset;          // [k]; bias; prototype: 0, or the lowest number where unseen
  const int64_t* target;    // [n], < 0 takes no part; classification
  const T* value;           // [n, k], NaN takes no part; regression
  int64_t n, k, d;
  T smoothing;
  T weight;         // of the gradients: those of weight · Σ loss
  T guidance;       // by which the gradient at the rows is multiplied too
  T* grad_x;        // [n, d]
  bool accumulate;  // add to grad_x
  T* grad_bank;     // [k, d]
  T* grad_offset;   // [k], zero on entry
};

// (Σ loss, Σ metric) over the rows.
template <typename T, typename P>
RowLoss<double> head_sweep(const Runtime<T, P>& runtime, const Head<T, P>& head);

}  // namespace fino
