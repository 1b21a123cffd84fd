// A view of an image: a box of it resized, flipped and normalised in one visit. Torch-free.
#pragma once

#include <cstdint>

namespace fino {

// Pixels as they were decoded: rows of `width` pixels of `channels` values, without gaps.
template <typename T>
struct Picture {
  const T* pixels;
  int64_t width, channels;
};

// Left, top and, excluded, right and bottom, in pixels.
struct Box {
  int64_t left, top, right, bottom;
};

// Writes out [planes, size, size] = (resized − shift[plane]) / divisor[plane], mirrored where asked for.
// One plane a channel, or any number of the only channel. Resized by the triangle filter that PIL and
// torch call antialiased bilinear: of the box alone, as wide as the step between output pixels but no
// narrower than two input pixels. T is uint8_t, uint16_t or float.
template <typename T>
void cut_view(const Picture<T>& picture, const Box& box, bool mirror_x, bool mirror_y, int64_t size,
              int64_t planes, const float* shift, const float* divisor, float* out);

}  // namespace fino
