// select_features: a bitmap of the features that any head picks, without making the picks.
//   scores [H, N] float32     bitmap [ceil(N / 32)]
//   First each head's cuts (cut.h), a block each; then each feature on its own: kept if it lies above any head's cut. A
//   warp votes on a word of the bitmap. list_kept (union_indices.cu) makes the list of it.

#include "cut.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kMarkThreads = 256;
static_assert(kMarkThreads % kWarp == 0);

__global__ void __launch_bounds__(kCutThreads) cut_segment(const float* scores, std::int64_t num_features,
                                                           Segment segment, Cut* cuts, std::int64_t stride) {
  __shared__ CutScratch scratch;
  const Cut cut =
      make_cut(scores + blockIdx.x * num_features + segment.begin, static_cast<std::int32_t>(segment.size),
               static_cast<std::int32_t>(segment.k), scratch);
  if (threadIdx.x == 0) cuts[blockIdx.x * stride] = cut;
}

// Segments may share a word, so bits are added to it.
__global__ void __launch_bounds__(kMarkThreads)
    mark_segment(const float* scores, std::int64_t num_features, Segment segment, const Cut* cuts,
                 std::int64_t stride, std::int64_t num_heads, std::uint32_t* bitmap) {
  const std::int64_t end = segment.begin + segment.size;
  std::int64_t first = segment.begin / 32 * 32 + static_cast<std::int64_t>(blockIdx.x) * kMarkThreads;
  for (; first < end; first += static_cast<std::int64_t>(gridDim.x) * kMarkThreads) {
    const std::int64_t n = first + threadIdx.x;
    bool is_kept = false;
    if (segment.begin <= n && n < end) {
      const auto i = static_cast<std::int32_t>(n - segment.begin);
      for (std::int64_t h = 0; h < num_heads; ++h)
        is_kept |= is_picked(cuts[h * stride], ordered_key(scores[h * num_features + n]), i);
    }
    const unsigned word = __ballot_sync(kAllLanes, is_kept);
    if (threadIdx.x % kWarp == 0 && word != 0) atomicOr(&bitmap[n / 32], word);
  }
}

}  // namespace

void mark_kept(const SelectFeaturesArgs& args, std::uint32_t* bitmap, Stream stream) {
  check_cuda(cudaMemsetAsync(bitmap, 0, num_words(args.num_features) * sizeof *bitmap, stream));
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    const Segment& segment = args.segments[s];
    if (args.num_heads == 0 || segment.size == 0) continue;
    launch(cut_segment, dim3(static_cast<unsigned>(args.num_heads)), kCutThreads, stream, args.scores,
           args.num_features, segment, args.cuts + s, args.num_segments);
    launch(mark_segment, grid_of(segment.size + 31, kMarkThreads), kMarkThreads, stream, args.scores,
           args.num_features, segment, args.cuts + s, args.num_segments, args.num_heads, bitmap);
  }
}

}  // namespace trimserve::cuda
