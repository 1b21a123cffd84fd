// Which instruction-set level the kernels run at.
#pragma once

#include <string>
#include <vector>

namespace fino {

// Levels in this binary that this processor can run, lowest first.
std::vector<std::string> capabilities();

// The level in use: the highest, or the one that FINO_CPU_CAPABILITY named when it was first asked
// for. Throws std::runtime_error where that one cannot run here.
const std::string& capability();

// Whether bf16 rows are multiplied as they are: by default at the level that has instructions for it.
// Elsewhere the library widens them at no gain, and products in fp32 lose less.
bool multiplies_bf16();
enum class Bf16Products { by_level, never, always };
void choose_bf16_products(Bf16Products choice);

}  // namespace fino
