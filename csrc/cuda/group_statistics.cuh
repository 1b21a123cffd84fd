// Group statistics of the orthogonal terms: the embedding split into what a factor explains and the
// rest, for all factors in one launch.
//
// With Z the rows centred over those that take part, S = ΠZ is given by a matrix M: of a category,
// its mean; of continuous values with the orthonormal design Q, M = QᵀZ. U = Z − S is the rest.
//
// Everything but the sums of squares is separate by column. So a block takes a stripe of 32 columns,
// one a lane, and all rows of a factor: each of its warps a run of consecutive sorted rows. It visits
// them three times: for the mean, for M, for U; a stripe stays in the L2 cache meanwhile. Sums are in
// fp64, and have one fixed order.

#pragma once

#include <cassert>

#include "block.cuh"
#include "launch.h"

namespace fino {

constexpr int kRuns = 16;  // warps of a block
constexpr int kAhead = 8;  // rows that a warp loads before it uses the first
constexpr float kHalfMax = 65504;

template <typename T>
struct GroupStatistics {
  FinoFactor factors[kFinoMaxFactors];
  const T* z;  // [count, width]
  int64_t count, width, groups;
  int64_t first, local;  // rows of which U is wanted
};

// Of a block, in shared memory.
struct RunSums {
  double sum[kRuns][kWarp];  // of every run and column
  int begun[kRuns];          // groups that begin in the run
};

template <typename T>
class Stripe {
 public:
  __device__ Stripe(const GroupStatistics<T>& a, const FinoFactor& factor, RunSums& runs)
      : factor_(factor), rows_{factor.order, factor.labels, a.count}, width_(a.width),
        column_(int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp), present_(column_ < a.width),
        warp_(threadIdx.x / kWarp), lane_(threadIdx.x % kWarp), z_(a.z + column_),
        local_first_(a.first), local_count_(a.local),
        signal_(factor.squares + blockIdx.x * a.groups), rest_(signal_ + gridDim.x * a.groups),
        runs_(runs) {
    first_ = rows_.first_valid();
    const int64_t run = (a.count - first_ + kRuns - 1) / kRuns;
    begin_ = minimum(first_ + warp_ * run, a.count);
    end_ = minimum(begin_ + run, a.count);
  }

  __device__ void run() {
    skip_missing();
    center();
    if (factor_.basis == nullptr)
      group_means();
    else
      projections();
    remainder();
    clear();
  }

 private:
  __device__ static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
  __device__ bool writes_rows() const { return blockIdx.x == 0 && lane_ == 0; }

  // Rows that take no part may hold anything, and become zero.
  __device__ void skip_missing() {
    for (int64_t i = warp_; i < first_; i += kRuns) {
      const int64_t row = rows_.order[i];
      if (writes_rows()) factor_.group[row] = -1;
      enter_rest(row, 0);
    }
  }

  // An entry of U, in the type of z.
  __device__ void enter_rest(int64_t row, double value) {
    const int64_t local = row - local_first_;
    if (!present_ || factor_.rest == nullptr || local < 0 || local >= local_count_) return;
    T entry = T(float(value));
    // The difference of two numbers of fp16 may be too large for it.
    if (!isfinite(float(entry)) && isfinite(value)) entry = T(value > 0 ? kHalfMax : -kHalfMax);
    static_cast<T*>(factor_.rest)[local * width_ + column_] = entry;
  }

  // Visits the run: body(position, row, group, whether the group begins here, z − about(row, group)).
  template <typename About, typename Body>
  __device__ void each_row(About about, Body body) {
    int group = before_ - 1;
    for (int64_t base = begin_; base < end_; base += kAhead) {
      int64_t row[kAhead];
      double value[kAhead];
      int of[kAhead];
      bool begins[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const bool inside = base + a < end_;
        const int64_t i = inside ? base + a : end_ - 1;
        row[a] = rows_.order[i];
        begins[a] = rows_.begins(i);
        of[a] = group += inside && begins[a];
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        value[a] = present_ ? double(float(z_[row[a] * width_])) - about(row[a], of[a]) : 0.0;
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (base + a < end_) body(base + a, row[a], of[a], begins[a], value[a]);
    }
  }

  // The mean over all rows; how many groups there are, and begin before this run.
  __device__ void center() {
    double sum = 0;
    int begun = 0;
    each_row([](int64_t, int) { return 0.0; },
             [&](int64_t, int64_t, int, bool begins, double value) {
               sum += value;
               begun += begins;
             });
    if (lane_ == 0) runs_.begun[warp_] = begun;
    mean_ = over_runs(sum) / double(maximum_one(rows_.count - first_));
    before_ = 0, groups_ = 0;
    for (int other = 0; other < kRuns; ++other) {
      if (other < warp_) before_ += runs_.begun[other];
      groups_ += runs_.begun[other];
    }
    if (warp_ == 0 && present_) factor_.mean[column_] = mean_;
  }

  __device__ static int64_t maximum_one(int64_t a) { return a > 1 ? a : 1; }

  __device__ double over_runs(double sum) {
    runs_.sum[warp_][lane_] = sum;
    __syncthreads();
    double total = 0;
    for (int other = 0; other < kRuns; ++other) total += runs_.sum[other][lane_];
    __syncthreads();  // the next sum writes `sum` again
    return total;
  }

  // Sums term(row, group, z − about(row, group)) by group; done(group, size, sum) once for each, by
  // the warp in whose run it begins, which adds what following runs hold of it.
  template <typename About, typename Term, typename Done>
  __device__ void each_group(About about, Term term, Done done) {
    double sum = 0, front = 0;
    int group = before_ - 1;
    int64_t start = -1;
    each_row(about, [&](int64_t i, int64_t row, int of, bool begins, double value) {
      if (begins) {
        if (start >= 0)
          done(group, i - start, sum);
        else
          front = sum;
        sum = 0, start = i, group = of;
      }
      sum += term(row, of, value);
    });
    runs_.sum[warp_][lane_] = start >= 0 ? front : sum;
    __syncthreads();
    if (start >= 0) {
      for (int next = warp_ + 1; next < kRuns; ++next) {
        sum += runs_.sum[next][lane_];
        if (runs_.begun[next] > 0) break;
      }
      done(group, rows_.end(start) - start, sum);
    }
    __syncthreads();  // the next sums write `sum` again
  }

  // M of a category.
  __device__ void group_means() {
    // One category alone explains nothing; what rounding leaves of its mean is no direction.
    const bool several = groups_ > 1;
    each_group([&](int64_t, int) { return mean_; },
               [](int64_t, int, double value) { return value; },
               [&](int group, int64_t size, double sum) {
                 assert(group < factor_.groups);
                 const float mean = several ? float(sum / double(size)) : 0.0f;
                 enter_signal(group, float(size), mean);
               });
  }

  // M = QᵀZ.
  __device__ void projections() {
    for (int j = 0; j < factor_.groups; ++j) {
      double sum = 0;
      each_row([&](int64_t, int) { return mean_; },
               [&](int64_t, int64_t row, int, bool, double value) {
                 sum += factor_.basis[row * factor_.groups + j] * value;
               });
      sum = over_runs(sum);
      if (warp_ == 0) enter_signal(j, 1.0f, float(sum));
    }
    __syncthreads();  // all warps read M below
  }

  // Row `group` of M, and its share of ‖S‖².
  __device__ void enter_signal(int group, float size, float mean) {
    if (present_) factor_.means[int64_t(group) * width_ + column_] = mean;
    const double square = warp_sum(present_ ? double(size) * mean * mean : 0.0);
    if (lane_ == 0) signal_[group] = float(square);
    if (writes_rows()) factor_.sizes[group] = size;
  }

  // U, and the shares of ‖U‖²; continuous values have one group of all rows.
  __device__ void remainder() {
    each_group([&](int64_t row, int group) { return mean_ + explained(row, group); },
               [&](int64_t row, int group, double value) {
                 if (writes_rows()) factor_.group[row] = group;
                 enter_rest(row, value);
                 return value * value;
               },
               [&](int group, int64_t, double sum) {
                 sum = warp_sum(sum);
                 if (lane_ == 0) rest_[group] = float(sum);
               });
  }

  // The row of S.
  __device__ double explained(int64_t row, int group) const {
    if (factor_.basis == nullptr) return factor_.means[int64_t(group) * width_ + column_];
    double sum = 0;
    for (int64_t j = 0; j < factor_.groups; ++j)
      sum += factor_.basis[row * factor_.groups + j] * factor_.means[j * width_ + column_];
    return sum;
  }

  // What no group stands in.
  __device__ void clear() {
    const bool categories = factor_.basis == nullptr;
    for (int group = groups_ + warp_; group < factor_.groups; group += kRuns) {
      if (lane_ == 0) rest_[group] = 0;
      if (!categories) continue;
      if (present_) factor_.means[int64_t(group) * width_ + column_] = 0;
      if (lane_ == 0) signal_[group] = 0;
      if (writes_rows()) factor_.sizes[group] = 0;
    }
  }

  const FinoFactor& factor_;
  const SortedRows rows_;
  const int64_t width_, column_;
  const bool present_;
  const int warp_, lane_;
  const T* z_;
  const int64_t local_first_, local_count_;
  float *signal_, *rest_;  // by group, of this stripe
  RunSums& runs_;
  int64_t first_, begin_, end_;  // of the valid rows, and of this warp's run
  int before_ = 0, groups_ = 0;  // groups that begin before the run; all of them
  double mean_ = 0;
};

// Grid: (⌈width / 32⌉, factors) blocks of kRuns warps.
template <typename T>
__global__ void __launch_bounds__(kRuns * kWarp) group_statistics(GroupStatistics<T> a) {
  __shared__ RunSums runs;
  Stripe<T>(a, a.factors[blockIdx.y], runs).run();
}

}  // namespace fino
