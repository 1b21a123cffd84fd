#include "orthogonal.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "epilogues.h"
#include "scratch.h"
#include "sweep.h"

namespace fino {
namespace {

constexpr double smallest_denominator = 1e-12;
constexpr int64_t column_chunk = 64;  // columns that one thread sums: whole cache lines
constexpr int64_t symmetric_block = 256;

template <typename T>
bool takes_part(const Projector<T>& projector, int64_t row) {
  if (projector.slot != nullptr) return projector.slot[row] >= 0;
  const T first = projector.basis[row * projector.k];
  return first == first;
}

// Sums over rows go by columns: no two threads share a sum, and each has one fixed order.
template <typename Body>
void by_columns(int64_t d, Parallel parallel, const Body& body) {
  parallel((d + column_chunk - 1) / column_chunk, [&](int64_t begin, int64_t end) {
    body(begin * column_chunk, std::min(end * column_chunk, d));
  });
}

template <typename T>
double added(const std::vector<T>& per_row) {
  double sum = 0;
  for (const T value : per_row) sum += value;
  return sum;
}

// c = aᵀ diag(weight) a [d, d] for a [n, d]; `scaled` holds diag(weight) a. Only the blocks on and
// above the diagonal are multiplied.
template <typename T>
void symmetric_product(const Runtime<T>& runtime, const T* a, const T* scaled, int64_t n, int64_t d,
                       T* c) {
  for (int64_t i = 0; i < d; i += symmetric_block) {
    const int64_t rows = std::min(symmetric_block, d - i);
    runtime.gemm(true, false, rows, d - i, n, T(1), a + i, d, scaled + i, d, false, c + i * d + i, d);
    for (int64_t r = i; r < i + rows; ++r)
      for (int64_t column = i + rows; column < d; ++column) c[column * d + r] = c[r * d + column];
  }
}

template <typename T>
class Term {
 public:
  Term(const Runtime<T>& runtime, const Rows<T>& z, int64_t n, int64_t d, const Projector<T>& projector,
       double scale, T* grad)
      : runtime_(runtime), n_(n), d_(d), projector_(projector), scale_(scale), grad_(grad),
        rest_(scratch<T>(n * d)), means_(scratch<T>(projector.k * d)) {
    center(z(0, n, rest_.get()));
    explain();
  }

  double value(Overlap overlap) {
    const double eps = 16 * std::numeric_limits<T>::epsilon(), noise = eps * eps * total_;
    if (overlap == Overlap::explained) {
      if (total_ < smallest_denominator) return 0;
      const double share = signal_ / total_;
      // 2(S − R Z)/‖Z‖² = 2((1 − R) S − R U)/‖Z‖²
      for_rows(projector_.k, [&](int64_t g) {
        combine(means_.get() + g * d_, scale_ * 2 * (1 - share) / total_, nullptr, 0);
      });
      finish(-2 * share / total_, means_.get());
      return share;
    }
    // An S or U of the size of Z's rounding is zero: normalised, it would be a random direction.
    const double denominator = signal_ > noise && noise_ > noise ? signal_ * noise_ : 0;
    if (denominator < smallest_denominator) return 0;
    const auto signal_side = scratch<T>(projector_.k * d_);  // M UᵀU
    const bool sweep = 3 * projector_.k * n_ < 2 * (n_ + projector_.k) * d_;
    // 2(U SᵀS + S UᵀU)/(‖S‖²‖U‖²) − 2R(S/‖S‖² + U/‖U‖²), of which the products add the first part
    const double a = scale_ * 2 / denominator;
    const double numerator = sweep ? swept(T(a), signal_side.get()) : squared(T(a), signal_side.get());
    const double share = numerator / denominator;
    for_rows(projector_.k, [&](int64_t g) {
      combine(signal_side.get() + g * d_, a, means_.get() + g * d_, scale_ * -2 * share / signal_);
    });
    finish(-2 * share / noise_, signal_side.get());
    return share;
  }

 private:
  template <typename Body>
  void for_rows(int64_t rows, const Body& body) {
    runtime_.parallel(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // x = a·x + b·y of one row.
  void combine(T* x, double a, const T* y, double b) const {
    epilogues<T>().combine(x, y, nullptr, T(a), T(b), d_);
  }

  // rest = Z; ‖Z‖². `z` may be the rest's own memory.
  void center(const T* z) {
    int64_t valid = 0;
    for (int64_t i = 0; i < n_; ++i) valid += takes_part(projector_, i);
    std::vector<T> mean(d_);
    by_columns(d_, runtime_.parallel, [&](int64_t first, int64_t last) {
      std::vector<double> sum(last - first);
      for (int64_t i = 0; i < n_; ++i)
        if (takes_part(projector_, i))
          for (int64_t c = first; c < last; ++c) sum[c - first] += z[i * d_ + c];
      for (int64_t c = first; c < last; ++c)
        mean[c] = T(sum[c - first] / double(std::max<int64_t>(valid, 1)));
    });
    std::vector<T> squares(n_);
    for_rows(n_, [&](int64_t i) {
      T* row = rest_.get() + i * d_;
      if (takes_part(projector_, i))
        squares[i] = epilogues<T>().difference(z + i * d_, mean.data(), row, d_);
      else
        std::fill(row, row + d_, T(0));
    });
    total_ = added(squares);
  }

  // means = M, rest = U; ‖S‖², ‖U‖².
  void explain() {
    T* means = means_.get();
    if (projector_.slot != nullptr) {
      std::fill(means, means + projector_.k * d_, T(0));
      // One category alone explains nothing; what rounding leaves of its mean is no direction.
      if (projector_.k < 2) return void(noise_ = total_);
      by_columns(d_, runtime_.parallel, [&](int64_t first, int64_t last) {
        for (int64_t i = 0; i < n_; ++i)
          if (projector_.slot[i] >= 0)
            for (int64_t c = first; c < last; ++c)
              means[projector_.slot[i] * d_ + c] += rest_[i * d_ + c];
        for (int64_t g = 0; g < projector_.k; ++g)
          for (int64_t c = first; c < last; ++c) means[g * d_ + c] /= projector_.size[g];
      });
    } else {
      basis_ = scratch<T>(n_ * projector_.k);
      for (int64_t i = 0; i < n_ * projector_.k; ++i) {
        const T entry = projector_.basis[i];
        basis_[i] = entry == entry ? entry : T(0);
      }
      runtime_.gemm(true, false, projector_.k, d_, n_, T(1), basis_.get(), projector_.k, rest_.get(),
                    d_, false, means, d_);
    }
    std::vector<T> squares(projector_.k), rests(n_);
    for_rows(projector_.k, [&](int64_t g) {
      const T* mean = means + g * d_;
      squares[g] = projector_.size[g] * epilogues<T>().weighted_squares(mean, nullptr, d_);
    });
    if (projector_.slot == nullptr)
      runtime_.gemm(false, false, n_, d_, projector_.k, T(-1), basis_.get(), projector_.k, means, d_,
                    true, rest_.get(), d_);
    for_rows(n_, [&](int64_t i) {
      T* row = rest_.get() + i * d_;
      if (projector_.slot == nullptr)
        rests[i] = epilogues<T>().weighted_squares(row, nullptr, d_);
      else if (takes_part(projector_, i))
        rests[i] = epilogues<T>().difference(row, means + projector_.slot[i] * d_, row, d_);
    });
    signal_ = added(squares);
    noise_ = added(rests);
  }

  // ‖S Uᵀ‖² = Σ_ig size_g ⟨u_i, m_g⟩²; grad += a·U SᵀS, signal_side = M UᵀU.
  double swept(T a, T* signal_side) {
    const int64_t k = projector_.k;
    const auto sized = sized_means();
    std::fill(signal_side, signal_side + k * d_, T(0));
    std::vector<T> squares(n_);
    const auto rows = [&](int64_t first, int64_t) { return rest_.get() + first * d_; };
    block_sweep(runtime_, n_, means_.get(), k, d_, block_rows<T, T>(n_, k), rows,
                [&](T* block, int64_t first, int64_t count) {
      for_rows(count, [&](int64_t i) {
        squares[first + i] = epilogues<T>().weighted_squares(block + i * k, projector_.size, k);
      });
      runtime_.gemm(false, false, count, d_, k, a, block, k, sized.get(), d_, true, grad_ + first * d_,
                    d_);
      runtime_.gemm(true, false, k, d_, count, T(1), block, k, rest_.get() + first * d_, d_, true,
                    signal_side, d_);
    });
    return added(squares);
  }

  // ‖S Uᵀ‖² = tr(SᵀS · UᵀU), with the same results.
  double squared(T a, T* signal_side) {
    const int64_t k = projector_.k;
    const auto sized = sized_means();
    const auto signal = scratch<T>(d_ * d_), noise = scratch<T>(d_ * d_);
    symmetric_product(runtime_, means_.get(), sized.get(), k, d_, signal.get());
    symmetric_product(runtime_, rest_.get(), rest_.get(), n_, d_, noise.get());
    double trace = 0;
    for (int64_t i = 0; i < d_ * d_; ++i) trace += double(signal[i]) * noise[i];
    runtime_.gemm(false, false, n_, d_, d_, a, rest_.get(), d_, signal.get(), d_, true, grad_, d_);
    runtime_.gemm(false, false, k, d_, d_, T(1), means_.get(), d_, noise.get(), d_, false,
                  signal_side, d_);
    return trace;
  }

  // diag(size) M
  Scratch<T> sized_means() {
    auto sized = scratch<T>(projector_.k * d_);
    for_rows(projector_.k, [&](int64_t g) {
      for (int64_t c = 0; c < d_; ++c) sized[g * d_ + c] = projector_.size[g] * means_[g * d_ + c];
    });
    return sized;
  }

  // grad += scale·b·U + E·side.
  void finish(double b, const T* side) {
    for_rows(n_, [&](int64_t i) {
      const bool valid = takes_part(projector_, i);
      const T* row = valid && projector_.slot != nullptr ? side + projector_.slot[i] * d_ : nullptr;
      epilogues<T>().combine(grad_ + i * d_, rest_.get() + i * d_, row, T(1), T(scale_ * b), d_);
    });
    if (projector_.slot == nullptr)
      runtime_.gemm(false, false, n_, d_, projector_.k, T(1), basis_.get(), projector_.k, side, d_,
                    true, grad_, d_);
  }

  const Runtime<T>& runtime_;
  int64_t n_, d_;
  const Projector<T>& projector_;
  double scale_;
  T* grad_;
  Scratch<T> rest_;   // [n, d]: Z, then U
  Scratch<T> means_;  // [k, d]: M
  Scratch<T> basis_;  // [n, k], rows that take no part are zero
  double total_ = 0, signal_ = 0, noise_ = 0;  // ‖Z‖², ‖S‖², ‖U‖²
};

}  // namespace

template <typename T>
double orthogonal(const Runtime<T>& runtime, const Rows<T>& z, int64_t n, int64_t d,
                  const Projector<T>& projector, Overlap overlap, T scale, T* grad) {
  return Term<T>(runtime, z, n, d, projector, scale, grad).value(overlap);
}

template double orthogonal<float>(const Runtime<float>&, const Rows<float>&, int64_t, int64_t,
                                  const Projector<float>&, Overlap, float, float*);
template double orthogonal<double>(const Runtime<double>&, const Rows<double>&, int64_t, int64_t,
                                   const Projector<double>&, Overlap, double, double*);

}  // namespace fino
