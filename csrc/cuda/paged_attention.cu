// paged_attention: one row of each sequence attends to the sequence's positions, whose keys and values lie in pages.
//   q, attended [B, H, Dh]   pages [P, G, 2, Hkv, 16, Dh], one layer   tables [B, max_pages] int32   lengths [B] int32
//   bias [B, max_pages * 16] float32, or null for zeros
//   attended[b, h] = sum over positions p < lengths[b] of softmax(q[b, h] . k[p] * scale + bias[b, p])[p] * v[p],
//     k and v of KV head h / (H / Hkv) in page tables[b, p / 16] at offset p % 16; 0 where lengths[b] is 0.
//
//   A block takes a piece of kPiecePositions of one sequence and up to kHeads query heads of one KV head: keys to
//   logits, softmax, values; each key and value is read once for these heads, 16 bytes per access. kLanes lanes share a
//   row, so a warp reads two rows at a time. Lengths are on the device, and a captured step is launched alike whatever
//   they are: as many blocks as fill a GPU take the pieces of all sequences in turn (find_piece), however long the
//   tables are. Pieces leave sums, maxima and totals that merge_pieces combines in order. They depend on the sequence's
//   own length only, so results repeat bit for bit in any batch. Arithmetic in float32.

#include <limits>

#include "alignment.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kPiecePositions = 256;
constexpr int kThreads = 128;
constexpr int kLanes = 16;                // that have a row
constexpr int kRows = kThreads / kLanes;  // at a time
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostHeads = 4;                  // of a block
constexpr std::int64_t kMostBlocks = 132 * 8;  // twice what an H100 runs at a time
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kPiecePositions % kPagePositions == 0 && kWarp == 2 * kLanes &&
              kPiecePositions % (kRows * kLanes) == 0);

// What a piece leaves of one head: weighted sum of values, largest logit, total of the weights.
__device__ __host__ std::int64_t partial_size(std::int64_t head_dim) { return head_dim + 2; }

__device__ __host__ std::int64_t max_pieces(std::int64_t max_pages) {
  const std::int64_t pieces = divide_up(max_pages * kPagePositions, kPiecePositions);
  return pieces > 1 ? pieces : 1;
}

__device__ std::int64_t length_of(const PagedAttentionArgs& args, std::int64_t sequence,
                                  std::int64_t max_pages) {
  return min(max(std::int64_t{args.lengths[sequence]}, std::int64_t{0}), max_pages * kPagePositions);
}

struct PlaceOfPiece {
  int sequence;  // num_sequences behind the last piece
  int piece;     // of that sequence
};

// Where the wanted-th piece of all sequences is, those of each in turn; `fewest`: pieces of an empty sequence. All
// threads of a warp find the same: each counts the pieces of a sequence.
__device__ PlaceOfPiece find_piece(const PagedAttentionArgs& args, std::int64_t max_pages, int wanted,
                                   int fewest) {
  const int lane = threadIdx.x % kWarp;
  const int num_sequences = static_cast<int>(args.num_sequences);
  for (int first = 0; first < num_sequences; first += kWarp) {
    int count = 0;
    if (first + lane < num_sequences) {
      const auto length = static_cast<int>(length_of(args, first + lane, max_pages));
      count = max(length / kPiecePositions + (length % kPiecePositions > 0), fewest);
    }
    int sum = count;  // of this sequence and those before
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane >= offset) sum += other;
    }
    const unsigned votes = __ballot_sync(kAllLanes, wanted < sum);
    if (votes != 0) {
      const int owner = __ffs(static_cast<int>(votes)) - 1;
      return {first + owner, wanted - __shfl_sync(kAllLanes, sum - count, owner)};
    }
    wanted -= __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return {num_sequences, 0};
}

__device__ float shift_of(float maximum) { return maximum == kMinusInfinity ? 0.0f : maximum; }

// Sums each of 2 * kHalf values over as many lanes; lane i gets that of value i. Halves the values at each step,
// instead of adding up every value in every lane.
template <int kHalf>
__device__ float sum_each(float (&values)[2 * kHalf]) {
  const bool is_upper = (threadIdx.x & kHalf) != 0;
  float sums[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float own = is_upper ? values[i + kHalf] : values[i],
                other = is_upper ? values[i] : values[i + kHalf];
    sums[i] = own + __shfl_xor_sync(kAllLanes, other, kHalf);
  }
  if constexpr (kHalf == 1) {
    return sums[0];
  } else {
    return sum_each<kHalf / 2>(sums);
  }
}

// What a block works on, and its shared memory.
template <typename T, int kHeads, int kSize>
struct Piece {
  static constexpr int kColumns = kLanes * kSize;  // of a row that are read at a time

  struct Shared {
    std::int64_t blocks[kPiecePositions / kPagePositions];  // offsets of the pages' keys; -1: no such page
    float logits[kPiecePositions][kHeads];                  // then weights
    float maxima[kHeads], totals[kHeads];
    float sums[kWarps][kHeads][kColumns];
  };

  const PagedAttentionArgs& args;
  Shared& shared;
  std::int64_t sequence, first_head;  // query head
  int num_heads;                      // of kHeads that exist
  std::int64_t begin;                 // first position
  int count;                          // positions
  const T* keys;
  const T* values;

  // Elements of the row of a position that the lane has, from `column` on; 0 where there are none.
  __device__ Pack<T, kSize> read(const T* base, int position, std::int64_t column) const {
    const std::int64_t block = position < count ? shared.blocks[position / kPagePositions] : -1;
    Pack<T, kSize> row{};
    if (block >= 0 && column < args.head_dim)
      row = *reinterpret_cast<const Pack<T, kSize>*>(base + block +
                                                     position % kPagePositions * args.head_dim + column);
    return row;
  }

  // shared.logits of all positions, without scale.
  __device__ void multiply_keys() const {
    constexpr int kPositions = kLanes / kHeads;  // that a lane has under way
    const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
    const T* const queries =
        static_cast<const T*>(args.q) + sequence * args.q_stride + first_head * args.head_dim;
    for (std::int64_t first = 0; first < args.head_dim; first += kColumns) {
      const std::int64_t column = first + lane * kSize;
      float query[kHeads][kSize];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const bool exists = h < num_heads && column < args.head_dim;
          query[h][i] = exists ? to_float(queries[h * args.head_dim + column + i]) : 0.0f;
        }
      }
      for (int position = row * kPositions; position < kPiecePositions; position += kRows * kPositions) {
        if (position - row % 2 * kPositions >= count) break;  // the same for all lanes of a warp
        Pack<T, kSize> key[kPositions];
#pragma unroll
        for (int p = 0; p < kPositions; ++p) key[p] = read(keys, position + p, column);
        float products[kLanes];
#pragma unroll
        for (int p = 0; p < kPositions; ++p) {
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum += query[h][i] * to_float(key[p].elements[i]);
            products[p * kHeads + h] = sum;
          }
        }
        const float logit = sum_each<kLanes / 2>(products);
        float& target = shared.logits[position + lane / kHeads][lane % kHeads];
        target = first == 0 ? logit : target + logit;
      }
    }
  }

  // shared.logits become exp(logit - maximum); a warp for each head.
  __device__ void exponentiate() const {
    const int lane = threadIdx.x % kWarp;
    for (int h = threadIdx.x / kWarp; h < kHeads; h += kWarps) {
      const float* const bias = args.bias ? args.bias + sequence * args.bias_stride + begin : nullptr;
      float maximum = kMinusInfinity, total = 0.0f;
      for (int p = lane; p < count; p += kWarp) {
        float logit = shared.logits[p][h] * args.scale;
        if (bias) logit += bias[p];
        if (shared.blocks[p / kPagePositions] < 0) logit = kMinusInfinity;
        shared.logits[p][h] = logit;
        maximum = fmaxf(maximum, logit);
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, offset));
      const float shift = shift_of(maximum);
      for (int p = lane; p < count; p += kWarp) {
        const float weight = expf(shared.logits[p][h] - shift);
        shared.logits[p][h] = weight;
        total += weight;
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        total += __shfl_xor_sync(kAllLanes, total, offset);
      if (lane == 0) {
        shared.maxima[h] = maximum;
        shared.totals[h] = total;
      }
    }
  }

  // Calls store(head, column, sum over positions of weight * value) for all heads and columns.
  template <typename Store>
  __device__ void add_values(const Store& store) const {
    constexpr int kAhead = 4;
    const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, warp = threadIdx.x / kWarp;
    for (std::int64_t first = 0; first < args.head_dim; first += kColumns) {
      const std::int64_t column = first + lane * kSize;
      float sums[kHeads][kSize] = {};
      for (int position = row; position < count; position += kRows * kAhead) {
        Pack<T, kSize> value[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) value[p] = read(values, position + p * kRows, column);
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
          if (position + p * kRows >= count) break;
          const float* const weights = shared.logits[position + p * kRows];
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) sums[h][i] += weights[h] * to_float(value[p].elements[i]);
          }
        }
      }
      __syncthreads();  // until the sums of the columns before are stored
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < kSize; ++i) {
          const float sum = sums[h][i] + __shfl_xor_sync(kAllLanes, sums[h][i], kLanes);
          if (threadIdx.x % kWarp < kLanes) shared.sums[warp][h][lane * kSize + i] = sum;
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < num_heads * kColumns; i += kThreads) {
        const int h = i / kColumns, c = i % kColumns;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][h][c];
        if (first + c < args.head_dim) store(h, first + c, sum);
      }
    }
  }
};

// Blocks (pieces of all sequences, KV head and tile of its query heads). partials [B, pieces, H, partial_size], or null
// if no sequence has more than one piece, which is then finished here.
template <typename T, int kHeads, int kSize>
__global__ void __launch_bounds__(kThreads)
    attend_pieces(PagedAttentionArgs args, std::int64_t max_pages, std::int64_t num_pages, float* partials) {
  using Work = Piece<T, kHeads, kSize>;
  __shared__ typename Work::Shared shared;
  const std::int64_t group = args.num_heads / args.num_kv_heads, tiles = divide_up(group, kHeads);
  const std::int64_t kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
  const std::int64_t block_size = kPagePositions * args.head_dim;
  const T* const keys = static_cast<const T*>(args.pages) + kv_head * block_size;
  for (int next = static_cast<int>(blockIdx.x);; next += static_cast<int>(gridDim.x)) {
    const auto [sequence, piece] = find_piece(args, max_pages, next, partials ? 0 : 1);
    if (sequence == args.num_sequences) return;
    const std::int64_t length = length_of(args, sequence, max_pages);
    const std::int64_t begin = std::int64_t{piece} * kPiecePositions;
    const Work work{args,
                    shared,
                    sequence,
                    kv_head * group + tile * kHeads,
                    static_cast<int>(min(group - tile * kHeads, std::int64_t{kHeads})),
                    begin,
                    static_cast<int>(min(length - begin, std::int64_t{kPiecePositions})),
                    keys,
                    keys + args.num_kv_heads * block_size};
    if (threadIdx.x * kPagePositions < work.count) {
      const std::int64_t page =
          args.tables[sequence * args.table_stride + begin / kPagePositions + threadIdx.x];
      shared.blocks[threadIdx.x] = 0 <= page && page < num_pages ? page * args.page_stride : -1;
    }
    __syncthreads();
    work.multiply_keys();
    __syncthreads();
    work.exponentiate();
    __syncthreads();
    if (partials) {
      const std::int64_t size = partial_size(args.head_dim);
      float* const partial =
          partials + ((sequence * max_pieces(max_pages) + piece) * args.num_heads + work.first_head) * size;
      work.add_values([&](int h, std::int64_t column, float sum) { partial[h * size + column] = sum; });
      if (static_cast<int>(threadIdx.x) < work.num_heads) {
        partial[threadIdx.x * size + args.head_dim] = shared.maxima[threadIdx.x];
        partial[threadIdx.x * size + args.head_dim + 1] = shared.totals[threadIdx.x];
      }
    } else {
      T* const attended =
          static_cast<T*>(args.attended) + (sequence * args.num_heads + work.first_head) * args.head_dim;
      work.add_values([&](int h, std::int64_t column, float sum) {
        attended[h * args.head_dim + column] =
            from_float<T>(length == 0 ? 0.0f : sum * (1.0f / shared.totals[h]));
      });
    }
    __syncthreads();  // until shared memory was read
  }
}

// Blocks (head, sequence).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_pieces(PagedAttentionArgs args, std::int64_t max_pages, const float* partials) {
  const std::int64_t head = blockIdx.x, sequence = blockIdx.y, size = partial_size(args.head_dim);
  const std::int64_t pieces = divide_up(length_of(args, sequence, max_pages), kPiecePositions);
  const std::int64_t stride = args.num_heads * size;
  partials += sequence * max_pieces(max_pages) * stride + head * size;
  float maximum = kMinusInfinity, total = 0.0f;
  for (std::int64_t i = 0; i < pieces; ++i) maximum = fmaxf(maximum, partials[i * stride + args.head_dim]);
  const float shift = shift_of(maximum);
  for (std::int64_t i = 0; i < pieces; ++i)
    total += expf(partials[i * stride + args.head_dim] - shift) * partials[i * stride + args.head_dim + 1];
  T* const attended = static_cast<T*>(args.attended) + (sequence * args.num_heads + head) * args.head_dim;
  for (std::int64_t column = threadIdx.x; column < args.head_dim; column += kThreads) {
    float sum = 0.0f;
    for (std::int64_t i = 0; i < pieces; ++i)
      sum += expf(partials[i * stride + args.head_dim] - shift) * partials[i * stride + column];
    attended[column] = from_float<T>(pieces == 0 ? 0.0f : sum * (1.0f / total));
  }
}

template <typename T, int kHeads, int kSize>
void attend(const PagedAttentionArgs& args, std::int64_t max_pages, std::int64_t num_pages, float* partials,
            Stream stream) {
  const std::int64_t tiles = divide_up(args.num_heads / args.num_kv_heads, kHeads),
                     heads = args.num_kv_heads * tiles, pieces = max_pieces(max_pages);
  if (pieces == 1) partials = nullptr;
  const std::int64_t blocks = std::min(args.num_sequences * pieces, divide_up(kMostBlocks, heads));
  launch(attend_pieces<T, kHeads, kSize>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads)),
         kThreads, stream, args, max_pages, num_pages, partials);
  if (partials) {
    launch(merge_pieces<T>,
           dim3(static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.num_sequences)), kThreads,
           stream, args, max_pages, partials);
  }
}

}  // namespace

std::int64_t paged_attention_workspace(const PagedAttentionArgs& args, std::int64_t max_pages) {
  const std::int64_t pieces = max_pieces(max_pages);
  return pieces == 1 ? 0 : args.num_sequences * pieces * args.num_heads * partial_size(args.head_dim);
}

void paged_attention(const PagedAttentionArgs& args, std::int64_t max_pages, std::int64_t num_pages,
                     float* workspace, Stream stream) {
  if (args.num_sequences == 0) return;
  at_dtype(args.dtype, [&]<typename T>(const T*) {
    constexpr int kSize = 16 / sizeof(T);
    const bool is_aligned =
        is_multiple(bits_of(args.pages) | static_cast<std::uint64_t>(args.head_dim) * sizeof(T), 16);
    const bool has_group = args.num_heads > args.num_kv_heads;
    const auto attend_with = has_group
                                 ? (is_aligned ? attend<T, kMostHeads, kSize> : attend<T, kMostHeads, 1>)
                                 : (is_aligned ? attend<T, 1, kSize> : attend<T, 1, 1>);
    attend_with(args, max_pages, num_pages, workspace, stream);
  });
}

}  // namespace trimserve::cuda
