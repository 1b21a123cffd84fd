// The launchers of csrc/cuda, callable from C; pointers are of device memory.
//
// They return a cudaError_t and do not wait. Kernel arguments are limited to 4 KB: more factors or
// banks than one launch takes need several.

#pragma once

#include <cstdint>

extern "C" {

// What the runtime says of an error, for people.
const char* fino_error_string(int error);

// A metadata factor and its group statistics; see group_statistics.cuh.
struct FinoFactor {
  const int64_t* order;   // [count], sorts the rows by label
  const int64_t* labels;  // [count], the sorted labels; −1 is missing
  const double* basis;    // [count, groups] orthonormal columns Q, labels are 0 or −1; null: categories
  float* means;           // [groups, width], M
  float* sizes;           // [groups], rows of the category; 1 for a column of Q
  int64_t* group;         // [count], dense number of the row's category, −1 where it is missing
  double* mean;           // [width], over the rows that take part
  float* squares;         // [2, stripes, groups of all factors], ‖S‖² and ‖U‖² by stripe and group
  void* rest;             // [local, width] of the type of z, U; null where it is not wanted
  int64_t groups;         // rows of M: at least the number of categories in the batch
};

constexpr int64_t kFinoMaxFactors = 32;
constexpr int64_t kFinoStripe = 32;  // columns

enum FinoType : int64_t { kFinoFloat, kFinoHalf, kFinoBfloat16 };

// Splits z [count, width] of the given type by every factor; `groups` is the sum over the factors. U
// is wanted of the `local` rows from `first` on.
int fino_group_statistics(const FinoFactor* factors, int64_t factor_count, const void* z,
                          int64_t type, int64_t count, int64_t width, int64_t groups, int64_t first,
                          int64_t local, void* stream);

// What the term R of one factor needs of its sums; see overlap_shares.cuh.
struct FinoOverlap {
  const float* squares;  // as in FinoFactor, like the following
  const float* sizes;    // [groups]
  int64_t groups;
  float* sums;           // [2, groups of all factors], ‖S‖² and ‖U‖² by group
  float* factors;        // [groups] of M in the sweep
  float* scale;          // [], of U in the sweep
  float* share;          // [], R; 1 where a sweep gives it
  double* coefficients;  // [2], of the gradient: of S and of U
  bool preserve;         // it is swept
};

// Does so for all factors; `stripes`, `groups` and `count` as in fino_group_statistics.
int fino_overlap_shares(const FinoOverlap* overlaps, int64_t overlap_count, int64_t stripes,
                        int64_t groups, int64_t count, void* stream);

// What the gradient of one factor's term at z is made of; see overlap_gradient.cuh.
struct FinoOverlapGradient {
  const int64_t* group;        // [count], as in FinoFactor, like the following
  const double* basis;         // [count, groups] or null
  const double* mean;          // [width]
  const float* means;          // [groups, width], M
  const float* sizes;          // [groups]
  const void* at_rest;         // [count, width] of the type of z, the gradient at U, or null
  const float* at_means;       // [groups, width], the gradient at M, or null
  const double* coefficients;  // [2], of fino_overlap_shares
  const float* scale;          // [], the gradient at the share
  int64_t groups;
};

// The gradient at z [count, width] of the given type, summed over the factors.
int fino_overlap_gradient(const FinoOverlapGradient* overlaps, int64_t overlap_count, const void* z,
                          int64_t type, int64_t count, int64_t width, void* out, void* stream);

// A head or the contrastive term, and what the sweep has summed of its `count` rows in each of
// `splits` parts of its bank; see term_losses.cuh.
struct FinoTerm {
  const float* sums;       // four planes of [splits, count]
  const int32_t* best;     // [splits, count]
  const int64_t* labels;   // [count], −1 is missing; null: there are none
  const float* inv_count;  // []
  float* lse;              // [count]
  float* loss;             // [], like the following
  float* metric;
  float* weighted;         // the loss times `weight`
  int64_t splits, classes;
  double smoothing, weight;
  bool is_error;           // the third plane holds squared errors, and the others are of no use
};

constexpr int64_t kFinoMaxTerms = 32;

// Losses and metrics of all terms; planes are `plane` entries apart.
int fino_term_losses(const FinoTerm* terms, int64_t term_count, int64_t plane, int64_t count,
                     void* stream);

// A prototype bank and the rows that move it.
struct FinoBank {
  const int64_t* order;   // [count], sorts the rows by label
  const int64_t* labels;  // [count], the sorted labels; −1 is missing
  float* centroids;       // [classes, width]
  float* temperatures;    // [classes], φ
  int64_t* counts;        // [classes]
  float* scratch;         // [count, width]
  int64_t classes;
  float momentum;
  bool unit_norm;         // concentration="fixed": centroids are unit vectors, φ stays
};

constexpr int64_t kFinoMaxBanks = 32;

// Moves the centroids of the labels towards the rows of `teacher` [views, count, width], view by
// view.
int fino_bank_update(const FinoBank* banks, int64_t bank_count, const float* teacher,
                     int64_t views, int64_t count, int64_t width, void* stream);
}
