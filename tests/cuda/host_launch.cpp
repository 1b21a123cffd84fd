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

int fino_bank_update(const float* teacher, const int64_t* order, const int64_t* labels,
                     int64_t count, int64_t width, int64_t classes, float momentum, bool unit_norm,
                     float* centroids, float* temperatures, int64_t* counts, float* scratch,
                     void*) {
  const fino::BankUpdate arguments{{order, labels, count}, teacher,   scratch,   width,
                                   classes,                momentum,  unit_norm, centroids,
                                   temperatures,           counts};
  launch(unsigned(count), 1, fino::kThreads, fino::bank_update, arguments);
  return 0;
}
