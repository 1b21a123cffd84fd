// Where the rows of a matrix come from; rows of unit length, and the way back.
#pragma once

#include <cstdint>
#include <functional>

#include "epilogues.h"
#include "runtime.h"

namespace fino {

// Rows [first, first + count) of a matrix [n, d] as T: where they are, or written to `buffer`
// [count, d].
template <typename T>
using Rows = std::function<const T*(int64_t first, int64_t count, T* buffer)>;

constexpr double normalize_eps = 1e-12;  // x̂ = x / max(‖x‖, normalize_eps)

// Unit rows and norms: unit = x / max(norm, eps) [n, d] (may be x), norms [n].
template <typename T>
void normalize_rows(Parallel parallel, const T* x, int64_t n, int64_t d, T* unit, T* norms) {
  parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      norms[i] = epilogues<T>().normalize(x + i * d, unit + i * d, d, T(normalize_eps));
  });
}

// In place: gradients at unit rows become gradients at the rows, and along[i] = ⟨g_i, x̂_i⟩ as it came.
template <typename T>
void normalize_rows_backward(Parallel parallel, T* g, const T* unit, const T* norms, int64_t n,
                             int64_t d, T* along) {
  parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      along[i] = epilogues<T>().normalize_backward(g + i * d, unit + i * d, d, norms[i],
                                                   T(normalize_eps));
  });
}

}  // namespace fino
