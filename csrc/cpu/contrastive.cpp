#include "contrastive.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "operand.h"
#include "sweep.h"
#include "turns.h"

namespace fino {
namespace {

// Side of the square tiles of `pair_sweep`: large enough for the library's product to run near its
// full rate, small enough for a second-level cache (measured: docs/kernels.md). A function of n
// alone, so that the result does not depend on the number of threads.
int64_t pair_side(int64_t n) { return n >= 8192 ? 384 : 256; }

// The tile loop of the symmetric sweep: visit(tile, its operand, row offset, rows, column offset,
// columns, whether the rows are the columns) for every unordered pair of blocks that meet, with the
// tile of their cosines. Two towers: the first half of the rows meets the second.
template <typename T, typename P, typename Visit>
void pair_sweep(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, bool two_tower,
                const Visit& visit) {
  // The part of the rows that is cut into blocks; in two towers each tower by itself.
  const int64_t part = two_tower ? n / 2 : n;
  const int64_t side = pair_side(n), blocks = (part + side - 1) / side;
  const auto bounds = [&](int64_t block) {
    const int64_t first = block % blocks * side;
    return std::pair{block / blocks * part + first, std::min(side, part - first)};
  };
  const auto prepare = [&] {
    return [&, tile = scratch<T>(side * side),
            operand = Operand<T, P>(side * side)](const Pair& pair) mutable {
      const auto [i, rows] = bounds(pair.row);
      const auto [j, columns] = bounds(pair.column);
      runtime.gemm(false, true, rows, columns, d, T(1), unit + i * d, d, unit + j * d, d, false,
                   tile.get(), columns);
      visit(tile.get(), operand, i, rows, j, columns, pair.row == pair.column);
    };
  };
  in_turn(two_tower ? towers(blocks) : tournament(blocks), runtime.parallel, prepare);
}

}  // namespace

template <typename T, typename P>
void pair_logsumexp(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, T scale,
                    bool two_tower, T* lse) {
  std::fill(lse, lse + n, T(0));
  pair_sweep(runtime, unit, n, d, two_tower,
             [&](T* tile, Operand<T, P>&, int64_t i, int64_t rows, int64_t j, int64_t columns,
                 bool diagonal) {
               epilogues<T>().pair_sums(tile, rows, columns, scale, diagonal, lse + i, lse + j);
             });
  for (int64_t i = 0; i < n; ++i) lse[i] = scale + std::log(lse[i]);
}

template <typename T, typename P>
void pair_gradient(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, T scale,
                   bool two_tower, const T* lse, T* g) {
  const auto inverse = scratch<T>(n);  // 1 / Σ_j exp(scale·(c_ij − 1))
  for (int64_t i = 0; i < n; ++i) inverse[i] = std::exp(scale - lse[i]);
  pair_sweep(runtime, unit, n, d, two_tower,
             [&](T* tile, Operand<T, P>& operand, int64_t i, int64_t rows, int64_t j,
                 int64_t columns, bool diagonal) {
               epilogues<T>().pair_weights(tile, rows, columns, scale, diagonal, inverse.get() + i,
                                           inverse.get() + j);
               operand.fill(tile, 0, rows * columns);
               const P* weights = operand.get(tile);
               runtime.gemm(false, false, rows, d, columns, T(1), weights, columns, unit + j * d, d,
                            true, g + i * d, d);
               if (!diagonal)
                 runtime.gemm(true, false, columns, d, rows, T(1), weights, columns, unit + i * d, d,
                              true, g + j * d, d);
             });
}

template <typename T, typename P>
void cross_logsumexp(const Runtime<T, P>& runtime, const P* rows, int64_t n, const P* columns,
                     int64_t m, int64_t d, T scale, int64_t skip, T* lse) {
  const auto at = [&](int64_t first, int64_t) { return rows + first * d; };
  block_sweep(runtime, n, columns, m, d, block_rows<T, P>(n, m), at,
              [&](T* block, int64_t first, int64_t count) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        lse[first + i] = epilogues<T>().row_logsumexp(block + i * m, m, scale,
                                                      skip < 0 ? -1 : skip + first + i);
    });
  });
}

template <typename T, typename P>
void cross_gradient(const Runtime<T, P>& runtime, const P* rows, int64_t n, const P* columns,
                    int64_t m, int64_t d, T scale, int64_t skip, const T* lse_rows,
                    const T* lse_columns, T* g) {
  const int64_t step = block_rows<T, P>(n, m);
  Operand<T, P> weights(std::min(step, n) * m);
  const auto at = [&](int64_t first, int64_t) { return rows + first * d; };
  block_sweep(runtime, n, columns, m, d, step, at, [&](T* block, int64_t first, int64_t count) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        epilogues<T>().row_weights(block + i * m, m, scale, skip < 0 ? -1 : skip + first + i,
                                   lse_rows[first + i], lse_columns);
        weights.fill(block, i * m, m);
      }
    });
    runtime.gemm(false, false, count, d, m, T(1), weights.get(block), m, columns, d, false,
                 g + first * d, d);
  });
}

#define FINO_INSTANTIATE(T, P)                                                                    \
  template void pair_logsumexp<T, P>(const Runtime<T, P>&, const P*, int64_t, int64_t, T, bool,   \
                                     T*);                                                         \
  template void pair_gradient<T, P>(const Runtime<T, P>&, const P*, int64_t, int64_t, T, bool,    \
                                    const T*, T*);                                                \
  template void cross_logsumexp<T, P>(const Runtime<T, P>&, const P*, int64_t, const P*, int64_t, \
                                      int64_t, T, int64_t, T*);                                   \
  template void cross_gradient<T, P>(const Runtime<T, P>&, const P*, int64_t, const P*, int64_t,  \
                                     int64_t, T, int64_t, const T*, const T*, T*);
FINO_INSTANTIATE(float, float)
FINO_INSTANTIATE(double, double)
FINO_INSTANTIATE(float, Bf16)

}  // namespace fino
