// The launchers of csrc/cuda/launch.h on the host.

#include "host_shim.h"

using std::isfinite;

#include "bank_update.cuh"
#include "group_means.cuh"
#include "launch.h"

int fino_group_means(const float* z, const int64_t* order, const int64_t* labels, int64_t count,
                     int64_t width, float* out, void*) {
  const fino::GroupMeans arguments{{order, labels, count}, z, out, width};
  launch(unsigned(count), unsigned((width + fino::kColumns - 1) / fino::kColumns), fino::kThreads,
         fino::group_means, arguments);
  return 0;
}

int fino_bank_update(const FinoBank* banks, int64_t bank_count, const float* teacher,
                     int64_t views, int64_t count, int64_t width, void*) {
  if (count == 0 || width == 0) return 0;
  for (int64_t first = 0; first < bank_count; first += kFinoMaxBanks) {
    fino::BankUpdates arguments{{}, teacher, views, count, width};
    const int64_t some = bank_count - first < kFinoMaxBanks ? bank_count - first : kFinoMaxBanks;
    for (int64_t i = 0; i < some; ++i) arguments.banks[i] = banks[first + i];
    launch(unsigned(count), unsigned(some), fino::kThreads, fino::bank_update, arguments);
  }
  return 0;
}
