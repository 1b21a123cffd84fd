// The sweeps: rows against a bank of vectors, tile by tile, with an epilogue on every tile of
// products. Free of torch: raw row-major pointers, and the matrix product and the threads are
// handed in. T is float or double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "epilogues.h"
#include "scratch.h"

namespace fino {

// What the sweeps borrow from their host.
template <typename T>
struct Runtime {
  // c [m, n] = op(a) op(b) (+ c where `accumulate`); a is [m, k], or [k, m] where transposed, and
  // so on; ld* are the row lengths in memory.
  using Gemm = void (*)(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
                        const T* a, int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c,
                        int64_t ldc);
  Gemm gemm;
  // Calls body(begin, end) over pieces of [0, n), on several threads.
  void (*parallel)(int64_t n, const std::function<void(int64_t, int64_t)>& body);
};

// Rows of one tile of `block_sweep`, so that rows · columns stays in `scratch_bytes`.
template <typename T>
int64_t block_rows(int64_t rows, int64_t columns);

// The tile loop of all other sweeps: rows in blocks against the whole bank. The product and
// whatever the visitor multiplies use all threads; visit(block, first row, rows) gets the
// products [rows, k].
template <typename T, typename Visit>
void block_sweep(const Runtime<T>& runtime, const T* x, int64_t n, const T* bank, int64_t k,
                 int64_t d, const Visit& visit) {
  const int64_t step = block_rows<T>(n, k);
  const auto block = scratch<T>(step * k);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t rows = std::min(step, n - first);
    runtime.gemm(false, true, rows, k, d, x + first * d, d, bank, d, false, block.get(), k);
    visit(block.get(), first, rows);
  }
}

// Side of the square tiles of `pair_sweep`. A function of n alone, so that the result does not
// depend on the number of threads.
int64_t pair_side(int64_t n);

// Unit rows and norms: unit = x / max(norm, eps) [n, d], norms [n].
template <typename T>
void normalize_rows(const Runtime<T>& runtime, const T* x, int64_t n, int64_t d, T* unit, T* norms);

// In place: gradients at unit rows become gradients at the rows, and along[i] = ⟨g_i, x̂_i⟩ as it came.
template <typename T>
void normalize_rows_backward(const Runtime<T>& runtime, T* g, const T* unit, const T* norms,
                             int64_t n, int64_t d, T* along);

// Contrastive, where rows and columns are the same n unit vectors and each tile serves both
// directions (s_ij = s_ji). Only for scale ≤ max_bounded_scale: the largest possible logit, scale,
// stands in for the running maximum.
constexpr double max_bounded_scale = 40;  // exp(−2·40) is still a normal fp32 number

// lse[i] = logsumexp over j ≠ i of scale·⟨x_i, x_j⟩; with two towers over the j of the other half. [n]
template <typename T>
void pair_logsumexp(const Runtime<T>& runtime, const T* unit, int64_t n, int64_t d, T scale,
                    bool two_tower, T* lse);

// g[i] = Σ_j (softmax_ij + softmax_ji) x_j over the same j. [n, d], zero on entry.
template <typename T>
void pair_gradient(const Runtime<T>& runtime, const T* unit, int64_t n, int64_t d, T scale,
                   bool two_tower, const T* lse, T* g);

// The same for rows and columns that differ: row i leaves out column skip + i (skip < 0: none).
template <typename T>
void cross_logsumexp(const Runtime<T>& runtime, const T* rows, int64_t n, const T* columns,
                     int64_t m, int64_t d, T scale, int64_t skip, T* lse);

template <typename T>
void cross_gradient(const Runtime<T>& runtime, const T* rows, int64_t n, const T* columns,
                    int64_t m, int64_t d, T scale, int64_t skip, const T* lse_rows,
                    const T* lse_columns, T* g);

// One metadata head over n rows. Gradients are those of weight · Σ loss, and are left alone where
// their pointer is null.
enum class HeadKind { linear, prototype, identity, sigmoid, tanh };

template <typename T>
struct Head {
  HeadKind kind;
  const T* x;               // [n, d]
  const T* bank;            // [k, d]
  const T* scale;           // [k]; prototype: 1 / (‖c‖·φ), 0 where unseen; else null
  const T* offset;          // [k]; bias; prototype: 0, or the lowest number where unseen
  const int64_t* target;    // [n], < 0 takes no part; classification
  const T* value;           // [n, k], NaN takes no part; regression
  int64_t n, k, d;
  T smoothing;
  T weight;
  T* grad_x;       // [n, d]
  T* grad_bank;    // [k, d], zero on entry
  T* grad_offset;  // [k], zero on entry
};

// (Σ loss, Σ metric) over the rows.
template <typename T>
RowLoss<double> head_sweep(const Runtime<T>& runtime, const Head<T>& head);

}  // namespace fino
