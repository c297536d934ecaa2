// headwise_topk: each head picks its k largest scores of each segment. One block per head, one launch per segment.
//   scores [H, N] float32     picks [H, K] int64, feature indices, ascending
//   Order: ordered_key.h (larger first, tie: lower index, NaN last).
//   Finds the cut (cut.h), then writes what lies above it in index order: ascending without a sort. Reads the scores
//   four or five times, from the first-level cache after the first, and writes k. Shared memory: one histogram.

#include "cut.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

__global__ void __launch_bounds__(kCutThreads)
    pick_segment(const float* scores, std::int64_t num_features, Segment segment, std::int64_t* picks,
                 std::int64_t num_picks) {
  __shared__ CutScratch scratch;
  scores += blockIdx.x * num_features + segment.begin;
  picks += blockIdx.x * num_picks + segment.picks_begin;
  const Cut cut = make_cut(scores, static_cast<std::int32_t>(segment.size),
                           static_cast<std::int32_t>(segment.k), scratch);
  int total;
  std::int64_t count = 0;
  for (std::int64_t first = 0; count < segment.k; first += kCutThreads) {
    const std::int64_t i = first + threadIdx.x;
    const bool picked =
        i < segment.size && is_picked(cut, ordered_key(scores[i]), static_cast<std::int32_t>(i));
    const int rank = rank_in_block<kCutThreads>(picked, scratch.warps, total);
    if (picked) picks[count + rank] = segment.begin + i;
    count += total;
  }
}

}  // namespace

void headwise_topk(const HeadwiseTopkArgs& args, std::int64_t num_heads, Stream stream) {
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    const Segment& segment = args.segments[s];
    if (num_heads == 0 || segment.size == 0) continue;
    launch(pick_segment, dim3(static_cast<unsigned>(num_heads)), kCutThreads, stream, args.scores,
           args.num_features, segment, args.picks, args.num_picks);
  }
}

}  // namespace trimserve::cuda
