// The tile loop: rows against a bank of vectors, a block of rows at a time, with an epilogue on every
// block of products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "runtime.h"
#include "scratch.h"

namespace fino {

// Bytes of products that a sweep holds at a time.
constexpr int64_t scratch_bytes = int64_t{24} << 20;
// The same where every block adds to a gradient as large as the bank: fewer blocks, fewer passes.
constexpr int64_t trained_scratch_bytes = int64_t{40} << 20;

// Rows of one block of `block_sweep`, so that its products, and what they become as operands, stay in
// `scratch`.
template <typename T, typename P>
int64_t block_rows(int64_t rows, int64_t columns, int64_t scratch = scratch_bytes) {
  // Fewer rows would not be worth a pass over a bank that fits no cache: 192 MB for a million columns.
  constexpr int64_t fewest = 48;
  constexpr int64_t bytes = sizeof(T) + (std::is_same_v<T, P> ? 0 : sizeof(P));
  const int64_t fit = scratch / bytes / std::max<int64_t>(columns, 1);
  return std::clamp<int64_t>(fit, fewest, std::max(rows, fewest));
}

// The product and whatever the visitor multiplies use all threads. rows(first row, rows) gives the
// operand [rows, d]; visit(block, first row, rows) gets the products [rows, k]; step: rows of a block.
template <typename T, typename P, typename Rows, typename Visit>
void block_sweep(const Runtime<T, P>& runtime, int64_t n, const P* bank, int64_t k, int64_t d,
                 int64_t step, const Rows& rows, const Visit& visit) {
  const auto block = scratch<T>(std::min(step, n) * k);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    runtime.gemm(false, true, count, k, d, T(1), rows(first, count), d, bank, d, false, block.get(),
                 k);
    visit(block.get(), first, count);
  }
}

}  // namespace fino
