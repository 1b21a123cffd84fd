#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "epilogues.h"

namespace fino {

#define FINO_DECLARE_LEVEL(level) \
  namespace level {               \
  extern const Epilogues<float> table_f32;  \
  extern const Epilogues<double> table_f64; \
  }
FINO_DECLARE_LEVEL(baseline)
#ifdef FINO_HAVE_AVX2
FINO_DECLARE_LEVEL(avx2)
#endif
#ifdef FINO_HAVE_AVX512
FINO_DECLARE_LEVEL(avx512)
#endif
#ifdef FINO_HAVE_AVX512_BF16
FINO_DECLARE_LEVEL(avx512_bf16)
#endif

namespace {

struct Level {
  const char* name;
  bool runs;
  bool multiplies_bf16;
  const Epilogues<float>* f32;
  const Epilogues<double>* f64;
};

const std::vector<Level>& levels() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const std::vector<Level> all = {
      {"baseline", true, false, &baseline::table_f32, &baseline::table_f64},
#ifdef FINO_HAVE_AVX2
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), false,
       &avx2::table_f32, &avx2::table_f64},
#endif
#ifdef FINO_HAVE_AVX512
      {"avx512", avx512, false, &avx512::table_f32, &avx512::table_f64},
#endif
#ifdef FINO_HAVE_AVX512_BF16
      {"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), true, &avx512_bf16::table_f32,
       &avx512_bf16::table_f64},
#endif
  };
  return all;
}

const Level& choose() {
  const char* forced = std::getenv("FINO_CPU_CAPABILITY");
  const Level* best = nullptr;
  std::string runnable;
  for (const Level& level : levels()) {
    if (!level.runs) continue;
    runnable += (runnable.empty() ? "" : ", ") + std::string(level.name);
    if (forced == nullptr || std::string(forced) == level.name) best = &level;
  }
  if (best == nullptr)
    throw std::runtime_error("FINO_CPU_CAPABILITY=" + std::string(forced) +
                             ": this processor and binary offer " + runnable);
  return *best;
}

std::atomic<Bf16Products> chosen_products{Bf16Products::by_level};

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.runs) names.emplace_back(level.name);
  return names;
}

const std::string& capability() {
  static const std::string name = chosen().name;
  return name;
}

bool has_bf16_instructions() { return chosen().multiplies_bf16; }

Bf16Products bf16_products() { return chosen_products; }

void choose_bf16_products(Bf16Products choice) { chosen_products = choice; }

template <>
const Epilogues<float>& epilogues<float>() {
  return *chosen().f32;
}

template <>
const Epilogues<double>& epilogues<double>() {
  return *chosen().f64;
}

}  // namespace fino
