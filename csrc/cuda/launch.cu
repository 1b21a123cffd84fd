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

int fino_bank_update(const FinoBank* banks, int64_t bank_count, const float* teacher,
                     int64_t views, int64_t count, int64_t width, void* stream) {
  if (count == 0 || width == 0) return cudaSuccess;
  for (int64_t first = 0; first < bank_count; first += kFinoMaxBanks) {
    fino::BankUpdates arguments{{}, teacher, views, count, width};
    const int64_t some = bank_count - first < kFinoMaxBanks ? bank_count - first : kFinoMaxBanks;
    for (int64_t i = 0; i < some; ++i) arguments.banks[i] = banks[first + i];
    fino::bank_update<<<dim3(unsigned(count), unsigned(some)), fino::kThreads, 0,
                        cudaStream_t(stream)>>>(arguments);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
