// headwise_scores of bfloat16 and float16, on tensor cores: the same two passes as headwise_scores.cu.
//   q [T, H, Dh]   k [N, Hkv, Dh]   visibility [T, 2] int32   scores [H, N] float32; Dh at most kMaxHeadDim
//
//   A warp holds 32 rows in registers, queries in the first pass and keys in the second, and multiplies them by tiles
//   of 64 of the others, which all warps of the block share and which are copied to shared memory while those before
//   are used. So what is added up, the sum of a row or the score of a feature, stays with a warp. Products are exact,
//   sums float32. A product adds up components in any order, so a thread takes 8 that lie together, 16 bytes, for the
//   places of two products that are its own: fragments are loaded as they lie, without conflicts between banks.

#include <cuda_pipeline.h>

#include <cstring>

#include "alignment.h"
#include "headwise_scores.h"
#include "ptx.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeld = 32;                           // rows that a warp holds, one of each lane
constexpr int kBlock = kHeld * (kThreads / kWarp);  // rows that a block holds
constexpr int kTile = 64;                           // of the others, in shared memory
constexpr int kChunk = 32;                          // of these, that are multiplied at once
constexpr int kUnit = 8;                            // components of a thread, 16 bytes
constexpr int kPanel = 32;                          // components of the four threads that share a row
constexpr int kParts = kHeld / 8, kColumns = kChunk / 8;
constexpr int kMaxHeadDim = 4 * kPanel;
static_assert(kHeld == kWarp && kChunk == kWarp && kUnit * 4 == kPanel && kTile * 4 % kThreads == 0);
static_assert(kBlock == 2 * kTile && kTile % kHeld == 0);

// The queries or keys of one head.
template <typename T>
struct Rows {
  const T* data;
  std::int64_t stride;
  std::int64_t count;
  int head_dim;
  bool is_aligned;  // to 16 bytes, every row

  __device__ const T* row(std::int64_t index) const { return data + min(index, count - 1) * stride; }
};

template <typename T>
__device__ Rows<T> queries_of(const HeadwiseScoresArgs& args, std::int64_t head, bool is_aligned) {
  return {static_cast<const T*>(args.q) + head * args.head_dim, args.q_stride, args.num_rows,
          static_cast<int>(args.head_dim), is_aligned};
}

template <typename T>
__device__ Rows<T> keys_of(const HeadwiseScoresArgs& args, std::int64_t head, bool is_aligned) {
  const std::int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  return {static_cast<const T*>(args.k) + kv_head * args.head_dim, args.k_stride, args.num_features,
          static_cast<int>(args.head_dim), is_aligned};
}

// Components [first, first + kUnit) of a row; 0 where the head has no more.
template <typename T>
__device__ uint4 load_unit(const Rows<T>& rows, const T* row, int first) {
  if (rows.is_aligned && first < rows.head_dim) return *reinterpret_cast<const uint4*>(row + first);
  T elements[kUnit];
  for (int i = 0; i < kUnit; ++i)
    elements[i] = first + i < rows.head_dim ? row[first + i] : from_float<T>(0.0f);
  uint4 unit;
  std::memcpy(&unit, elements, sizeof unit);
  return unit;
}

template <int kPanels>
struct Tile {
  uint4 units[kPanels][kTile][4];
};

// Begins to copy rows [first, first + kTile); the last row stands for those that are not there.
template <typename T, int kPanels>
__device__ void copy_rows(const Rows<T>& rows, std::int64_t first, Tile<kPanels>& tile) {
  const int unit = threadIdx.x % 4;
  for (int place = threadIdx.x / 4; place < kTile; place += kThreads / 4) {
    const T* const row = rows.row(first + place);
    for (int p = 0; p < kPanels; ++p) {
      const int component = p * kPanel + unit * kUnit;
      uint4* const target = &tile.units[p][place][unit];
      if (rows.is_aligned && component < rows.head_dim)
        __pipeline_memcpy_async(target, row + component, sizeof(uint4));
      else
        *target = load_unit(rows, row, component);
    }
  }
  __pipeline_commit();
}

// Of the block's rows from `first` on: held[p][i] of row 8 i + lane / 4 of the warp's, panel p. Both tiles are free
// then.
template <typename T, int kPanels>
__device__ void hold(const Rows<T>& rows, std::int64_t first, Tile<kPanels> (&tiles)[2],
                     uint4 (&held)[kPanels][kParts]) {
  copy_rows(rows, first, tiles[0]);
  copy_rows(rows, first + kTile, tiles[1]);
  __pipeline_wait_prior(0);
  __syncthreads();
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kHeld + lane / 4;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) held[p][i] = tiles[row / kTile].units[p][row % kTile + 8 * i][lane % 4];
  }
  __syncthreads();
}

// Of the held rows 8 i + lane / 4 and the chunk's columns 8 j + lane % 4 * 2 + e: products[j][i / 2][i % 2 * 2 + e].
using Products = float[kColumns][kParts / 2][4];

template <typename T, int kPanels>
__device__ void multiply(const uint4 (&held)[kPanels][kParts], const Tile<kPanels>& tile, int chunk,
                         Products& products) {
  const int lane = threadIdx.x % kWarp;
  for (auto& column : products) {
    for (auto& half : column) {
      for (float& product : half) product = 0.0f;
    }
  }
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const uint4 others = tile.units[p][chunk + 8 * j + lane / 4][lane % 4];
#pragma unroll
      for (int i = 0; i < kParts / 2; ++i) {
        const uint4 upper = held[p][2 * i], lower = held[p][2 * i + 1];
        mma<T>(products[j][i], {upper.x, lower.x, upper.y, lower.y}, {others.x, others.y});
        mma<T>(products[j][i], {upper.z, lower.z, upper.w, lower.w}, {others.z, others.w});
      }
    }
  }
}

// How much of features [first, end) the warp's rows see, a row of each lane; the same to all lanes.
enum class Seen { kNone, kSome, kAll };

__device__ Seen how_much(const Range& range, std::int64_t first, std::int64_t end) {
  const bool sees_any = range.begin < range.end && range.begin < end && first < range.end;
  if (__ballot_sync(kAllLanes, sees_any) == 0) return Seen::kNone;
  const bool sees_all = range.begin <= first && end <= range.end;
  return __ballot_sync(kAllLanes, sees_all) == kAllLanes ? Seen::kAll : Seen::kSome;
}

// What is not seen becomes -inf. range: of row `lane` of the warp's; first: feature of column 0.
__device__ void hide(Products& logits, const Range& range, std::int64_t first) {
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < kParts; ++i) {
    const Range of_row{__shfl_sync(kAllLanes, range.begin, 8 * i + lane / 4),
                       __shfl_sync(kAllLanes, range.end, 8 * i + lane / 4)};
    for (int j = 0; j < kColumns; ++j) {
      for (int e = 0; e < 2; ++e) {
        float& logit = logits[j][i / 2][i % 2 * 2 + e];
        if (!of_row.has(first + 8 * j + lane % 4 * 2 + e)) logit = kMinusInfinity;
      }
    }
  }
}

// Adds a chunk's logits of the thread to the sums of its rows.
__device__ void add_powers(const Products& logits, RowSum (&rows)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    float maximum = rows[i].maximum;
    for (int j = 0; j < kColumns; ++j) {
      for (int e = 0; e < 2; ++e) maximum = fmaxf(maximum, logits[j][i / 2][i % 2 * 2 + e]);
    }
    const float shift = shift_of(maximum);
    float total = rows[i].total * fast_exp2(rows[i].maximum - shift);
    for (int j = 0; j < kColumns; ++j) {
      for (int e = 0; e < 2; ++e) total += fast_exp2(logits[j][i / 2][i % 2 * 2 + e] - shift);
    }
    rows[i] = {maximum, total};
  }
}

// The sums of the four threads that share a row.
__device__ RowSum merge_lanes(RowSum own) {
  for (int offset = 1; offset < 4; offset *= 2) {
    const RowSum other{__shfl_xor_sync(kAllLanes, own.maximum, offset),
                       __shfl_xor_sync(kAllLanes, own.total, offset)};
    const float maximum = fmaxf(own.maximum, other.maximum), shift = shift_of(maximum);
    own = {maximum,
           own.total * fast_exp2(own.maximum - shift) + other.total * fast_exp2(other.maximum - shift)};
  }
  return own;
}

// Blocks (rows, head, split); sums [splits, H, T].
template <typename T, int kPanels>
__global__ void __launch_bounds__(kThreads, 3)
    sum_rows(HeadwiseScoresArgs args, bool is_aligned, std::int64_t tiles_per_split, RowSum* sums) {
  __shared__ Tile<kPanels> tiles[2];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kBlock + warp * kHeld;
  const std::int64_t head = blockIdx.y, begin = blockIdx.z * tiles_per_split * kTile;
  const std::int64_t end = min(begin + tiles_per_split * kTile, args.num_features);
  const Rows<T> keys = keys_of<T>(args, head, is_aligned);
  uint4 held[kPanels][kParts];
  hold(queries_of<T>(args, head, is_aligned), static_cast<std::int64_t>(blockIdx.x) * kBlock, tiles, held);
  const bool is_used = first_row < args.num_rows;
  const Range range = range_of(args, is_used ? min(first_row + lane, args.num_rows - 1) : first_row);
  RowSum rows[kParts];
  for (RowSum& row : rows) row = {kMinusInfinity, 0.0f};
  copy_rows(keys, begin, tiles[0]);
  int current = 0;
  for (std::int64_t first = begin; first < end; first += kTile, current ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this tile is there, and the one before is used
    if (first + kTile < end) copy_rows(keys, first + kTile, tiles[current ^ 1]);
#pragma unroll 1
    for (int chunk = 0; chunk < kTile; chunk += kChunk) {
      const Seen seen = how_much(range, first + chunk, first + chunk + kChunk);
      if (seen == Seen::kNone) continue;
      Products logits;
      multiply<T>(held, tiles[current], chunk, logits);
      for (auto& column : logits) {
        for (auto& half : column) {
          for (float& logit : half) logit *= args.scale;
        }
      }
      if (seen == Seen::kSome) hide(logits, range, first + chunk);
      add_powers(logits, rows);
    }
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const RowSum sum = merge_lanes(rows[i]);
    const std::int64_t row = first_row + 8 * i + lane / 4;
    if (lane % 4 == 0 && row < args.num_rows)
      sums[(blockIdx.z * args.num_heads + head) * args.num_rows + row] = sum;
  }
}

// What the second pass knows of a tile's text rows.
struct TileRows {
  alignas(16) float log_sums[kTile];
  alignas(16) Range ranges[kTile];
};

// Adds a chunk's weights of the thread to the scores of its features, and the rows that see them to counts.
template <bool kAllSeen>
__device__ void add_weights(const Products& products, float scale, const TileRows& rows, int chunk,
                            std::int64_t first, float (&scores)[kParts], int (&counts)[kParts]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = chunk + 8 * j + lane % 4 * 2;
    const auto log_sums = *reinterpret_cast<const Pack<float, 2>*>(&rows.log_sums[column]);
    Pack<Range, 2> ranges;
    if (!kAllSeen) ranges = *reinterpret_cast<const Pack<Range, 2>*>(&rows.ranges[column]);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      for (int e = 0; e < 2; ++e) {
        const bool is_seen = kAllSeen || ranges.elements[e].has(first + 8 * i + lane / 4);
        const float logit = products[j][i / 2][i % 2 * 2 + e] * scale;
        const float weight = fast_exp2(logit - log_sums.elements[e]);
        scores[i] += is_seen ? weight : 0.0f;
        counts[i] += is_seen;
      }
    }
  }
}

// Blocks (features, head).
template <typename T, int kPanels>
__global__ void __launch_bounds__(kThreads, 3)
    score_features(HeadwiseScoresArgs args, bool is_aligned, std::int64_t splits, const RowSum* sums) {
  __shared__ Tile<kPanels> tiles[2];
  __shared__ TileRows rows[2];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlock + warp * kHeld;
  const std::int64_t end = min(first + kHeld, args.num_features), head = blockIdx.y;
  const Rows<T> queries = queries_of<T>(args, head, is_aligned);
  const auto copy = [&](std::int64_t first_row, int to) {
    copy_rows(queries, first_row, tiles[to]);
    const std::int64_t row = first_row + thread;
    if (thread >= kTile) return;
    rows[to].ranges[thread] = range_of(args, row);
    if (row < args.num_rows)
      rows[to].log_sums[thread] =
          log_sum(sums + head * args.num_rows + row, args.num_heads * args.num_rows, splits);
  };
  uint4 held[kPanels][kParts];
  hold(keys_of<T>(args, head, is_aligned), static_cast<std::int64_t>(blockIdx.x) * kBlock, tiles, held);
  float scores[kParts] = {};
  int counts[kParts] = {};  // rows that see the feature
  if (args.num_rows > 0) copy(0, 0);
  int current = 0;
  for (std::int64_t first_row = 0; first_row < args.num_rows; first_row += kTile, current ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this tile is there, and the one before is used
    if (first_row + kTile < args.num_rows) copy(first_row + kTile, current ^ 1);
#pragma unroll 1
    for (int chunk = 0; chunk < kTile; chunk += kChunk) {
      const Seen seen = how_much(rows[current].ranges[chunk + lane], first, end);
      if (seen == Seen::kNone) continue;
      Products products;
      multiply<T>(held, tiles[current], chunk, products);
      if (seen == Seen::kAll)
        add_weights<true>(products, args.scale, rows[current], chunk, first, scores, counts);
      else
        add_weights<false>(products, args.scale, rows[current], chunk, first, scores, counts);
    }
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    for (int offset = 1; offset < 4; offset *= 2) {
      scores[i] += __shfl_xor_sync(kAllLanes, scores[i], offset);
      counts[i] += __shfl_xor_sync(kAllLanes, counts[i], offset);
    }
    const std::int64_t feature = first + 8 * i + lane / 4;
    if (lane % 4 == 0 && feature < end)
      args.scores[head * args.num_features + feature] =
          counts[i] > 0 ? scores[i] / static_cast<float>(counts[i]) : 0.0f;
  }
}

// Calls body with null pointers of the element type and of as many panels as a head fills.
template <typename Body>
void at_panels(const HeadwiseScoresArgs& args, const Body& body) {
  const auto of_type = [&]<typename T>(const T*) {
    if (args.head_dim <= 2 * kPanel) return body.template operator()<T, 2>();
    body.template operator()<T, 4>();
  };
  if (args.dtype == DType::kBFloat16) return of_type(static_cast<const __nv_bfloat16*>(nullptr));
  of_type(static_cast<const __half*>(nullptr));
}

}  // namespace

bool fits_tensor_cores(const HeadwiseScoresArgs& args) {
  return args.dtype != DType::kFloat32 && args.head_dim <= kMaxHeadDim;
}

Splits tensor_core_splits(const HeadwiseScoresArgs& args) { return split_features(args, kBlock, kTile); }

void score_on_tensor_cores(const HeadwiseScoresArgs& args, RowSum* sums, Stream stream) {
  const Splits splits = tensor_core_splits(args);
  const auto heads = static_cast<unsigned>(args.num_heads);
  const auto row_blocks = static_cast<unsigned>(divide_up(args.num_rows, kBlock));
  const auto feature_blocks = static_cast<unsigned>(divide_up(args.num_features, kBlock));
  const auto bytes = static_cast<std::uint64_t>(args.q_stride | args.k_stride | args.head_dim) * 2;
  const bool is_aligned = is_multiple(bits_of(args.q) | bits_of(args.k) | bytes, sizeof(uint4));
  at_panels(args, [&]<typename T, int kPanels>() {
    if (row_blocks > 0) {
      const dim3 grid(row_blocks, heads, static_cast<unsigned>(splits.count));
      launch(sum_rows<T, kPanels>, grid, kThreads, stream, args, is_aligned, splits.tiles, sums);
    }
    const dim3 grid(feature_blocks, heads);
    launch(score_features<T, kPanels>, grid, kThreads, stream, args, is_aligned, splits.count, sums);
  });
}

}  // namespace trimserve::cuda
