// The launchers of csrc/cuda/launch.h on the host.

#include "host_shim.h"

#include "bank_update.cuh"
#include "group_statistics.cuh"
#include "launch.h"
#include "overlap_gradient.cuh"
#include "overlap_shares.cuh"
#include "term_losses.cuh"

#include "launchers.h"

// The order in which the threads of a block run.
extern "C" void host_order(bool from_the_last) { descending = from_the_last; }

// fino_group_statistics on the first 32 columns only, of rows that are longer.
extern "C" int host_first_stripe(const FinoFactor* factor, const float* z, int64_t count,
                                 int64_t width, int64_t groups) {
  const fino::GroupStatistics<float> arguments{{*factor}, z, count, width, groups, 0, count};
  return launch(fino::group_statistics<float>, 1, 1, fino::kRuns * fino::kWarp, arguments, nullptr);
}
