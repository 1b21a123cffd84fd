// Compiled once per level with -DFINO_LEVEL=<name> and that level's instruction-set flags.
//
// No standard templates here: an inline function emitted with AVX-512 instructions could be the copy
// that the linker keeps for everybody. Everything has internal linkage but the two tables.

#include "epilogues.h"

#include <math.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fino {
namespace FINO_LEVEL {

extern const Epilogues<float> table_f32;
extern const Epilogues<double> table_f64;

namespace {

// exp for |result| in the normal range, below it 0, above it inf, NaN stays NaN; within 2 ulp.
// Cody–Waite reduction x = n·ln 2 + r, |r| ≤ ln 2 / 2, a degree-6 polynomial in r (Cephes), and n
// added to the exponent bits. Branch-free, so that the loops around it are vectorised.
inline float exp_of(float x) {
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer in the low bits
  float clamped = x > 88.72f ? 88.72f : x;
  clamped = clamped < -87.33f ? -87.33f : clamped;
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n = 128 alone would overflow the exponent.
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const int32_t exponent = bits - 0x4B400000;
  const int32_t half = exponent >> 1;
  const int32_t first = (half + 127) << 23;
  const int32_t second = (exponent - half + 127) << 23;
  float scale_first, scale_second;
  __builtin_memcpy(&scale_first, &first, sizeof first);
  __builtin_memcpy(&scale_second, &second, sizeof second);
  float result = p * scale_first * scale_second;
  result = x < -87.33f ? 0.0f : result;
  return x > 88.72f ? __builtin_inff() : result;
}

inline double exp_of(double x) { return ::exp(x); }

// 2^x for −126 ≤ x ≤ 1, NaN stays NaN; within 2 ulp. In this range no
// clamp is needed and one factor holds 2^n: half the instructions of `exp_of`. The polynomial has the
// least largest relative error on |r| ≤ 1/2 (2e-9; iterated weighted least squares).
inline float exp2_bounded(float x) {
  const float magic = 12582912.0f;
  const float shifted = x + magic;
  const float r = x - (shifted - magic);
  float p = 1.534581160e-4f;
  p = p * r + 1.339993122e-3f;
  p = p * r + 9.618488959e-3f;
  p = p * r + 5.550328777e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  p = p * r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3F800000u;  // the magic number's own bits leave at the top
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline double exp2_bounded(double x) { return ::exp2(x); }
inline float log_of(float x) { return ::logf(x); }
inline double log_of(double x) { return ::log(x); }
inline float root_of(float x) { return ::sqrtf(x); }
inline double root_of(double x) { return ::sqrt(x); }

// A share of less than 1e-30 of the largest term is below the precision of every sum here. As an
// exact zero it costs the products that follow nothing; as a subnormal number it would cost a
// hundred cycles each.
constexpr double negligible = -69;

template <typename T>
inline T lowest();
template <>
inline float lowest<float>() {
  return -__FLT_MAX__;
}
template <>
inline double lowest<double>() {
  return -__DBL_MAX__;
}

template <typename T>
T normalize(const T* x, T* out, int64_t n, T eps) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < n; ++k) square += x[k] * x[k];
  const T norm = root_of(square);
  const T inverse = T(1) / (norm < eps ? eps : norm);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] = x[k] * inverse;
  return norm;
}

template <typename T>
T normalize_backward(T* g, const T* unit, int64_t n, T norm, T eps) {
  T along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t k = 0; k < n; ++k) along += g[k] * unit[k];
  // Below eps the norm is a constant of the forward pass.
  const T radial = norm < eps ? T(0) : along;
  const T inverse = T(1) / (norm < eps ? eps : norm);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) g[k] = (g[k] - radial * unit[k]) * inverse;
  return along;
}

constexpr double log2_e = 1.4426950408889634;

template <typename T>
void pair_sums(const T* tile, int64_t rows, int64_t cols, T scale, bool diagonal, T* row_sums,
               T* col_sums) {
  const T slope = scale * T(log2_e);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = tile + i * cols;
    T sum = 0;
    if (diagonal) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) sum += j == i ? T(0) : exp2_bounded(row[j] * slope - slope);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) {
        const T e = exp2_bounded(row[j] * slope - slope);
        sum += e;
        col_sums[j] += e;
      }
    }
    row_sums[i] += sum;
  }
}

template <typename T>
void pair_weights(T* tile, int64_t rows, int64_t cols, T scale, bool diagonal, const T* row_inverse,
                  const T* col_inverse) {
  const T slope = scale * T(log2_e);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = tile + i * cols;
    const T inverse = row_inverse[i];
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j)
      row[j] = exp2_bounded(row[j] * slope - slope) * (inverse + col_inverse[j]);
    if (diagonal) row[i] = 0;
  }
}

template <typename T>
T largest(const T* x, int64_t n) {
  T top = lowest<T>();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < n; ++k) top = x[k] > top ? x[k] : top;
  return top;
}

// logsumexp of scale·c over a stretch without a gap, as a pair (top, Σ exp(scale·c − top)).
template <typename T>
void stretch(const T* cosines, int64_t n, T scale, T& top, T& sum) {
  if (n <= 0) return;
  const T here = largest(cosines, n) * scale;
  T part = 0;
  const T reference = here > top ? here : top;
#pragma omp simd reduction(+ : part)
  for (int64_t k = 0; k < n; ++k) part += exp_of(cosines[k] * scale - reference);
  sum = sum * exp_of(top - reference) + part;
  top = reference;
}

template <typename T>
T row_logsumexp(const T* cosines, int64_t n, T scale, int64_t skip) {
  T top = lowest<T>(), sum = 0;
  if (skip < 0) {
    stretch(cosines, n, scale, top, sum);
  } else {
    stretch(cosines, skip, scale, top, sum);
    stretch(cosines + skip + 1, n - skip - 1, scale, top, sum);
  }
  return top + log_of(sum);
}

template <typename T>
void row_weights(T* cosines, int64_t n, T scale, int64_t skip, T lse, const T* lse_columns) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T logit = cosines[j] * scale;
    cosines[j] = exp_of(logit - lse) + exp_of(logit - lse_columns[j]);
  }
  if (skip >= 0) cosines[skip] = 0;
}

template <typename T>
RowLoss<T> cross_entropy(T* row, int64_t n, const T* scale, const T* offset, int64_t target,
                         T smoothing, T weight, bool gradient) {
  T top = lowest<T>(), total = 0;
  if (scale != nullptr) {
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) {
      row[k] = row[k] * scale[k] + offset[k];
      top = row[k] > top ? row[k] : top;
    }
  } else {
#pragma omp simd reduction(max : top) reduction(+ : total)
    for (int64_t k = 0; k < n; ++k) {
      row[k] += offset[k];
      total += row[k];
      top = row[k] > top ? row[k] : top;
    }
  }
  const T own = row[target];
  // A tie goes to the first class, as argmax has it.
  bool hit = own == top;
  for (int64_t k = 0; hit && k < target; ++k) hit = row[k] < top;

  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const T below = row[k] - top;
    row[k] = below < T(negligible) ? T(0) : exp_of(below);
    sum += row[k];
  }
  T loss = top + log_of(sum) - (1 - smoothing) * own;
  if (smoothing != 0) loss -= smoothing / n * total;
  if (gradient) {
    const T softmax = weight / sum, uniform = weight * smoothing / n;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) row[k] = row[k] * softmax - uniform;
    row[target] -= weight * (1 - smoothing);
    if (scale != nullptr) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) row[k] *= scale[k];
    }
  }
  return {loss, hit ? T(1) : T(0)};
}

// Few values a row: libm's functions, which are exact near 0 too.
template <typename T>
T activate(T x, Activation activation, T& slope) {
  if (activation == Activation::sigmoid) {
    const T y = T(1) / (T(1) + T(::exp(-double(x))));
    slope = y * (1 - y);
    return y;
  }
  if (activation == Activation::tanh) {
    const T y = T(::tanh(double(x)));
    slope = 1 - y * y;
    return y;
  }
  slope = 1;
  return x;
}

template <typename T>
RowLoss<T> squared_error(T* row, int64_t n, const T* offset, const T* target, Activation activation,
                         T weight, bool gradient) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    T slope;
    const T prediction = activate(row[k] + offset[k], activation, slope);
    const bool observed = target[k] == target[k];
    const T error = observed ? prediction - target[k] : T(0);
    sum += double(error) * error;
    if (gradient) row[k] = observed ? 2 * error * slope * weight : T(0);
  }
  return {T(sum), T(sum)};
}

template <typename T>
void extend(T* row, const T* offset, int64_t n, int64_t first, RunningLogits<T>& running) {
  T here = lowest<T>(), total = 0;
#pragma omp simd reduction(max : here) reduction(+ : total)
  for (int64_t k = 0; k < n; ++k) {
    row[k] += offset[k];
    total += row[k];
    here = row[k] > here ? row[k] : here;
  }
  running.total += total;
  if (here > running.top) {
    int64_t k = 0;
    while (row[k] != here) ++k;
    running.best = first + k;
    running.sum *= exp_of(running.top - here);
    running.top = here;
  }
  const T top = running.top;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += exp_of(row[k] - top);
  running.sum += sum;
}

template <typename T>
void softmax_gradient(T* row, const T* offset, int64_t n, T lse, T weight, T uniform) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T below = row[k] + offset[k] - lse;
    row[k] = (below < T(negligible) ? T(0) : weight * exp_of(below)) - uniform;
  }
}

template <typename T>
void scaled(const T* x, T scale, bool accumulate, T* out, int64_t n) {
  if (accumulate) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] += scale * x[k];
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = scale * x[k];
  }
}

inline uint16_t narrowed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  // A NaN must not round to infinity.
  return static_cast<uint16_t>(value == value ? rounded >> 16 : 0x7FC0u);
}

template <typename T>
void narrow(const T* x, Bf16* out, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k].bits = narrowed(float(x[k]));
}

#ifdef __AVX512BF16__
template <>
void narrow<float>(const float* x, Bf16* out, int64_t n) {
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
    const __m256bh low = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
    __builtin_memcpy(out + k, &low, sizeof low);
  }
  for (; k < n; ++k) out[k].bits = narrowed(x[k]);
}
#endif

void interleave(const Bf16* x, const Bf16* y, Bf16* out, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    out[2 * k] = x[k];
    out[2 * k + 1] = y[k];
  }
}

void transpose_words(const char* x, int64_t rows, int64_t cols, int64_t ld, char* out,
                     int64_t ld_out) {
  constexpr int64_t word = 4;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      __builtin_memcpy(out + (j * ld_out + i) * word, x + (i * ld + j) * word, word);
}

void transpose(const void* x, int64_t rows, int64_t cols, int64_t ld, void* out, int64_t ld_out) {
  const auto from = [&](int64_t i, int64_t j) { return static_cast<const char*>(x) + (i * ld + j) * 4; };
  const auto to = [&](int64_t j, int64_t i) { return static_cast<char*>(out) + (j * ld_out + i) * 4; };
  int64_t whole_rows = 0, whole_cols = 0;
#ifdef __SSE2__
  whole_rows = rows / 4 * 4;
  whole_cols = cols / 4 * 4;
  const auto load = [&](int64_t i, int64_t j) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from(i, j)));
  };
  const auto store = [&](int64_t j, int64_t i, __m128i four) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to(j, i)), four);
  };
  for (int64_t j = 0; j < whole_cols; j += 4)
    for (int64_t i = 0; i < whole_rows; i += 4) {
      const __m128i a = load(i, j), b = load(i + 1, j), c = load(i + 2, j), d = load(i + 3, j);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i rest_ab = _mm_unpackhi_epi32(a, b), rest_cd = _mm_unpackhi_epi32(c, d);
      store(j, i, _mm_unpacklo_epi64(ab, cd));
      store(j + 1, i, _mm_unpackhi_epi64(ab, cd));
      store(j + 2, i, _mm_unpacklo_epi64(rest_ab, rest_cd));
      store(j + 3, i, _mm_unpackhi_epi64(rest_ab, rest_cd));
    }
#endif
  transpose_words(from(0, whole_cols), whole_rows, cols - whole_cols, ld, to(whole_cols, 0), ld_out);
  transpose_words(from(whole_rows, 0), rows - whole_rows, cols, ld, to(0, whole_rows), ld_out);
}

template <typename T>
T difference(const T* x, const T* y, T* out, int64_t n) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < n; ++k) {
    const T value = x[k] - y[k];
    out[k] = value;
    square += value * value;
  }
  return square;
}

template <typename T>
T dot(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += x[k] * y[k];
  return sum;
}

template <typename T>
T weighted_squares(const T* x, const T* weight, int64_t n) {
  T sum = 0;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += x[k] * x[k];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += weight[k] * x[k] * x[k];
  }
  return sum;
}

template <typename T>
void combine(T* g, const T* u, const T* v, T a, T b, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) g[k] *= a;
  if (u != nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) g[k] += b * u[k];
  }
  if (v != nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) g[k] += v[k];
  }
}

template <typename T>
constexpr Epilogues<T> table() {
  return {normalize<T>,     normalize_backward<T>, pair_sums<T>,     pair_weights<T>,
          row_logsumexp<T>, row_weights<T>,        cross_entropy<T>, squared_error<T>,
          extend<T>,        softmax_gradient<T>,   scaled<T>,        narrow<T>,
          interleave,       transpose,             difference<T>,    dot<T>,
          weighted_squares<T>, combine<T>};
}

}  // namespace

const Epilogues<float> table_f32 = table<float>();
const Epilogues<double> table_f64 = table<double>();

}  // namespace FINO_LEVEL
}  // namespace fino
