// The launchers of csrc/cuda, callable from C; pointers are of device memory.

#pragma once

#include <cstdint>

extern "C" {

// Every row of z [count, width] becomes the mean of its label's rows; 0 where the label is −1.
// `order` sorts the rows by label, `labels` are the sorted labels. Returns a cudaError_t.
int fino_group_means(const float* z, const int64_t* order, const int64_t* labels, int64_t count,
                     int64_t width, float* out, void* stream);

// Moves the centroids [K, width] of the labels towards the rows of `teacher` [count, width];
// `scratch` is [count, width]. Returns a cudaError_t.
int fino_bank_update(const float* teacher, const int64_t* order, const int64_t* labels,
                     int64_t count, int64_t width, int64_t classes, float momentum, bool unit_norm,
                     float* centroids, float* temperatures, int64_t* counts, float* scratch,
                     void* stream);
}
