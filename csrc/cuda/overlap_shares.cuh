// The orthogonal terms R of all factors from their sums, and the coefficients of their gradients:
//
//   suppress  R = ‖S‖²/‖Z‖²               ∂R/∂Z = 2((1 − R) S − R U)/‖Z‖²
//   preserve  R = ‖S Uᵀ‖²/(‖S‖² ‖U‖²)     ∂R/∂Z = 2(U SᵀS + S UᵀU)/(‖S‖² ‖U‖²)
//                                                   − 2R(S/‖S‖² + U/‖U‖²)
//
// S and U are orthogonal, so ‖Z‖² = ‖S‖² + ‖U‖².

#pragma once

#include "block.cuh"
#include "launch.h"

namespace fino {

constexpr int kShareThreads = 1024;
constexpr double kSmallestDenominator = 1e-12;
constexpr double kEpsilon = 1.0 / (1 << 23);  // of fp32

struct OverlapShares {
  FinoOverlap overlaps[kFinoMaxFactors];
  int64_t stripes, groups;
};

// Grid: (factors) blocks of kShareThreads. A thread sums every kShareThreads-th group.
__global__ void __launch_bounds__(kShareThreads) overlap_shares(OverlapShares a) {
  const FinoOverlap& overlap = a.overlaps[blockIdx.x];
  double signal = 0, rest = 0, numerator = 0;
  for (int64_t group = threadIdx.x; group < overlap.groups; group += kShareThreads) {
    double of_signal = 0, of_rest = 0;
    for (int64_t stripe = 0; stripe < a.stripes; ++stripe) {
      of_signal += overlap.squares[stripe * a.groups + group];
      of_rest += overlap.squares[(a.stripes + stripe) * a.groups + group];
    }
    overlap.sums[group] = float(of_signal);
    overlap.sums[a.groups + group] = float(of_rest);
    signal += of_signal;
    rest += of_rest;
  }
  for (int64_t part = threadIdx.x; part < overlap.parts; part += kShareThreads)
    numerator += overlap.numerator[part];
  signal = block_sum<kShareThreads>(signal);
  rest = block_sum<kShareThreads>(rest);
  numerator = block_sum<kShareThreads>(numerator);
  if (threadIdx.x != 0) return;

  const double total = signal + rest, noise = 256 * kEpsilon * kEpsilon * total;
  const bool preserve = overlap.numerator != nullptr;
  // An S or U of the size of Z's rounding is zero: normalised, it would be a random direction.
  const double product = signal > noise && rest > noise ? signal * rest : 0.0;
  const double denominator = preserve ? product : total;
  const bool defined = denominator >= kSmallestDenominator;
  const double share = defined ? (preserve ? numerator : signal) / denominator : 0.0;
  *overlap.share = float(share);
  double by_sides = 0, by_signal = 0, by_rest = 0;
  if (defined && preserve) {
    by_sides = 2 / denominator;
    by_signal = -2 * share / signal;
    by_rest = -2 * share / rest;
  } else if (defined) {
    by_signal = 2 * (1 - share) / total;
    by_rest = -2 * share / total;
  }
  overlap.coefficients[0] = by_sides;   // of U SᵀS and S UᵀU
  overlap.coefficients[1] = by_signal;  // of S
  overlap.coefficients[2] = by_rest;    // of U
}

}  // namespace fino
