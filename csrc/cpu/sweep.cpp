#include "sweep.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>


namespace fino {

namespace {

constexpr double normalize_eps = 1e-12;
constexpr int64_t scratch_bytes = int64_t{32} << 20;

// Two blocks that meet; `*_turn` counts the pairs before it that the block is in.
struct Pair {
  int64_t row, column;
  int row_turn = 0, column_turn = 0;
};

// All pairs of blocks in an order in which neighbours seldom share a block: the diagonal, then the
// rounds of a round-robin tournament (circle method).
std::vector<Pair> tournament(int64_t blocks) {
  std::vector<Pair> pairs;
  for (int64_t b = 0; b < blocks; ++b) pairs.push_back({b, b});
  const int64_t seats = blocks + blocks % 2;  // an odd field has one bye a round
  for (int64_t round = 0; round + 1 < seats; ++round)
    for (int64_t seat = 0; seat < seats / 2; ++seat) {
      // Seat 0 is fixed, the others rotate.
      const auto player = [&](int64_t s) {
        return s == 0 ? int64_t{0} : 1 + (s - 1 + round) % (seats - 1);
      };
      const int64_t a = player(seat), b = player(seats - 1 - seat);
      if (a < blocks && b < blocks) pairs.push_back({std::min(a, b), std::max(a, b)});
    }
  return pairs;
}

// The same for two towers: every block of the first `blocks` meets every one of the second.
std::vector<Pair> towers(int64_t blocks) {
  std::vector<Pair> pairs;
  for (int64_t round = 0; round < blocks; ++round)
    for (int64_t row = 0; row < blocks; ++row)
      pairs.push_back({row, blocks + (row + round) % blocks});
  return pairs;
}

// Calls prepare()(pair) for all pairs, prepare() once a thread; every block meets the others in the order of the
// list, whoever computes it, so that sums over them need no locks and have one result.
//
// A thread takes the next pair of the list and waits until its two blocks have had their turns
// before it. The pairs that it waits for were taken earlier, so none waits for ever. No barrier: a
// thread that the system has put aside holds up only those that need its blocks.
template <typename Parallel, typename Prepare>
void in_turn(std::vector<Pair> pairs, const Parallel& parallel, const Prepare& prepare) {
  int64_t blocks = 0;
  for (const Pair& pair : pairs) blocks = std::max({blocks, pair.row + 1, pair.column + 1});
  std::vector<int> count(blocks);
  for (Pair& pair : pairs) {
    pair.row_turn = count[pair.row];
    pair.column_turn = count[pair.column];
    ++count[pair.row];
    if (pair.row != pair.column) ++count[pair.column];
  }
  std::vector<std::atomic<int>> turn(blocks);
  for (auto& t : turn) t = 0;
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  const auto wait = [&](int64_t block, int mine) {
    while (turn[block].load(std::memory_order_acquire) != mine && !failed) std::this_thread::yield();
  };
  parallel(static_cast<int64_t>(pairs.size()), [&](int64_t, int64_t) {
    try {
      const auto body = prepare();
      for (size_t index = next++; index < pairs.size() && !failed; index = next++) {
        const Pair& pair = pairs[index];
        wait(pair.row, pair.row_turn);
        wait(pair.column, pair.column_turn);
        if (failed) return;
        body(pair);
        turn[pair.row].fetch_add(1, std::memory_order_release);
        if (pair.row != pair.column) turn[pair.column].fetch_add(1, std::memory_order_release);
      }
    } catch (...) {
      failed = true;  // the others must not wait for what will never be done
      throw;
    }
  });
}

// The tile loop of the symmetric sweep: visit(tile, row offset, rows, column offset, columns, whether
// the rows are the columns) for every unordered pair of blocks that meet, with the tile of their
// cosines. Two towers: the first half of the rows meets the second.
template <typename T, typename Visit>
void pair_sweep(const Runtime<T>& runtime, const T* unit, int64_t n, int64_t d, bool two_tower,
                const Visit& visit) {
  // The part of the rows that is cut into blocks; in two towers each tower by itself.
  const int64_t part = two_tower ? n / 2 : n;
  const int64_t side = pair_side(n), blocks = (part + side - 1) / side;
  const auto bounds = [&](int64_t block) {
    const int64_t first = block % blocks * side;
    return std::pair{block / blocks * part + first, std::min(side, part - first)};
  };
  const auto prepare = [&] {
    return [&, tile = scratch<T>(side * side)](const Pair& pair) {
      const auto [i, rows] = bounds(pair.row);
      const auto [j, columns] = bounds(pair.column);
      runtime.gemm(false, true, rows, columns, d, unit + i * d, d, unit + j * d, d, false,
                   tile.get(), columns);
      visit(tile.get(), i, rows, j, columns, pair.row == pair.column);
    };
  };
  in_turn(two_tower ? towers(blocks) : tournament(blocks), runtime.parallel, prepare);
}

}  // namespace

template <typename T>
int64_t block_rows(int64_t rows, int64_t columns) {
  // Fewer rows would not be worth a pass over a bank that fits no cache: 192 MB for a million columns.
  constexpr int64_t fewest = 48;
  const int64_t fit = scratch_bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(columns, 1);
  return std::clamp<int64_t>(fit, fewest, std::max(rows, fewest));
}

// Large enough for the library's product to run near its full rate, small enough for a second-level
// cache (measured: docs/kernels.md).
int64_t pair_side(int64_t n) { return n >= 8192 ? 384 : 256; }

template <typename T>
void normalize_rows(const Runtime<T>& runtime, const T* x, int64_t n, int64_t d, T* unit,
                    T* norms) {
  runtime.parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      norms[i] = epilogues<T>().normalize(x + i * d, unit + i * d, d, T(normalize_eps));
  });
}

template <typename T>
void normalize_rows_backward(const Runtime<T>& runtime, T* g, const T* unit, const T* norms,
                             int64_t n, int64_t d, T* along) {
  runtime.parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      along[i] = epilogues<T>().normalize_backward(g + i * d, unit + i * d, d, norms[i],
                                                   T(normalize_eps));
  });
}

template <typename T>
void pair_logsumexp(const Runtime<T>& runtime, const T* unit, int64_t n, int64_t d, T scale,
                    bool two_tower, T* lse) {
  std::fill(lse, lse + n, T(0));
  pair_sweep(runtime, unit, n, d, two_tower,
             [&](T* tile, int64_t i, int64_t rows, int64_t j, int64_t columns, bool diagonal) {
               epilogues<T>().pair_sums(tile, rows, columns, scale, diagonal, lse + i, lse + j);
             });
  for (int64_t i = 0; i < n; ++i) lse[i] = scale + std::log(lse[i]);
}

template <typename T>
void pair_gradient(const Runtime<T>& runtime, const T* unit, int64_t n, int64_t d, T scale,
                   bool two_tower, const T* lse, T* g) {
  const auto inverse = scratch<T>(n);  // 1 / Σ_j exp(scale·(c_ij − 1))
  for (int64_t i = 0; i < n; ++i) inverse[i] = std::exp(scale - lse[i]);
  pair_sweep(runtime, unit, n, d, two_tower,
             [&](T* tile, int64_t i, int64_t rows, int64_t j, int64_t columns, bool diagonal) {
               epilogues<T>().pair_weights(tile, rows, columns, scale, diagonal, inverse.get() + i,
                                           inverse.get() + j);
               runtime.gemm(false, false, rows, d, columns, tile, columns, unit + j * d, d, true,
                            g + i * d, d);
               if (!diagonal)
                 runtime.gemm(true, false, columns, d, rows, tile, columns, unit + i * d, d, true,
                              g + j * d, d);
             });
}

template <typename T>
void cross_logsumexp(const Runtime<T>& runtime, const T* rows, int64_t n, const T* columns,
                     int64_t m, int64_t d, T scale, int64_t skip, T* lse) {
  block_sweep(runtime, rows, n, columns, m, d, [&](T* block, int64_t first, int64_t count) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        lse[first + i] = epilogues<T>().row_logsumexp(block + i * m, m, scale,
                                                      skip < 0 ? -1 : skip + first + i);
    });
  });
}

template <typename T>
void cross_gradient(const Runtime<T>& runtime, const T* rows, int64_t n, const T* columns,
                    int64_t m, int64_t d, T scale, int64_t skip, const T* lse_rows,
                    const T* lse_columns, T* g) {
  block_sweep(runtime, rows, n, columns, m, d, [&](T* block, int64_t first, int64_t count) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        epilogues<T>().row_weights(block + i * m, m, scale, skip < 0 ? -1 : skip + first + i,
                                   lse_rows[first + i], lse_columns);
    });
    runtime.gemm(false, false, count, d, m, block, m, columns, d, false, g + first * d, d);
  });
}

namespace {

template <typename T>
RowLoss<T> head_row(const Head<T>& head, T* row, int64_t index, bool gradient) {
  const Epilogues<T>& e = epilogues<T>();
  if (head.kind == HeadKind::linear || head.kind == HeadKind::prototype) {
    if (head.target[index] < 0) {
      if (gradient) std::fill(row, row + head.k, T(0));
      return {0, 0};
    }
    return e.cross_entropy(row, head.k, head.scale, head.offset, head.target[index],
                           head.smoothing, head.weight, gradient);
  }
  const Activation activation = head.kind == HeadKind::identity  ? Activation::identity
                                : head.kind == HeadKind::sigmoid ? Activation::sigmoid
                                                                 : Activation::tanh;
  return e.squared_error(row, head.k, head.offset, head.value + index * head.k, activation,
                         head.weight, gradient);
}

}  // namespace

template <typename T>
RowLoss<double> head_sweep(const Runtime<T>& runtime, const Head<T>& head) {
  const bool gradient = head.grad_x != nullptr || head.grad_bank != nullptr;
  // One entry a row, added up in order: the same sum from any number of threads.
  std::vector<RowLoss<T>> per_row(static_cast<size_t>(head.n));
  block_sweep(runtime, head.x, head.n, head.bank, head.k, head.d,
              [&](T* block, int64_t first, int64_t count) {
    runtime.parallel(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        per_row[first + i] = head_row(head, block + i * head.k, first + i, gradient);
    });
    // The block now holds the gradients at the logits.
    if (head.grad_x != nullptr)
      runtime.gemm(false, false, count, head.d, head.k, block, head.k, head.bank, head.d, false,
                   head.grad_x + first * head.d, head.d);
    if (head.grad_bank != nullptr)
      runtime.gemm(true, false, head.k, head.d, count, block, head.k, head.x + first * head.d,
                   head.d, true, head.grad_bank, head.d);
    if (head.grad_offset != nullptr)
      runtime.parallel(head.k, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = begin; k < end; ++k) head.grad_offset[k] += block[i * head.k + k];
      });
  });
  RowLoss<double> sum{0, 0};
  for (const RowLoss<T>& row : per_row) {
    sum.loss += row.loss;
    sum.metric += row.metric;
  }
  return sum;
}

#define FINO_INSTANTIATE(T)                                                                       \
  template int64_t block_rows<T>(int64_t, int64_t);                                               \
  template void normalize_rows<T>(const Runtime<T>&, const T*, int64_t, int64_t, T*, T*);         \
  template void normalize_rows_backward<T>(const Runtime<T>&, T*, const T*, const T*, int64_t,    \
                                           int64_t, T*);                                          \
  template void pair_logsumexp<T>(const Runtime<T>&, const T*, int64_t, int64_t, T, bool, T*);    \
  template void pair_gradient<T>(const Runtime<T>&, const T*, int64_t, int64_t, T, bool,          \
                                 const T*, T*);                                                   \
  template void cross_logsumexp<T>(const Runtime<T>&, const T*, int64_t, const T*, int64_t,       \
                                   int64_t, T, int64_t, T*);                                      \
  template void cross_gradient<T>(const Runtime<T>&, const T*, int64_t, const T*, int64_t,        \
                                  int64_t, T, int64_t, const T*, const T*, T*);                   \
  template RowLoss<double> head_sweep<T>(const Runtime<T>&, const Head<T>&);
FINO_INSTANTIATE(float)
FINO_INSTANTIATE(double)

}  // namespace fino
