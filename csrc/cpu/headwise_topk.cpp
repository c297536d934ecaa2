// headwise_topk: each head picks its k largest scores of each segment.
//   scores [H, N] float32     picks [H, K] int64, feature indices, ascending
//   Order: ordered_key.h (larger first, tie: lower index, NaN last).
//   Finds each segment's cut (cut.h), then emits what lies above it in index order: ascending without a sort. Heads are
//   independent, results repeat bit for bit.

#include "cut.h"

namespace trimserve::cpu {
namespace {

TRIMSERVE_INLINE void pick_segment(const float* scores, const Segment& segment, std::int64_t* picks,
                                   std::uint32_t* keys) {
  const Cut cut = make_cut(scores, segment.size, segment.k, keys);
  std::int64_t count = 0;
  for (std::int32_t i = 0; count < segment.k; ++i) {
    picks[count] = segment.begin + i;  // overwritten unless it counts
    count += is_picked(cut, keys[i], i);
  }
}

}  // namespace

void headwise_topk(const HeadwiseTopkArgs& args, std::int64_t begin, std::int64_t end,
                   std::uint32_t* workspace) {
  at_width(widest_vector(), [&](auto) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t h = begin; h < end; ++h) {
      for (std::int64_t s = 0; s < args.num_segments; ++s) {
        const Segment& segment = args.segments[s];
        pick_segment(args.scores + h * args.num_features + segment.begin, segment,
                     args.picks + h * args.num_picks + segment.picks_begin, workspace);
      }
    }
  });
}

}  // namespace trimserve::cpu
