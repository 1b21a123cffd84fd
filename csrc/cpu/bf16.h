#pragma once

#include <cstdint>

namespace fino {

// The upper half of a float.
struct Bf16 {
  uint16_t bits;
};

}  // namespace fino
