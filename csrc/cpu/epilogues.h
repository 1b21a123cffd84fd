// What happens to a tile of products once the matrix product is done: vectorised, torch-free, and
// compiled once per instruction-set level (epilogues.cpp). T is float or double.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace fino {

enum class Activation { identity, sigmoid, tanh };

// One row's part of a head's loss; `metric` is 1 for a hit of the classifier, or the squared error.
template <typename T>
struct RowLoss {
  T loss;
  T metric;
};

// A row's logits as far as they have been seen.
template <typename T>
struct RunningLogits {
  T top;         // the largest
  T sum;         // Σ exp(logit − top)
  T total;       // Σ logit
  T own;         // the target's
  int64_t best;  // the first class that has the largest
};

template <typename T>
struct Epilogues {
  // out = x / max(‖x‖, eps); returns ‖x‖.
  T (*normalize)(const T* x, T* out, int64_t n, T eps);

  // Backward of `normalize` in place: g = (g − ⟨g, x̂⟩ x̂) / max(‖x‖, eps); returns ⟨g, x̂⟩ as it came.
  T (*normalize_backward)(T* g, const T* unit, int64_t n, T norm, T eps);

  // Contrastive, both directions of a pair of blocks at once. `tile` holds cosines [rows, cols].
  // With e = exp(scale·(c − 1)): row_sums[i] += Σ_j e, col_sums[j] += Σ_i e. In a diagonal tile
  // the rows are the columns: e_ii = 0, and only row_sums is added to.
  void (*pair_sums)(const T* tile, int64_t rows, int64_t cols, T scale, bool diagonal, T* row_sums,
                    T* col_sums);

  // tile = e · (row_inverse[i] + col_inverse[j]), the weights of both directions; e_ii = 0.
  void (*pair_weights)(T* tile, int64_t rows, int64_t cols, T scale, bool diagonal,
                       const T* row_inverse, const T* col_inverse);

  // logsumexp_j scale·c_j over j ≠ skip (skip < 0: over all).
  T (*row_logsumexp)(const T* cosines, int64_t n, T scale, int64_t skip);

  // c_j = exp(scale·c_j − lse) + exp(scale·c_j − lse_columns[j]); 0 at j = skip.
  void (*row_weights)(T* cosines, int64_t n, T scale, int64_t skip, T lse, const T* lse_columns);

  // Cross entropy of the logits l_k = scale[k]·row[k] + offset[k] (scale may be null: 1) against
  // `target`. With `gradient`, row becomes weight · ∂loss/∂row.
  RowLoss<T> (*cross_entropy)(T* row, int64_t n, const T* scale, const T* offset, int64_t target,
                              T smoothing, T weight, bool gradient);

  // Σ_k (act(row[k] + offset[k]) − target[k])² over the targets that are not NaN. With
  // `gradient`, row becomes weight · ∂loss/∂row.
  RowLoss<T> (*squared_error)(T* row, int64_t n, const T* offset, const T* target,
                              Activation activation, T weight, bool gradient);

  // row += offset, and the logits enter `running`; `first` is the class of row[0].
  void (*extend)(T* row, const T* offset, int64_t n, int64_t first, RunningLogits<T>& running);

  // row_k = weight · exp(row_k + offset_k − lse) − uniform.
  void (*softmax_gradient)(T* row, const T* offset, int64_t n, T lse, T weight, T uniform);

  // out (+)= scale·x.
  void (*scaled)(const T* x, T scale, bool accumulate, T* out, int64_t n);

  // out = x, rounded to nearest, ties to even.
  void (*narrow)(const T* x, Bf16* out, int64_t n);

  // out = x_0, y_0, x_1, y_1, …
  void (*interleave)(const Bf16* x, const Bf16* y, Bf16* out, int64_t n);

  // out [cols, rows] = xᵀ, of numbers of 32 bits; ld are the row lengths in memory, in numbers.
  void (*transpose)(const void* x, int64_t rows, int64_t cols, int64_t ld, void* out, int64_t ld_out);

  // out = x − y (out may be x); returns Σ out².
  T (*difference)(const T* x, const T* y, T* out, int64_t n);

  // Σ x_k·y_k.
  T (*dot)(const T* x, const T* y, int64_t n);

  // Σ weight_k·x_k² (weight may be null: 1).
  T (*weighted_squares)(const T* x, const T* weight, int64_t n);

  // g = a·g + b·u + v (u and v may be null: 0).
  void (*combine)(T* g, const T* u, const T* v, T a, T b, int64_t n);
};

// The level that this process uses (capability.cpp).
template <typename T>
const Epilogues<T>& epilogues();

}  // namespace fino
