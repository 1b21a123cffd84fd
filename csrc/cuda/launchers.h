// The bodies of the launchers, for whoever has defined `launch`: launch.cu and the tests.

#pragma once

namespace {

// Calls one(tables, count) for at most `most` entries of a table at a time.
template <typename Entry, typename One>
int by_launch(const Entry* table, int64_t size, int64_t most, One one) {
  for (int64_t first = 0; first < size; first += most) {
    const int error = one(table + first, size - first < most ? size - first : most);
    if (error != 0) return error;
  }
  return 0;
}

template <typename T>
int group_statistics(const FinoFactor* factors, int64_t factor_count, const void* z, int64_t count,
                     int64_t width, int64_t groups, int64_t first, int64_t local, void* stream) {
  return by_launch(factors, factor_count, kFinoMaxFactors, [&](const FinoFactor* some, int64_t n) {
    fino::GroupStatistics<T> arguments{{}, static_cast<const T*>(z), count, width, groups, first,
                                       local};
    for (int64_t f = 0; f < n; ++f) arguments.factors[f] = some[f];
    return launch(fino::group_statistics<T>, unsigned((width + kFinoStripe - 1) / kFinoStripe),
                  unsigned(n), fino::kRuns * fino::kWarp, arguments, stream);
  });
}

template <typename T>
int overlap_gradient(const FinoOverlapGradient* overlaps, int64_t overlap_count, const void* z,
                     int64_t count, int64_t width, void* out, void* stream) {
  bool add = false;
  return by_launch(overlaps, overlap_count, kFinoMaxFactors,
                   [&](const FinoOverlapGradient* some, int64_t n) {
    fino::OverlapGradient<T> arguments{{}, n, static_cast<const T*>(z), static_cast<T*>(out),
                                       count, width, add};
    for (int64_t f = 0; f < n; ++f) arguments.overlaps[f] = some[f];
    add = true;
    const int64_t blocks = (count * width + fino::kThreads - 1) / fino::kThreads;
    return launch(fino::overlap_gradient<T>, unsigned(blocks), 1, fino::kThreads, arguments, stream);
  });
}

}  // namespace

int fino_group_statistics(const FinoFactor* factors, int64_t factor_count, const void* z,
                          int64_t type, int64_t count, int64_t width, int64_t groups, int64_t first,
                          int64_t local, void* stream) {
  const auto by_type = type == kFinoHalf       ? group_statistics<__half>
                       : type == kFinoBfloat16 ? group_statistics<__nv_bfloat16>
                                               : group_statistics<float>;
  return by_type(factors, factor_count, z, count, width, groups, first, local, stream);
}

int fino_overlap_shares(const FinoOverlap* overlaps, int64_t overlap_count, int64_t stripes,
                        int64_t groups, int64_t count, void* stream) {
  return by_launch(overlaps, overlap_count, kFinoMaxFactors,
                   [&](const FinoOverlap* some, int64_t n) {
    fino::OverlapShares arguments{{}, stripes, groups, count};
    for (int64_t i = 0; i < n; ++i) arguments.overlaps[i] = some[i];
    return launch(fino::overlap_shares, unsigned(n), 1, fino::kShareThreads, arguments, stream);
  });
}

int fino_overlap_gradient(const FinoOverlapGradient* overlaps, int64_t overlap_count, const void* z,
                          int64_t type, int64_t count, int64_t width, void* out, void* stream) {
  const auto by_type = type == kFinoHalf       ? overlap_gradient<__half>
                       : type == kFinoBfloat16 ? overlap_gradient<__nv_bfloat16>
                                               : overlap_gradient<float>;
  return by_type(overlaps, overlap_count, z, count, width, out, stream);
}

int fino_term_losses(const FinoTerm* terms, int64_t term_count, int64_t plane, int64_t count,
                     void* stream) {
  return by_launch(terms, term_count, kFinoMaxTerms, [&](const FinoTerm* some, int64_t n) {
    fino::TermLosses arguments{{}, plane, count};
    for (int64_t i = 0; i < n; ++i) arguments.terms[i] = some[i];
    return launch(fino::term_losses, unsigned(n), 1, fino::kTermThreads, arguments, stream);
  });
}

int fino_bank_update(const FinoBank* banks, int64_t bank_count, const float* teacher,
                     int64_t views, int64_t count, int64_t width, void* stream) {
  return by_launch(banks, bank_count, kFinoMaxBanks, [&](const FinoBank* some, int64_t n) {
    fino::BankUpdates arguments{{}, teacher, views, count, width};
    for (int64_t i = 0; i < n; ++i) arguments.banks[i] = some[i];
    return launch(fino::bank_update, unsigned(count), unsigned(n), fino::kThreads, arguments,
                  stream);
  });
}
