// Pairs of blocks shared out among threads, every block in one order and without locks or barriers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace fino {

// Two blocks that meet; `number` counts the pairs before it, `*_turn` those that the block is in.
struct Pair {
  int64_t row, column;
  int64_t number = 0;
  int row_turn = 0, column_turn = 0;
};

// All pairs of blocks in an order in which neighbours seldom share a block: the diagonal, then the
// rounds of a round-robin tournament (circle method).
inline std::vector<Pair> tournament(int64_t blocks) {
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
inline std::vector<Pair> towers(int64_t blocks) {
  std::vector<Pair> pairs;
  for (int64_t round = 0; round < blocks; ++round)
    for (int64_t row = 0; row < blocks; ++row)
      pairs.push_back({row, blocks + (row + round) % blocks});
  return pairs;
}

// Calls prepare()(pair) for all pairs, prepare() once a thread; every block meets the others in the
// order of the list, whoever computes it, so that sums over them need no locks and have one result.
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
    pair.number = &pair - pairs.data();
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
      auto body = prepare();
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

}  // namespace fino
