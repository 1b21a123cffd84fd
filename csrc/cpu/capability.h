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

}  // namespace fino
