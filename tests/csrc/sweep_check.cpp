// The torch-free kernels on buffers of exactly the size they may touch, for the sanitizers, against
// loops that follow the formulas. Prints the largest error; exits non-zero where it is too large.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cpu/capability.h"
#include "cpu/orthogonal.h"
#include "cpu/sweep.h"

namespace {

using Vector = std::vector<double>;

template <typename T>
void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
          int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? c[i * ldc + j] : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += double(ta ? a[l * lda + i] : a[i * lda + l]) * (tb ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = T(sum);
    }
}

template <typename T>
const fino::Runtime<T> runtime = {
    gemm<T>,
    // Two pieces, so that a boundary falls somewhere.
    [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
      if (n > 1) body(0, n / 2);
      body(n > 1 ? n / 2 : 0, n);
    },
};

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
void check_contrastive(std::mt19937& generator, int64_t n, int64_t d, double scale, bool towers) {
  const std::vector<T> x = random<T>(generator, n * d);
  std::vector<T> unit(n * d), norms(n), lse(n), lse_cross(n), g(n * d, 0), g_cross(n * d);
  fino::normalize_rows(runtime<T>, x.data(), n, d, unit.data(), norms.data());
  const auto meet = [&](int64_t i, int64_t j) {
    return towers ? (i < n / 2) != (j < n / 2) : i != j;
  };
  if (towers) {
    for (const int64_t tower : {int64_t{0}, n / 2}) {
      const T* other = unit.data() + (n / 2 - tower) * d;
      fino::cross_logsumexp<T>(runtime<T>, unit.data() + tower * d, n / 2, other, n / 2, d,
                               T(scale), -1, lse_cross.data() + tower);
    }
    for (const int64_t tower : {int64_t{0}, n / 2}) {
      const T* other = unit.data() + (n / 2 - tower) * d;
      fino::cross_gradient<T>(runtime<T>, unit.data() + tower * d, n / 2, other, n / 2, d, T(scale),
                              -1, lse_cross.data() + tower, lse_cross.data() + n / 2 - tower,
                              g_cross.data() + tower * d);
    }
  } else {
    fino::cross_logsumexp<T>(runtime<T>, unit.data(), n, unit.data(), n, d, T(scale), 0,
                             lse_cross.data());
    fino::cross_gradient<T>(runtime<T>, unit.data(), n, unit.data(), n, d, T(scale), 0,
                            lse_cross.data(), lse_cross.data(), g_cross.data());
  }
  if (scale <= fino::max_bounded_scale) {
    fino::pair_logsumexp<T>(runtime<T>, unit.data(), n, d, T(scale), towers, lse.data());
    fino::pair_gradient<T>(runtime<T>, unit.data(), n, d, T(scale), towers, lse.data(),
                           g.data());
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
}

template <typename T>
void check_cross_entropy(std::mt19937& generator, int64_t n, int64_t d, int64_t k, bool prototype) {
  const std::vector<T> x = random<T>(generator, n * d), bank = random<T>(generator, k * d);
  std::vector<T> offset = random<T>(generator, k), scale(k, T(0.7));
  std::vector<int64_t> target(n);
  for (int64_t& t : target) t = int64_t(generator() % (k + 1)) - 1;
  if (prototype && k > 1) {  // class 0 has not been seen
    scale[0] = 0;
    offset[0] = std::numeric_limits<T>::lowest();
    for (int64_t& t : target) t = t == 0 ? -1 : t;
  }
  const T smoothing = prototype ? T(0) : T(0.1), weight = T(0.25);
  std::vector<T> grad_x(n * d), grad_bank(k * d, 0), grad_offset(k, 0);
  fino::Head<T> head{};
  head.kind = prototype ? fino::HeadKind::prototype : fino::HeadKind::linear;
  head.x = x.data();
  head.bank = bank.data();
  head.scale = prototype ? scale.data() : nullptr;
  head.offset = offset.data();
  head.target = target.data();
  head.n = n, head.k = k, head.d = d;
  head.smoothing = smoothing, head.weight = weight;
  head.grad_x = grad_x.data();
  head.grad_bank = grad_bank.data();
  head.grad_offset = grad_offset.data();
  const fino::RowLoss<double> sum = fino::head_sweep(runtime<T>, head);

  double loss = 0;
  Vector gx(n * d, 0), gb(k * d, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (target[i] < 0) continue;
    Vector logits(k);
    double total = 0, mean = 0;
    for (int64_t c = 0; c < k; ++c) {
      double dot = 0;
      for (int64_t l = 0; l < d; ++l) dot += double(x[i * d + l]) * bank[c * d + l];
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
        gb[c * d + l] += g * x[i * d + l];
      }
    }
  }
  compare(sum.loss, loss);
  for (int64_t i = 0; i < n * d; ++i) compare(grad_x[i], gx[i]);
  for (int64_t i = 0; i < k * d; ++i) compare(grad_bank[i], gb[i]);
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
  std::vector<T> grad(n * d);
  compare(fino::orthogonal(runtime<T>, z.data(), n, d, projector, overlap, grad.data()),
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
    if (!(std::abs(slope - grad[e]) < 1e-8)) worst = std::numeric_limits<double>::infinity();
  }
}

// On real threads: the same result as on one, and an exception of one thread ends the others too.
void check_threads(std::mt19937& generator) {
  static std::atomic<int> products{0}, last{0};
  fino::Runtime<float> threaded = runtime<float>;
  threaded.parallel = [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
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
  };
  threaded.gemm = [](bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                     const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) {
    if (++products == last) throw std::bad_alloc();
    gemm<float>(ta, tb, m, n, k, a, lda, b, ldb, accumulate, c, ldc);
  };
  const int64_t n = 1300, d = 3;
  const std::vector<float> x = random<float>(generator, n * d);
  std::vector<float> unit(n * d), norms(n), lse(n), expected(n);
  fino::normalize_rows(runtime<float>, x.data(), n, d, unit.data(), norms.data());
  fino::pair_logsumexp<float>(runtime<float>, unit.data(), n, d, 10, false, expected.data());
  fino::pair_logsumexp<float>(threaded, unit.data(), n, d, 10, false, lse.data());
  if (lse != expected) worst = std::numeric_limits<double>::infinity();
  last = products + 5;
  try {
    fino::pair_logsumexp<float>(threaded, unit.data(), n, d, 10, false, lse.data());
    worst = std::numeric_limits<double>::infinity();  // it must not pass in silence
  } catch (const std::bad_alloc&) {
  }
}

template <typename T>
void check_all() {
  std::mt19937 generator(0);
  for (const int64_t n : {2, 3, 65, 257, 530})
    for (const int64_t d : {1, 5, 17})
      for (const double scale : {5.0, 39.0, 100.0})
        for (const bool towers : {false, true})
          check_contrastive<T>(generator, n + (towers && n % 2), d, scale, towers);
  for (const int64_t n : {1, 7, 40})
    for (const int64_t k : {1, 2, 17, 100})
      for (const bool prototype : {false, true}) check_cross_entropy<T>(generator, n, 6, k, prototype);
  for (const bool categories : {false, true})
    for (const auto overlap : {fino::Overlap::explained, fino::Overlap::shared})
      for (const int64_t d : {3, 70})  // the squared form, the sweep
        for (const int64_t k : {2, 9}) check_orthogonal<T>(generator, 31, d, k, categories, overlap);
}

}  // namespace

int main() {
  check_all<double>();
  const double wide = worst;
  worst = 0;
  check_all<float>();
  std::mt19937 generator(1);
  check_threads(generator);
  std::printf("%s: largest error %.1e in fp64, %.1e in fp32\n", fino::capability().c_str(), wide,
              worst);
  return wide < 1e-11 && worst < 2e-4 ? EXIT_SUCCESS : EXIT_FAILURE;
}
