// The orthogonal suppression term: how much of the embedding a factor explains, and how far that part
// and the rest share directions. Free of torch; T is float or double.
#pragma once

#include <cstdint>

#include "rows.h"
#include "runtime.h"

namespace fino {

// The factor's orthogonal projector Π = E diag(1/size) Eᵀ, E with orthogonal columns: indicators of
// k categories, or an orthonormal basis.
template <typename T>
struct Projector {
  const int64_t* slot;  // [n], category in [0, k), < 0 takes no part; null where `basis` is given
  const T* basis;       // [n, k], rows of NaN take no part
  const T* size;        // [k], squared lengths of E's columns: rows of the category, or 1
  int64_t k;
};

enum class Overlap { explained, shared };  // role suppress, role preserve

// With Z the centred rows that take part, S = ΠZ and U = Z − S: returns ‖S‖²/‖Z‖² (explained) or
// ‖S Uᵀ‖²/(‖S‖²·‖U‖²) (shared), 0 where the denominator vanishes, and adds scale times its gradient
// at z.
//
// S has no more than k different rows M, S = E M. Both products of the overlap are taken in the
// cheaper of two ways: as a sweep of U over M (3 units of 2·n·k·d), or as tr(SᵀS · UᵀU) with
// d×d matrices (at most 2 units of 2·n·d² and 2 of 2·k·d²).
//
// z and grad [n, d]; rows of z that take no part may hold anything.
template <typename T>
double orthogonal(const Runtime<T>& runtime, const Rows<T>& z, int64_t n, int64_t d,
                  const Projector<T>& projector, Overlap overlap, T scale, T* grad);

}  // namespace fino
