// The launchers of csrc/cuda, callable from C; pointers are of device memory.

#pragma once

#include <cstdint>

extern "C" {

// Every row of z [count, width] becomes the mean of its label's rows; 0 where the label is −1.
// `order` sorts the rows by label, `labels` are the sorted labels. Returns a cudaError_t.
int fino_group_means(const float* z, const int64_t* order, const int64_t* labels, int64_t count,
                     int64_t width, float* out, void* stream);

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

// Kernel arguments are limited to 4 KB; more banks take more launches.
constexpr int64_t kFinoMaxBanks = 32;

// Moves the centroids of the labels towards the rows of `teacher` [views, count, width], view by
// view. Returns a cudaError_t.
int fino_bank_update(const FinoBank* banks, int64_t bank_count, const float* teacher,
                     int64_t views, int64_t count, int64_t width, void* stream);
}
