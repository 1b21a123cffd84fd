// What the orthogonal terms need of the sums over stripes and groups.
//
//   suppress  R = ‖S‖²/‖Z‖²               ∂R/∂Z = 2((1 − R) S − R U)/‖Z‖²
//   preserve  R = ‖S Uᵀ‖²/(‖S‖² ‖U‖²)
//
// S and U are orthogonal, so ‖Z‖² = ‖S‖² + ‖U‖². The numerator of `preserve` is a sweep over a bank,
// of U' = U·√(count/‖U‖²) over M'_g = m_g·√(size_g/‖S‖²): so R = ‖U' M'ᵀ‖²/count, whose numbers fit
// every dtype. The sweep's gradient takes the two factors as constants; what they change is that of
//
//   preserve  ‖S‖²‖U‖² / (its own value)  ∂/∂Z = 2(S/‖S‖² + U/‖U‖²)
//
// by which the sweep's R is divided.

#pragma once

#include "block.cuh"
#include "launch.h"

namespace fino {

constexpr int kShareThreads = 1024;
constexpr double kSmallestDenominator = 1e-12;
constexpr double kEpsilon = 1.0 / (1 << 23);  // of fp32

struct OverlapShares {
  FinoOverlap overlaps[kFinoMaxFactors];
  int64_t stripes, groups, count;
};

// Grid: (factors) blocks of kShareThreads. A thread has every kShareThreads-th group.
__global__ void __launch_bounds__(kShareThreads) overlap_shares(OverlapShares a) {
  const FinoOverlap& overlap = a.overlaps[blockIdx.x];
  double signal = 0, rest = 0;
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
  signal = block_sum<kShareThreads>(signal);
  rest = block_sum<kShareThreads>(rest);

  const double total = signal + rest, noise = 256 * kEpsilon * kEpsilon * total;
  const bool preserve = overlap.preserve;
  // An S or U of the size of Z's rounding is zero: normalised, it would be a random direction.
  const double product = signal > noise && rest > noise ? signal * rest : 0.0;
  const bool defined = (preserve ? product : total) >= kSmallestDenominator;
  const bool swept = preserve && defined;
  for (int64_t group = threadIdx.x; group < overlap.groups; group += kShareThreads)
    overlap.factors[group] = swept ? float(sqrt(overlap.sizes[group] / signal)) : 0.0f;
  if (threadIdx.x != 0) return;

  const double share = preserve ? 1.0 : defined ? signal / total : 0.0;
  *overlap.share = float(share);
  double by_signal = 0, by_rest = 0;
  if (swept) {
    by_signal = 2 / signal;
    by_rest = 2 / rest;
  } else if (defined) {
    by_signal = 2 * (1 - share) / total;
    by_rest = -2 * share / total;
  }
  overlap.coefficients[0] = by_signal;  // of S
  overlap.coefficients[1] = by_rest;    // of U
  *overlap.scale = swept ? float(sqrt(double(a.count) / rest)) : 0.0f;
}

}  // namespace fino
