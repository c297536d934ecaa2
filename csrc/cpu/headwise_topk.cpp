// headwise_topk: each head picks its k largest scores of each segment.
//   scores [H, N] float32     picks [H, K] int64, feature indices, ascending
//   Order: ordered_key.h (larger first, tie: lower index, NaN last).
//   A segment's keys are partitioned around the k-th largest, the threshold; then one pass in index order
//   emits what lies above it and the first ties on it, so picks come out ascending without a sort. Reads each
//   score once, touches each key about four times. Heads are independent, results repeat bit for bit.

#include <algorithm>
#include <functional>

#include "kernels.h"
#include "ordered_key.h"

namespace trimserve::cpu {
namespace {

void pick_segment(const float* scores, const Segment& segment, std::int64_t* picks, std::uint32_t* keys) {
  for (std::int64_t i = 0; i < segment.size; ++i) keys[i] = ordered_key(scores[i]);
  std::nth_element(keys, keys + segment.k - 1, keys + segment.size, std::greater<>());
  const std::uint32_t threshold = keys[segment.k - 1];
  // All keys above the threshold stand before it now.
  std::int64_t ties_left =
      segment.k - std::count_if(keys, keys + segment.k, [=](std::uint32_t key) { return key > threshold; });

  for (std::int64_t i = 0; i < segment.size; ++i) {
    const std::uint32_t key = ordered_key(scores[i]);
    const bool is_picked = key > threshold || (key == threshold && ties_left > 0);
    if (!is_picked) continue;
    ties_left -= key == threshold;
    *picks++ = segment.begin + i;
  }
}

}  // namespace

void headwise_topk(const HeadwiseTopkArgs& args, std::int64_t begin, std::int64_t end,
                   std::uint32_t* workspace) {
  for (std::int64_t h = begin; h < end; ++h) {
    for (std::int64_t s = 0; s < args.num_segments; ++s) {
      const Segment& segment = args.segments[s];
      if (segment.k == 0) continue;
      pick_segment(args.scores + h * args.num_features + segment.begin, segment,
                   args.picks + h * args.num_picks + segment.picks_begin, workspace);
    }
  }
}

}  // namespace trimserve::cpu
