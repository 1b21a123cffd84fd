// The torch-free kernels on buffers of exactly the size they may touch, for the sanitizers, against
// loops that follow the formulas. Prints the largest error; exits non-zero where it is too large.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/bf16_product.h"
#include "cpu/capability.h"
#include "cpu/contrastive.h"
#include "cpu/heads.h"
#include "cpu/orthogonal.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/views.h"
#include "cpu/wide_head.h"

namespace {

using Vector = std::vector<double>;

template <typename P>
double widened(P x) {
  if constexpr (std::is_same_v<P, fino::Bf16>) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return x;
  }
}

template <typename T, typename P>
void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, T alpha, const P* a, int64_t lda,
          const P* b, int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += widened(ta ? a[l * lda + i] : a[i * lda + l]) *
               widened(tb ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = T(alpha * sum + (accumulate ? c[i * ldc + j] : 0));
    }
}

// Two pieces, so that a boundary falls somewhere.
void in_two(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 1) body(0, n / 2);
  body(n > 1 ? n / 2 : 0, n);
}

void on_three_threads(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  std::exception_ptr error;
  std::mutex mutex;
  const auto piece = [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) threads.emplace_back(piece, n * t / 3, n * (t + 1) / 3);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

template <typename T, typename P = T>
const fino::Runtime<T, P> runtime = {gemm<T, P>, in_two};

// x as operand of the products, and what became of its numbers.
template <typename T, typename P>
std::vector<P> operand(std::vector<T>& x) {
  std::vector<P> result(x.size());
  if constexpr (std::is_same_v<P, fino::Bf16>) {
    fino::epilogues<T>().narrow(x.data(), result.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) x[i] = T(widened(result[i]));
  } else {
    result = x;
  }
  return result;
}

double worst = 0;

void compare(double found, double expected) {
  const double error = std::abs(found - expected) / (1 + std::abs(expected));
  if (!(error <= worst)) worst = error;  // NaN too
}

template <typename T>
std::vector<T> random(std::mt19937& generator, int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = T(normal(generator));
  return values;
}

template <typename T>
void check_positives(const std::vector<T>& unit, const std::vector<T>& norms, int64_t views,
                     int64_t images, int64_t d, std::vector<T> g) {
  const double factor = 0.3;
  const std::vector<T> sums = g;
  const fino::Positives found = fino::positives<T>(in_two, unit.data(), norms.data(), views, images, d,
                                                   factor, g.data());
  double cosines = 0, all_along = 0;
  for (int64_t i = 0; i < views * images; ++i) {
    Vector pulled(d);
    double along = 0;
    for (int64_t l = 0; l < d; ++l) {
      double others = 0;
      for (int64_t view = 0; view < views; ++view)
        if (view != i / images) others += unit[(view * images + i % images) * d + l];
      cosines += others * unit[i * d + l];
      pulled[l] = factor * (sums[i * d + l] - 2 * others / (views - 1));
      along += pulled[l] * unit[i * d + l];
    }
    all_along += along;
    for (int64_t l = 0; l < d; ++l)
      compare(g[i * d + l], (pulled[l] - along * unit[i * d + l]) / norms[i]);
  }
  compare(found.cosines, cosines);
  compare(found.along, all_along);
  std::vector<T> none;
  compare(fino::positives<T>(in_two, unit.data(), norms.data(), views, images, d, factor, none.data())
              .cosines,
          cosines);
}

template <typename T, typename P>
void check_contrastive(std::mt19937& generator, int64_t n, int64_t d, double scale, bool towers) {
  const std::vector<T> x = random<T>(generator, n * d);
  std::vector<T> unit(n * d), norms(n), lse(n), lse_cross(n), g(n * d, NAN), g_cross(n * d);
  fino::normalize_rows(in_two, x.data(), n, d, unit.data(), norms.data());
  const std::vector<P> rows = operand<T, P>(unit);
  const fino::Runtime<T, P>& host = runtime<T, P>;
  const auto meet = [&](int64_t i, int64_t j) {
    return towers ? (i < n / 2) != (j < n / 2) : i != j;
  };
  if (towers) {
    for (const int64_t tower : {int64_t{0}, n / 2}) {
      const P* other = rows.data() + (n / 2 - tower) * d;
      fino::cross_logsumexp<T, P>(host, rows.data() + tower * d, n / 2, other, n / 2, d, T(scale),
                                  -1, lse_cross.data() + tower);
    }
    for (const int64_t tower : {int64_t{0}, n / 2}) {
      const P* other = rows.data() + (n / 2 - tower) * d;
      fino::cross_gradient<T, P>(host, rows.data() + tower * d, n / 2, other, n / 2, d, T(scale), -1,
                                 lse_cross.data() + tower, lse_cross.data() + n / 2 - tower,
                                 g_cross.data() + tower * d);
    }
  } else {
    fino::cross_logsumexp<T, P>(host, rows.data(), n, rows.data(), n, d, T(scale), 0,
                                lse_cross.data());
    fino::cross_gradient<T, P>(host, rows.data(), n, rows.data(), n, d, T(scale), 0,
                               lse_cross.data(), lse_cross.data(), g_cross.data());
  }
  if (scale <= fino::max_bounded_scale) {
    fino::pair_terms<T, P>(host, rows.data(), n, d, T(scale), towers, lse.data(), g.data());
  } else {
    lse = lse_cross;
    g = g_cross;
  }
  Vector s(n * n), expected(n);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      double dot = 0;
      for (int64_t l = 0; l < d; ++l) dot += double(unit[i * d + l]) * unit[j * d + l];
      s[i * n + j] = scale * dot;
      if (meet(i, j)) sum += std::exp(scale * dot - scale);
    }
    expected[i] = scale + std::log(sum);
    compare(lse[i], expected[i]);
    compare(lse_cross[i], expected[i]);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < d; ++l) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j)
        if (meet(i, j))
          sum += (std::exp(s[i * n + j] - expected[i]) + std::exp(s[i * n + j] - expected[j])) *
                 unit[j * d + l];
      compare(g[i * d + l], sum);
      compare(g_cross[i * d + l], sum);
    }
  if (n % 2 == 0) check_positives(unit, norms, 2, n / 2, d, g);
  if (n > 1) check_positives(unit, norms, n, 1, d, g_cross);
}

// The sweep that holds a bank's gradient, and the one that does not.
template <typename T, typename P>
void check_cross_entropy(std::mt19937& generator, int64_t n, int64_t d, int64_t k, bool prototype) {
  std::vector<T> x = random<T>(generator, n * d), bank = random<T>(generator, k * d);
  std::vector<T> offset = random<T>(generator, k), scale(k, T(0.7)), norms(n), unit = x;
  std::vector<int64_t> target(n);
  for (int64_t& t : target) t = int64_t(generator() % (k + 1)) - 1;
  if (prototype && k > 1) {  // class 0 has not been seen
    scale[0] = 0;
    offset[0] = std::numeric_limits<T>::lowest();
    for (int64_t& t : target) t = t == 0 ? -1 : t;
  }
  if (prototype) fino::normalize_rows(in_two, x.data(), n, d, unit.data(), norms.data());
  const std::vector<P> bank_operand = operand<T, P>(bank);
  operand<T, P>(unit);
  const T smoothing = prototype ? T(0) : T(0.1), weight = T(0.25), guidance = T(-0.5);
  std::vector<T> grad_x(n * d, T(1)), grad_bank(k * d), grad_offset(k, 0);
  fino::Head<T, P> head{};
  head.kind = prototype ? fino::HeadKind::prototype : fino::HeadKind::linear;
  head.rows = [&](int64_t first, int64_t count, T* buffer) {
    if (prototype) return std::as_const(x).data() + first * d;  // where they are
    std::copy_n(x.data() + first * d, count * d, buffer);
    return static_cast<const T*>(buffer);
  };
  head.bank = bank_operand.data();
  head.scale = prototype ? scale.data() : nullptr;
  head.offset = offset.data();
  head.target = target.data();
  head.n = n, head.k = k, head.d = d;
  head.smoothing = smoothing, head.weight = weight, head.guidance = guidance;
  head.grad_x = grad_x.data();
  head.accumulate = true;
  head.grad_bank = grad_bank.data();
  head.grad_offset = grad_offset.data();
  const fino::RowLoss<double> sum = fino::head_sweep(runtime<T, P>, head);

  double loss = 0;
  Vector gx(n * d, 0), gb(k * d, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (target[i] < 0) continue;
    Vector logits(k);
    double total = 0, mean = 0;
    for (int64_t c = 0; c < k; ++c) {
      double dot = 0;
      for (int64_t l = 0; l < d; ++l) dot += double(unit[i * d + l]) * bank[c * d + l];
      logits[c] = dot * (prototype ? scale[c] : 1) + offset[c];
      total += std::exp(logits[c]);
      mean += logits[c] / double(k);
    }
    loss += std::log(total) - (1 - smoothing) * logits[target[i]] -
            (smoothing != 0 ? smoothing * mean : 0);
    for (int64_t c = 0; c < k; ++c) {
      const double g = weight * (prototype ? scale[c] : 1) *
                       (std::exp(logits[c]) / total - (c == target[i] ? 1 - smoothing : 0) -
                        smoothing / double(k));
      for (int64_t l = 0; l < d; ++l) {
        gx[i * d + l] += g * bank[c * d + l];
        gb[c * d + l] += g * unit[i * d + l];
      }
    }
  }
  compare(sum.loss, loss);
  for (int64_t i = 0; i < k * d; ++i) compare(grad_bank[i], gb[i]);
  for (int64_t i = 0; i < n; ++i) {  // gx is the gradient at the unit rows of a prototype head
    double along = 0;
    for (int64_t l = 0; l < d; ++l) along += prototype ? gx[i * d + l] * unit[i * d + l] : 0;
    for (int64_t l = 0; l < d; ++l)
      compare(grad_x[i * d + l],
              1 + guidance * (gx[i * d + l] - along * unit[i * d + l]) / (prototype ? norms[i] : 1));
  }
  if (prototype) return;

  const fino::WideHead<T, P> wide{head.rows, bank_operand.data(), offset.data(), target.data(),
                                  n,         k,                   d,             smoothing};
  std::vector<T> lse(n), wide_x(n * d), wide_bank(k * d), wide_offset(k);
  const fino::RowLoss<double> again = fino::wide_head_loss(runtime<T, P>, wide, lse.data());
  compare(again.loss, loss);
  if (again.metric != sum.metric) worst = std::numeric_limits<double>::infinity();
  fino::wide_head_gradient(runtime<T, P>, wide, lse.data(), weight, wide_x.data(), wide_bank.data(),
                           wide_offset.data());
  for (int64_t i = 0; i < n * d; ++i) compare(wide_x[i], gx[i]);
  for (int64_t i = 0; i < k * d; ++i) compare(wide_bank[i], gb[i]);
  for (int64_t i = 0; i < k; ++i) compare(wide_offset[i], grad_offset[i]);
}

// The value against loops over Z, S = E M and U, the gradient against differences of the value.
template <typename T>
void check_orthogonal(std::mt19937& generator, int64_t n, int64_t d, int64_t k, bool categories,
                      fino::Overlap overlap) {
  std::vector<T> z = random<T>(generator, n * d), size(k, T(1)), basis;
  std::vector<int64_t> slot(n);
  if (categories) {
    std::fill(size.begin(), size.end(), T(0));
    for (int64_t i = 0; i < n; ++i) {
      slot[i] = i < k ? i : int64_t(generator() % (k + 1)) - 1;
      if (slot[i] >= 0) size[slot[i]] += 1;
    }
  } else {  // columns that do not meet are orthogonal; centred pairs (+, −)
    basis.assign(n * k, T(0));
    for (int64_t g = 0; g < k; ++g) {
      basis[2 * g * k + g] = T(std::sqrt(0.5));
      basis[(2 * g + 1) * k + g] = T(-std::sqrt(0.5));
    }
    for (int64_t g = 0; g < k; ++g) basis[(n - 1) * k + g] = std::numeric_limits<T>::quiet_NaN();
  }
  const fino::Projector<T> projector{categories ? slot.data() : nullptr,
                                     categories ? nullptr : basis.data(), size.data(), k};
  const auto part = [&](int64_t i) { return categories ? slot[i] >= 0 : i + 1 < n; };
  const auto expected = [&](const std::vector<T>& rows) {
    Vector mean(d, 0), means(k * d, 0), s(n * d, 0), u(n * d, 0);
    double valid = 0, signal = 0, rest = 0, overlap_sum = 0, total = 0;
    for (int64_t i = 0; i < n; ++i)
      if (part(i)) {
        ++valid;
        for (int64_t l = 0; l < d; ++l) mean[l] += rows[i * d + l];
      }
    const auto entry = [&](int64_t i, int64_t g) {
      return categories ? double(slot[i] == g) : double(basis[i * k + g]);
    };
    for (int64_t i = 0; i < n; ++i)
      for (int64_t g = 0; part(i) && g < k; ++g)
        for (int64_t l = 0; l < d; ++l)
          means[g * d + l] += entry(i, g) * (rows[i * d + l] - mean[l] / valid) / double(size[g]);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t l = 0; part(i) && l < d; ++l) {
        for (int64_t g = 0; g < k; ++g) s[i * d + l] += entry(i, g) * means[g * d + l];
        const double centred = rows[i * d + l] - mean[l] / valid;
        u[i * d + l] = centred - s[i * d + l];
        signal += s[i * d + l] * s[i * d + l];
        rest += u[i * d + l] * u[i * d + l];
        total += centred * centred;
      }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double dot = 0;
        for (int64_t l = 0; l < d; ++l) dot += s[i * d + l] * u[j * d + l];
        overlap_sum += dot * dot;
      }
    return overlap == fino::Overlap::explained ? signal / total : overlap_sum / (signal * rest);
  };
  std::vector<T> grad(n * d, T(1));
  const fino::Rows<T> rows = [&](int64_t, int64_t, T* buffer) {
    if (categories) return std::as_const(z).data();  // where they are
    std::copy(z.begin(), z.end(), buffer);
    return static_cast<const T*>(buffer);
  };
  compare(fino::orthogonal(runtime<T>, rows, n, d, projector, overlap, T(0.5), grad.data()),
          expected(z));
  if (sizeof(T) < 8) return;
  for (int64_t e = 0; e < n * d; e += 1 + n * d / 7) {
    const T at = z[e], step = T(1e-5);
    z[e] = at + step;
    const double above = expected(z);
    z[e] = at - step;
    const double below = expected(z);
    z[e] = at;
    const double slope = (above - below) / (2 * step);
    if (!(std::abs(slope - 2 * (grad[e] - 1)) < 1e-8)) worst = std::numeric_limits<double>::infinity();
  }
}

// On real threads: the same result as on one, and an exception of one thread ends the others too.
void check_threads(std::mt19937& generator) {
  static std::atomic<int> products{0}, last{0};
  fino::Runtime<float> threaded = runtime<float>;
  threaded.parallel = on_three_threads;
  threaded.gemm = [](bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                     int64_t lda, const float* b, int64_t ldb, bool accumulate, float* c,
                     int64_t ldc) {
    if (++products == last) throw std::bad_alloc();
    gemm<float, float>(ta, tb, m, n, k, alpha, a, lda, b, ldb, accumulate, c, ldc);
  };
  const int64_t n = 3700, d = 1;  // more tiles than are kept for the second visit
  const std::vector<float> x = random<float>(generator, n * d);
  std::vector<float> unit(n * d), norms(n);
  fino::normalize_rows(in_two, x.data(), n, d, unit.data(), norms.data());
  const auto pairs = [&](const fino::Runtime<float>& host) {
    std::vector<float> result(n + n * d);  // log-sum-exps and gradients
    fino::pair_terms<float, float>(host, unit.data(), n, d, 10, false, result.data(),
                                   result.data() + n);
    return result;
  };
  if (pairs(threaded) != pairs(runtime<float>)) worst = std::numeric_limits<double>::infinity();
  last = products + 5;
  try {
    pairs(threaded);
    worst = std::numeric_limits<double>::infinity();  // it must not pass in silence
  } catch (const std::bad_alloc&) {
  }
}

// A kept block belongs to one thread at a time, and is at least as large as it was asked for.
void check_scratch() {
  const auto use = [](int64_t own) {
    for (int64_t round = 0; round < 40; ++round) {
      const int64_t count = (300 + 50 * ((own + round) % 5)) * int64_t{1024};
      const auto block = fino::scratch<int32_t>(count), other = fino::scratch<int32_t>(count / 2);
      for (int64_t i = 0; i < count; i += 509) block[i] = int32_t(own);
      other[0] = other[count / 2 - 1] = -1;
      for (int64_t i = 0; i < count; i += 509)
        if (block[i] != own) std::abort();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t own = 0; own < 3; ++own) threads.emplace_back(use, own);
  for (std::thread& thread : threads) thread.join();
  const size_t kept = fino::release_scratch();
  if (kept == 0 || kept > fino::most_kept_bytes || fino::release_scratch() != 0) std::abort();
  // More than is kept: the oldest go.
  std::vector<fino::Scratch<char>> blocks;
  for (int i = 0; i < 20; ++i) blocks.push_back(fino::scratch<char>(int64_t{7} << 20));
  blocks.push_back(fino::scratch<char>(fino::most_kept_bytes + 1));
  blocks.clear();
  if (fino::release_scratch() > fino::most_kept_bytes) std::abort();
}

template <typename T, typename P = T>
void check_sweeps() {
  std::mt19937 generator(0);
  for (const int64_t n : {2, 3, 65, 257, 530})
    for (const int64_t d : {1, 5, 17})
      for (const double scale : {5.0, 39.0, 100.0})
        for (const bool towers : {false, true})
          check_contrastive<T, P>(generator, n + (towers && n % 2), d, scale, towers);
  for (const int64_t n : {1, 7, 40})
    for (const int64_t k : {1, 2, 17, 100, 2500})
      for (const bool prototype : {false, true})
        check_cross_entropy<T, P>(generator, n, 6, k, prototype);
}

template <typename T>
void check_projections() {
  std::mt19937 generator(0);
  for (const bool categories : {false, true})
    for (const auto overlap : {fino::Overlap::explained, fino::Overlap::shared})
      for (const int64_t d : {3, 70})  // the squared form, the sweep
        for (const int64_t k : {2, 9}) check_orthogonal<T>(generator, 31, d, k, categories, overlap);
}

// A box of an image as its mirrored views of one size: sums over the triangle filter, pixel by pixel.
template <typename T>
void check_view(std::mt19937& generator, const fino::Box& box, int64_t channels, int64_t size) {
  const int64_t height = box.bottom, width = box.right + 1;
  std::uniform_int_distribution<int> value(0, 255);
  std::vector<T> pixels(height * width * channels);
  for (T& pixel : pixels) pixel = T(value(generator));
  const int64_t planes = channels == 1 ? 3 : channels;
  std::vector<float> shift(planes, 10), divisor(planes, 300), out(planes * size * size);
  fino::cut_view(fino::Picture<T>{pixels.data(), width, channels}, box, true, false, size, planes,
                 shift.data(), divisor.data(), out.data());
  const auto weights = [size](int64_t input, int64_t i) {
    const double step = double(input) / double(size), reach = std::max(step, 1.0);
    Vector found(input);
    double total = 0;
    for (int64_t j = 0; j < input; ++j) {
      found[j] = std::max(0.0, 1 - std::abs(double(j) + 0.5 - step * (double(i) + 0.5)) / reach);
      total += found[j];
    }
    for (double& weight : found) weight /= total;
    return found;
  };
  for (int64_t y = 0; y < size; ++y) {
    const Vector down = weights(box.bottom - box.top, y);
    for (int64_t x = 0; x < size; ++x) {
      const Vector across = weights(box.right - box.left, x);
      for (int64_t plane = 0; plane < planes; ++plane) {
        double sum = 0;
        for (size_t j = 0; j < down.size(); ++j)
          for (size_t k = 0; k < across.size(); ++k)
            sum += down[j] * across[k] *
                   pixels[((box.top + j) * width + box.left + k) * channels +
                          (channels == 1 ? 0 : plane)];
        compare(out[(plane * size + y) * size + size - 1 - x], (sum - 10) / 300);
      }
    }
  }
}

void check_views(std::mt19937& generator) {
  for (const fino::Box& box : {fino::Box{0, 0, 1, 1}, fino::Box{2, 1, 9, 30}, fino::Box{0, 3, 33, 8}})
    for (const int64_t size : {1, 7, 18}) {
      check_view<uint8_t>(generator, box, 1, size);
      check_view<uint16_t>(generator, box, 2, size);
      check_view<float>(generator, box, 3, size);
    }
}

// The largest error since it was last asked for.
double taken() { return std::exchange(worst, 0); }

std::atomic<int> ended{0};

void check_bf16_product(std::mt19937& generator, int64_t m, int64_t n, int64_t k, bool ta, bool tb,
                        bool accumulate, float alpha) {
  // Rows with something between them, which must not be read as part of them.
  const int64_t lda = (ta ? m : k) + 3, ldb = (tb ? k : n) + 1, ldc = n + 2;
  std::vector<float> left = random<float>(generator, lda * (ta ? k : m) - 3),
                     right = random<float>(generator, ldb * (tb ? n : k) - 1),
                     expected = random<float>(generator, ldc * m - 2);
  const std::vector<fino::Bf16> a = operand<float, fino::Bf16>(left),
                                b = operand<float, fino::Bf16>(right);
  std::vector<float> found = expected, again = expected;
  gemm<float, fino::Bf16>(ta, tb, m, n, k, alpha, a.data(), lda, b.data(), ldb, accumulate,
                          expected.data(), ldc);
  const int before = ended;
  for (const auto& [parallel, out] : {std::pair{&in_two, &found}, {&on_three_threads, &again}})
    fino::bf16_product(*parallel, fino::plain_bf16_kernel, [] { ++ended; }, ta, tb, m, n, k, alpha,
                       a.data(), lda, b.data(), ldb, accumulate, out->data(), ldc);
  if (ended == before || found != again) worst = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < found.size(); ++i) compare(found[i] / std::sqrt(k), expected[i] / std::sqrt(k));
}

void check_bf16_products(std::mt19937& generator) {
  struct Sizes {
    int64_t m, n, k;
  };
  for (const Sizes& of : {Sizes{1, 1, 1}, {3, 70, 5}, {130, 64, 33}, {65, 129, 40}, {2, 3, 2051}})
    for (const int flags : {0, 1, 2, 3, 4, 5, 6, 7})
      check_bf16_product(generator, of.m, of.n, of.k, flags & 1, flags & 2, flags & 4,
                         flags % 3 == 0 ? 1.0f : -0.5f);
}

}  // namespace

int main() {
  check_sweeps<double>();
  check_projections<double>();
  const double wide = taken();
  check_sweeps<float>();
  check_projections<float>();
  std::mt19937 generator(1);
  check_threads(generator);
  check_scratch();
  check_views(generator);
  check_bf16_products(generator);
  const double single = taken();
  check_sweeps<float, fino::Bf16>();
  const double half = taken();
  std::printf("%s: largest error %.1e in fp64, %.1e in fp32, %.1e in bf16\n",
              fino::capability().c_str(), wide, single, half);
  return wide < 1e-11 && single < 2e-4 && half < 2e-2 ? EXIT_SUCCESS : EXIT_FAILURE;
}
