#include "launch.h"

#include "bank_update.cuh"
#include "group_means.cuh"

int fino_group_means(const float* z, const int64_t* order, const int64_t* labels, int64_t count,
                     int64_t width, float* out, void* stream) {
  if (count == 0 || width == 0) return cudaSuccess;
  const fino::GroupMeans arguments{{order, labels, count}, z, out, width};
  const dim3 grid(unsigned(count), unsigned((width + fino::kColumns - 1) / fino::kColumns));
  fino::group_means<<<grid, fino::kThreads, 0, cudaStream_t(stream)>>>(arguments);
  return cudaGetLastError();
}

int fino_bank_update(const float* teacher, const int64_t* order, const int64_t* labels,
                     int64_t count, int64_t width, int64_t classes, float momentum, bool unit_norm,
                     float* centroids, float* temperatures, int64_t* counts, float* scratch,
                     void* stream) {
  if (count == 0 || width == 0) return cudaSuccess;
  const fino::BankUpdate arguments{{order, labels, count}, teacher,   scratch,   width,
                                   classes,                momentum,  unit_norm, centroids,
                                   temperatures,           counts};
  fino::bank_update<<<unsigned(count), fino::kThreads, 0, cudaStream_t(stream)>>>(arguments);
  return cudaGetLastError();
}
