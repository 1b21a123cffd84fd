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

// Whether the level in use has instructions that multiply bf16.
bool has_bf16_instructions();

// When bf16 rows are multiplied as they are. By default where that is faster: elsewhere they are
// widened at no gain, and products in fp32 lose less.
enum class Bf16Products { by_level, never, always };
Bf16Products bf16_products();
void choose_bf16_products(Bf16Products choice);

}  // namespace fino
