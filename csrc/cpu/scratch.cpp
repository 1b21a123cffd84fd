#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fino {
namespace {

constexpr size_t line = 64, huge = size_t{2} << 20;
// Smaller blocks stay with the allocator anyway.
constexpr size_t fewest_bytes = size_t{1} << 20;
constexpr int most_blocks = 8;

struct Block {
  void* memory;
  size_t bytes;
};

// The blocks in no call's hands, oldest first. The system hands out memory page by page and clears every
// page: 40 MB cost a call 10 to 20 ms.
class Kept {
 public:
  // The smallest block that holds `bytes`; none that is more than twice as large.
  Block take(size_t bytes) {
    const Held held(busy_);
    int best = -1;
    for (int i = 0; held && i < count_; ++i)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes / 2 <= bytes &&
          (best < 0 || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    return best < 0 ? Block{nullptr, 0} : remove(best);
  }

  // False: the caller keeps it.
  bool put(Block block) {
    const Held held(busy_);
    if (!held || block.bytes > most_kept_bytes) return false;
    while (count_ == most_blocks || bytes_ + block.bytes > most_kept_bytes) std::free(remove(0).memory);
    blocks_[count_++] = block;
    bytes_ += block.bytes;
    return true;
  }

  size_t release() {
    const Held held(busy_);
    const size_t bytes = held ? bytes_ : 0;
    while (held && count_ > 0) std::free(remove(0).memory);
    return bytes;
  }

 private:
  // Never waits: who comes second does without, and so does a child forked while another thread was here.
  class Held {
   public:
    explicit Held(std::atomic_flag& busy)
        : busy_(busy), mine_(!busy.test_and_set(std::memory_order_acquire)) {}
    ~Held() {
      if (mine_) busy_.clear(std::memory_order_release);
    }
    explicit operator bool() const { return mine_; }

   private:
    std::atomic_flag& busy_;
    const bool mine_;
  };

  Block remove(int index) {
    const Block block = blocks_[index];
    std::copy(blocks_ + index + 1, blocks_ + count_, blocks_ + index);
    --count_;
    bytes_ -= block.bytes;
    return block;
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  Block blocks_[most_blocks] = {};
  int count_ = 0;
  size_t bytes_ = 0;
};

Kept kept;

}  // namespace

void* take_scratch(size_t& bytes) {
  // A huge page is one fault and one entry of the page table for 2 MB.
  const size_t alignment = bytes >= 2 * huge ? huge : line;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  if (bytes >= fewest_bytes) {
    const Block block = kept.take(bytes);
    if (block.memory != nullptr) {
      bytes = block.bytes;
      return block.memory;
    }
  }
  void* memory = std::aligned_alloc(alignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

void give_back_scratch(void* memory, size_t bytes) {
  if (bytes < fewest_bytes || !kept.put({memory, bytes})) std::free(memory);
}

size_t release_scratch() { return kept.release(); }

}  // namespace fino
