// What the kernels of headwise_scores for float32 and for 16 bits share: sums of a row's exponentials, and how the
// blocks of a row split its features. Logits are in bits, times log2(e), so that 2 is the base of all powers.

#pragma once

#include <cmath>
#include <limits>

#include "device.h"
#include "launchers.h"

namespace trimserve::cuda {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kBitsPerNat = 1.44269504f;

// What the logits of a row, or of a split of it, came to.
struct RowSum {
  float maximum;
  float total;  // of 2^(logit - maximum); maximum counts as 0 where it is -inf
};

__device__ inline float shift_of(float maximum) { return maximum == kMinusInfinity ? 0.0f : maximum; }

// log2 of the sum of 2^logit over the splits of a row.
__device__ inline float log_sum(const RowSum* sums, std::int64_t stride, std::int64_t splits) {
  float maximum = kMinusInfinity, total = 0.0f;
  for (std::int64_t s = 0; s < splits; ++s) maximum = fmaxf(maximum, sums[s * stride].maximum);
  const float shift = shift_of(maximum);
  for (std::int64_t s = 0; s < splits; ++s)
    total += sums[s * stride].total * exp2f(sums[s * stride].maximum - shift);
  return shift + log2f(total);
}

// The features [begin, end) that a row sees; 0 <= begin <= end.
struct Range {
  std::int32_t begin, end;
  __device__ bool has(std::int64_t n) const {  // n in [0, 2^32)
    return static_cast<std::uint32_t>(n) - static_cast<std::uint32_t>(begin) <
           static_cast<std::uint32_t>(end - begin);
  }
};

// Cut to the features there are; empty for a row that is not there.
__device__ inline Range range_of(const HeadwiseScoresArgs& args, std::int64_t row) {
  if (row >= args.num_rows) return {0, 0};
  const std::int32_t begin = max(args.visibility[2 * row], 0);
  const auto end =
      static_cast<std::int32_t>(min(std::int64_t{args.visibility[2 * row + 1]}, args.num_features));
  return {begin, max(begin, end)};
}

// How many tiles of features a block takes, and how many such splits there are: few rows fill the device, too.
struct Splits {
  std::int64_t tiles;
  std::int64_t count;
};

inline Splits split_features(const HeadwiseScoresArgs& args, std::int64_t rows_of_block,
                             std::int64_t features_of_tile) {
  constexpr std::int64_t kWantedBlocks = 512, kMaxSplits = 16;
  const std::int64_t tiles = divide_up(args.num_features, features_of_tile);
  const std::int64_t blocks =
      std::max<std::int64_t>(divide_up(args.num_rows, rows_of_block) * args.num_heads, 1);
  const std::int64_t splits = std::clamp<std::int64_t>(kWantedBlocks / blocks, 1, kMaxSplits);
  const std::int64_t tiles_of_split = std::max<std::int64_t>(divide_up(tiles, splits), 1);
  return {tiles_of_split, divide_up(tiles, tiles_of_split)};
}

// On tensor cores; args.scale is in bits.
bool fits_tensor_cores(const HeadwiseScoresArgs& args);
Splits tensor_core_splits(const HeadwiseScoresArgs& args);
void score_on_tensor_cores(const HeadwiseScoresArgs& args, RowSum* sums, Stream stream);

}  // namespace trimserve::cuda
