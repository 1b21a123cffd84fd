#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bank_update.cuh"
#include "group_statistics.cuh"
#include "overlap_gradient.cuh"
#include "overlap_shares.cuh"
#include "term_losses.cuh"

// The launchers themselves, which a test builds for the host with another `launch`.
namespace {

template <typename Arguments>
int launch(void (*kernel)(Arguments), unsigned grid_x, unsigned grid_y, unsigned threads,
           const Arguments& arguments, void* stream) {
  kernel<<<dim3(grid_x, grid_y), threads, 0, cudaStream_t(stream)>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

#include "launchers.h"

const char* fino_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
