#include "contrastive.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "operand.h"
#include "rows.h"
#include "sweep.h"
#include "turns.h"

namespace fino {
namespace {

// Side of the square tiles of `PairSweep`: large enough for the library's product to run near its full
// rate, small enough for a second-level cache and for every thread to get its share (measured:
// docs/kernels.md). A function of n alone, so that the result does not depend on the threads.
int64_t pair_side(int64_t n) { return n <= 512 ? 128 : n < 8192 ? 256 : 512; }

// One of the two blocks of rows of a tile.
struct Side {
  int64_t first, count;  // rows
  bool unseen;           // no tile before this one had the block
};

// The tiles of the symmetric sweep: every unordered pair of blocks that meet, with their cosines. Two
// towers: the first half of the rows meets the second.
template <typename T, typename P>
class PairSweep {
 public:
  // `twice`: a second visit follows, for which the first keeps as many tiles as `scratch_bytes` hold.
  PairSweep(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, bool two_tower,
            bool twice)
      : runtime_(runtime),
        unit_(unit),
        d_(d),
        part_(two_tower ? n / 2 : n),
        side_(std::min(pair_side(n), part_)),
        blocks_((part_ + side_ - 1) / side_),
        pairs_(two_tower ? towers(blocks_) : tournament(blocks_)) {
    const int64_t fit = scratch_bytes / static_cast<int64_t>(sizeof(T)) / (side_ * side_);
    if (twice) count_ = std::min<int64_t>(fit, pairs_.size());
    kept_ = scratch<T>(count_ * side_ * side_);
  }

  // Calls visit(tile, its operand, rows, columns, whether the rows are the columns) for every pair. A
  // visitor must leave the tiles of the first visit as they are.
  template <typename Visit>
  void visit(const Visit& visit) {
    const auto prepare = [&] {
      return [&, own = scratch<T>(side_ * side_),
              operand = Operand<T, P>(side_ * side_)](const Pair& pair) mutable {
        const Side rows = side(pair.row, pair.row_turn), columns = side(pair.column, pair.column_turn);
        const bool kept = pair.number < count_;
        T* tile = kept ? kept_.get() + pair.number * side_ * side_ : own.get();
        if (!(kept && visited_))
          runtime_.gemm(false, true, rows.count, columns.count, d_, T(1), unit_ + rows.first * d_, d_,
                        unit_ + columns.first * d_, d_, false, tile, columns.count);
        visit(tile, operand, rows, columns, pair.row == pair.column);
      };
    };
    in_turn(pairs_, runtime_.parallel, prepare);
    visited_ = true;
  }

 private:
  // The blocks of the second tower follow those of the first.
  Side side(int64_t block, int turn) const {
    const int64_t first = block % blocks_ * side_;
    return {block / blocks_ * part_ + first, std::min(side_, part_ - first), turn == 0};
  }

  const Runtime<T, P>& runtime_;
  const P* unit_;
  const int64_t d_, part_, side_, blocks_;
  const std::vector<Pair> pairs_;
  int64_t count_ = 0;
  Scratch<T> kept_;
  bool visited_ = false;
};

}  // namespace

template <typename T, typename P>
void pair_terms(const Runtime<T, P>& runtime, const P* unit, int64_t n, int64_t d, T scale,
                bool two_tower, T* lse, T* g) {
  PairSweep<T, P> sweep(runtime, unit, n, d, two_tower, g != nullptr);
  const auto sums = scratch<T>(n);  // Σ_j exp(scale·(c_ij − 1))
  std::fill(sums.get(), sums.get() + n, T(0));
  sweep.visit([&](const T* tile, Operand<T, P>&, const Side& rows, const Side& columns,
                  bool diagonal) {
    epilogues<T>().pair_sums(tile, rows.count, columns.count, scale, diagonal, sums.get() + rows.first,
                             sums.get() + columns.first);
  });
  for (int64_t i = 0; i < n; ++i) lse[i] = scale + std::log(sums[i]);
  if (g == nullptr) return;
  T* inverse = sums.get();
  for (int64_t i = 0; i < n; ++i) inverse[i] = 1 / inverse[i];
  sweep.visit([&](T* tile, Operand<T, P>& operand, const Side& rows, const Side& columns,
                  bool diagonal) {
    epilogues<T>().pair_weights(tile, rows.count, columns.count, scale, diagonal, inverse + rows.first,
                                inverse + columns.first);
    operand.fill(tile, 0, rows.count * columns.count);
    const P* weights = operand.get(tile);
    runtime.gemm(false, false, rows.count, d, columns.count, T(1), weights, columns.count,
                 unit + columns.first * d, d, !rows.unseen, g + rows.first * d, d);
    if (!diagonal)
      runtime.gemm(true, false, columns.count, d, rows.count, T(1), weights, columns.count,
                   unit + rows.first * d, d, !columns.unseen, g + columns.first * d, d);
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

template <typename T>
Positives positives(Parallel parallel, const T* unit, const T* norms, int64_t views, int64_t images,
                    int64_t d, double factor, T* g) {
  const auto& kernels = epilogues<T>();
  std::vector<Positives> parts(images);  // added up in one order
  parallel(images, [&](int64_t begin, int64_t end) {
    const auto sum = scratch<T>(d), others = scratch<T>(d);
    for (int64_t image = begin; image < end; ++image) {
      Positives& part = parts[image] = {0, 0};
      for (int64_t view = 0; view < views; ++view)
        kernels.scaled(unit + (view * images + image) * d, T(1), view > 0, sum.get(), d);
      for (int64_t view = 0; view < views; ++view) {
        const int64_t i = view * images + image;
        const T* row = unit + i * d;
        kernels.difference(sum.get(), row, others.get(), d);
        part.cosines += kernels.dot(row, others.get(), d);
        if (g == nullptr) continue;
        // A pair is a positive of both of its rows, as it is in both directions of g.
        kernels.combine(g + i * d, others.get(), nullptr, T(factor), T(-2 * factor / (views - 1)), d);
        part.along += kernels.normalize_backward(g + i * d, row, d, norms[i], T(normalize_eps));
      }
    }
  });
  Positives all{0, 0};
  for (const Positives& part : parts) {
    all.cosines += part.cosines;
    all.along += part.along;
  }
  return all;
}

template Positives positives<float>(Parallel, const float*, const float*, int64_t, int64_t, int64_t,
                                    double, float*);
template Positives positives<double>(Parallel, const double*, const double*, int64_t, int64_t, int64_t,
                                     double, double*);

#define FINO_INSTANTIATE(T, P)                                                                    \
  template void pair_terms<T, P>(const Runtime<T, P>&, const P*, int64_t, int64_t, T, bool, T*,   \
                                 T*);                                                             \
  template void cross_logsumexp<T, P>(const Runtime<T, P>&, const P*, int64_t, const P*, int64_t, \
                                      int64_t, T, int64_t, T*);                                   \
  template void cross_gradient<T, P>(const Runtime<T, P>&, const P*, int64_t, const P*, int64_t,  \
                                     int64_t, T, int64_t, const T*, const T*, T*);
FINO_INSTANTIATE(float, float)
FINO_INSTANTIATE(double, double)
FINO_INSTANTIATE(float, Bf16)

}  // namespace fino
