// select_features: marks the union of every head's picks without making the picks.
//   scores [H, N] float32     cuts [H, segments]     is_kept [N], 0 or 1
//   make_cuts finds each head's cuts (cut.h); mark_kept then marks every feature that lies above some head's cut. The
//   scores are read twice. list_kept (union_indices.cpp) turns the marks into a list, the same as headwise_topk and
//   union_indices give for any number of threads.

#include <algorithm>

#include "cut.h"

namespace trimserve::cpu {

void make_cuts(const SelectFeaturesArgs& args, std::int64_t begin, std::int64_t end,
               std::uint32_t* workspace) {
  at_width(widest_vector(), [&](auto) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t h = begin; h < end; ++h) {
      for (std::int64_t s = 0; s < args.num_segments; ++s) {
        const Segment& segment = args.segments[s];
        if (segment.size == 0) continue;
        args.cuts[h * args.num_segments + s] =
            make_cut(args.scores + h * args.num_features + segment.begin, segment.size, segment.k, workspace);
      }
    }
  });
}

namespace {

// A byte pointer may alias anything; __restrict__ lets the compiler vectorise.
TRIMSERVE_INLINE void mark_segment(const Cut& cut, const float* __restrict__ scores, std::int32_t first,
                                   std::int32_t last, std::uint8_t* __restrict__ is_kept) {
  for (std::int32_t i = first; i < last; ++i) is_kept[i] |= is_picked(cut, ordered_key(scores[i]), i);
}

}  // namespace

void mark_kept(const SelectFeaturesArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto) TRIMSERVE_INLINE_LAMBDA {
    std::fill(args.is_kept + begin, args.is_kept + end, std::uint8_t{0});
    for (std::int64_t s = 0; s < args.num_segments; ++s) {
      const Segment& segment = args.segments[s];
      const std::int64_t first = std::max(begin - segment.begin, std::int64_t{0});
      const std::int64_t last = std::min(end - segment.begin, segment.size);
      for (std::int64_t h = 0; first < last && h < args.num_heads; ++h) {
        mark_segment(args.cuts[h * args.num_segments + s],
                     args.scores + h * args.num_features + segment.begin, first, last,
                     args.is_kept + segment.begin);
      }
    }
  });
}

}  // namespace trimserve::cpu
