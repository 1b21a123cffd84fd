// Sums of products of entries of two matrices, in parts of a fixed order.

#pragma once

#include "block.cuh"
#include "launch.h"

namespace fino {

struct ProductSums {
  FinoProduct products[kFinoMaxFactors];
};

// Grid: (kFinoParts, products) blocks of kThreads.
__global__ void product_sums(ProductSums a) {
  const FinoProduct& product = a.products[blockIdx.y];
  const int64_t size = product.rows * product.columns;
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += kFinoParts * kThreads) {
    const double factor = product.sizes == nullptr ? 1.0 : product.sizes[i % product.columns];
    sum += factor * product.a[i] * product.b[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) product.parts[blockIdx.x] = sum;
}

}  // namespace fino
