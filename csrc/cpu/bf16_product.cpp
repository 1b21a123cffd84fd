#include "bf16_product.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "epilogues.h"
#include "scratch.h"

namespace fino {
namespace {

// A matrix, or its transpose: entry (i, k) is data[i · ld + k], or data[k · ld + i].
struct View {
  const Bf16* data;
  int64_t ld;
  bool transposed;

  const Bf16* at(int64_t i, int64_t k) const {
    return transposed ? data + k * ld + i : data + i * ld + k;
  }
};

float widened(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int64_t even(int64_t n) { return n + n % 2; }
int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows [first, first + count) of x, entries [k, k + depth), into rows of even length; zeros behind an odd
// one.
void copy_rows(const View& x, int64_t first, int64_t count, int64_t k, int64_t depth, Bf16* out) {
  const int64_t length = even(depth);
  if (!x.transposed) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * length, x.at(first + i, k), static_cast<size_t>(depth) * sizeof(Bf16));
      if (length > depth) out[i * length + depth] = Bf16{0};
    }
    return;
  }
  // Pairs of entries, one below the other, become numbers of 32 bits, and these are transposed.
  const Epilogues<float>& e = epilogues<float>();
  constexpr int64_t pairs = 16, width = 64;
  constexpr Bf16 zeros[width] = {};
  Bf16 block[2 * pairs * width];
  for (int64_t l = 0; l < depth; l += 2 * pairs)
    for (int64_t i = 0; i < count; i += width) {
      const int64_t rows = std::min(width, count - i), entries = std::min(2 * pairs, depth - l);
      for (int64_t of = 0; of < entries; of += 2)
        e.interleave(x.at(first + i, k + l + of),
                     of + 1 < entries ? x.at(first + i, k + l + of + 1) : zeros, block + of * width,
                     rows);
      e.transpose(block, even(entries) / 2, rows, width, out + i * length + l, length / 2);
    }
}

// Rows [first, first + count) of x, at most bf16_columns, as columns for the micro-kernel; zeros beyond
// them and behind an odd depth.
void pack_columns(const View& x, int64_t first, int64_t count, int64_t k, int64_t depth, Bf16* out) {
  if (count < bf16_columns || depth % 2 != 0)
    std::fill(out, out + even(depth) * bf16_columns, Bf16{0});
  const Epilogues<float>& e = epilogues<float>();
  if (x.transposed) {
    for (int64_t l = 0; l + 1 < depth; l += 2)
      e.interleave(x.at(first, k + l), x.at(first, k + l + 1), out + l * bf16_columns, count);
    if (depth % 2 != 0) {
      const Bf16* last = x.at(first, k + depth - 1);
      for (int64_t i = 0; i < count; ++i) out[(depth - 1) * bf16_columns + 2 * i] = last[i];
    }
  } else {
    // Pairs of entries are numbers of 32 bits, if every row begins at an even entry of them.
    if (x.ld % 2 == 0) {
      e.transpose(x.at(first, k), count, depth / 2, x.ld / 2, out, bf16_columns);
    } else {
      for (int64_t i = 0; i < count; ++i)
        e.transpose(x.at(first + i, k), 1, depth / 2, 0, out + 2 * i, bf16_columns);
    }
    if (depth % 2 != 0)
      for (int64_t i = 0; i < count; ++i)
        out[(depth - 1) * bf16_columns + 2 * i] = x.at(first + i, k)[depth - 1];
  }
}

// Where tiles of sums [rows, bf16_columns] go.
struct Output {
  float* c;
  int64_t ldc;
  bool transposed;  // the rows of a tile are columns of c
  float alpha;

  // `turned` is room for another tile.
  void add(const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns,
           bool accumulate, float* turned) const {
    const Epilogues<float>& e = epilogues<float>();
    if (transposed) {
      e.transpose(tile, rows, columns, bf16_columns, turned, bf16_rows);
      std::swap(row, column);
      std::swap(rows, columns);
      tile = turned;
    }
    const int64_t stride = transposed ? bf16_rows : bf16_columns;
    for (int64_t i = 0; i < rows; ++i)
      e.scaled(tile + i * stride, alpha, accumulate, c + (row + i) * ldc + column, columns);
  }
};

}  // namespace

void plain_bf16_kernel(int64_t m, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b, float* c) {
  for (int64_t i = 0; i < m; ++i) {
    float* sums = c + i * bf16_columns;
    std::fill(sums, sums + bf16_columns, 0.0f);
    for (int64_t k = 0; k < depth; k += 2) {
      const float first = widened(a[i * lda + k]), second = widened(a[i * lda + k + 1]);
      const Bf16* pairs = b + k * bf16_columns;
      for (int64_t j = 0; j < bf16_columns; ++j)
        sums[j] += first * widened(pairs[2 * j]) + second * widened(pairs[2 * j + 1]);
    }
  }
}

void bf16_product(Parallel parallel, Bf16Kernel kernel, Bf16Done done, bool transpose_a,
                  bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const Bf16* a,
                  int64_t lda, const Bf16* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) {
  // out [rows, columns] = left · rightᵀ. A transposed a has to be laid out anew as left operand, as right
  // operand it is as good as any: then b is left, and the tiles are turned on their way out.
  View left{a, lda, transpose_a}, right{b, ldb, !transpose_b};
  int64_t rows = m, columns = n;
  if (transpose_a) {
    std::swap(left, right);
    std::swap(rows, columns);
  }
  const Output out{c, ldc, transpose_a, alpha};
  const int64_t strips = tiles(rows, bf16_rows), panels = tiles(columns, bf16_columns);
  const bool copied = left.transposed || k % 2 != 0;
  const auto copy = scratch<Bf16>(copied ? rows * even(std::min(k, bf16_depth)) : 0);
  for (int64_t first = 0; first < k; first += bf16_depth) {
    const int64_t depth = std::min(bf16_depth, k - first);
    View ready{left.at(0, first), left.ld, false};
    if (copied) {
      parallel(strips, [&](int64_t begin, int64_t end) {
        const int64_t row = begin * bf16_rows, last = std::min(end * bf16_rows, rows);
        copy_rows(left, row, last - row, first, depth, copy.get() + row * even(depth));
      });
      ready = {copy.get(), even(depth), false};
    }
    // Panel by panel, so that what a thread packs serves many strips.
    parallel(panels * strips, [&](int64_t begin, int64_t end) {
      const auto packed = scratch<Bf16>(even(depth) * bf16_columns);
      const auto tile = scratch<float>(bf16_rows * bf16_columns);
      const auto turned = scratch<float>(bf16_rows * bf16_columns);
      int64_t panel = -1;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item % strips * bf16_rows, count = std::min(bf16_rows, rows - row);
        const int64_t column = item / strips * bf16_columns;
        const int64_t width = std::min(bf16_columns, columns - column);
        if (item / strips != panel) {
          panel = item / strips;
          pack_columns(right, column, width, first, depth, packed.get());
        }
        kernel(count, even(depth), ready.at(row, 0), ready.ld, packed.get(), tile.get());
        out.add(tile.get(), row, count, column, width, accumulate || first > 0, turned.get());
      }
      done();
    });
  }
}

}  // namespace fino
