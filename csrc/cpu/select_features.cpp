// select_features: the union of every head's picks, ascending, without making the picks.
//   scores [H, N] float32     kept [min(H * K, N)] int64, ascending, unused tail -1
//   First each head's cuts (cut.h), which are independent; then each feature on its own: kept if it lies above any
//   head's cut. Reads the scores twice, writes what is kept. Equal to headwise_topk and union_indices, bit for bit, for
//   any number of threads.

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

// is_kept: a byte may be part of anything; told that it is not, the compiler makes vectors.
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
