// The contrastive term on unit rows. Free of torch; T and P as in runtime.h.
#pragma once

#include "runtime.h"

namespace fino {

// Where rows and columns are the same n unit vectors, each tile serves both directions (s_ij = s_ji).
// Only for scale ≤ max_bounded_scale: the largest possible logit, scale, stands in for the running
// maximum.
constexpr double max_bounded_scale = 40;  // exp(−2·40) is still a normal fp32 number

// lse[i] = logsumexp over j ≠ i of scale·⟨x_i, x_j⟩; with two towers over the j of the other half. [n]
// g[i] = Σ_j (softmax_ij + softmax_ji) x_j over the same j [n, d]; null: not wanted.
template <typename T, typename P>
void pair_terms(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, T scale,
                bool two_tower, T* lse, T* g);

// The same for rows and columns that differ: row i leaves out column skip + i (skip < 0: none).
template <typename T, typename P>
void cross_logsumexp(const Runtime<T, P>& runtime, const P* rows, int64_t n, const P* columns,
                     int64_t m, int64_t d, T scale, int64_t skip, T* lse);

template <typename T, typename P>
void cross_gradient(const Runtime<T, P>& runtime, const P* rows, int64_t n, const P* columns,
                    int64_t m, int64_t d, T scale, int64_t skip, const T* lse_rows,
                    const T* lse_columns, T* g);

struct Positives {
  double cosines;  // Σ over the pairs (i, j) of views of an image, in both orders, of ⟨x_i, x_j⟩
  double along;    // Σ_i ⟨g_i, x_i⟩ of the finished g, before the way back through the unit length
};

// What the other views of an image add to its rows. `unit` [views·images, d] holds one view after
// another, `norms` [views·images] the lengths before. g as above becomes, in place, factor · the gradient
// of Σ_i (lse_i / scale − mean cosine of i's positives) at the rows before they were made unit
// [views·images, d]; null: not wanted.
template <typename T>
Positives positives(Parallel parallel, const T* unit, const T* norms, int64_t views, int64_t images,
                    int64_t d, double factor, T* g);

}  // namespace fino
