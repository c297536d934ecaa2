// headwise_scores: how much the text attends to each visual feature, per query head.
//   q [T, H, Dh]   k [N, Hkv, Dh]   visibility [T, 2] int32: row t sees features [begin, end)
//   scores [H, N] float32: scores[h, n] = mean over the rows t that see n of
//     softmax(q[h, t] . k[h / (H / Hkv)] * scale, over what t sees)[n]; 0 where no row sees n.
//
//   Two passes over tiles of rows and features, logits in registers, so [H, T, N] never exists. The first leaves the
//   largest logit and the sum of exponentials of each row and split of the features (splits, so that few rows fill the
//   device); the second makes the same logits again, weighs them, and adds up the rows in order: no atomics, results
//   repeat bit for bit. Bound by arithmetic: 4 * H * T * N * Dh operations. Here in float32, without tensor cores; 16
//   bits whose heads are not too large go to headwise_scores_16bit.cu.

#include "headwise_scores.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;            // rows, and features, of a block
constexpr int kDepth = 16;           // components of a head at a time
constexpr int kSide = 16;            // threads along either side of the tile
constexpr int kPer = kTile / kSide;  // rows, and features, of a thread
static_assert(kSide * kSide == kThreads && kTile * kDepth == kPer * kThreads && kSide * 2 == kWarp);

// Components of a tile's rows: one component of all rows together, the rows of a thread in one access.
struct Operand {
  float values[kDepth][kTile + kPer];
};

struct Tiles {
  alignas(16) Operand queries;
  alignas(16) Operand keys;
};

// Components [depth, depth + kDepth) of rows [first, first + kTile); 0 where there is none.
template <typename T>
__device__ void load(const T* rows, std::int64_t stride, std::int64_t first, std::int64_t count,
                     std::int64_t depth, std::int64_t head_dim, Operand& operand) {
  const int row = threadIdx.x / (kThreads / kTile), column = threadIdx.x % (kThreads / kTile) * kPer;
  const T* const source = rows + (first + row) * stride + depth + column;
  for (int i = 0; i < kPer; ++i) {
    const bool exists = first + row < count && depth + column + i < head_dim;
    operand.values[column + i][row] = exists ? to_float(source[i]) : 0.0f;
  }
}

// logits[i][j] of the thread's rows and features.
template <typename T>
__device__ void multiply(const HeadwiseScoresArgs& args, std::int64_t head, std::int64_t first_row,
                         std::int64_t first_feature, Tiles& tiles, float (&logits)[kPer][kPer]) {
  const std::int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const T* const queries = static_cast<const T*>(args.q) + head * args.head_dim;
  const T* const keys = static_cast<const T*>(args.k) + kv_head * args.head_dim;
  const int x = threadIdx.x % kSide * kPer, y = threadIdx.x / kSide * kPer;
  for (auto& row : logits) {
    for (float& logit : row) logit = 0.0f;
  }
  for (std::int64_t depth = 0; depth < args.head_dim; depth += kDepth) {
    __syncthreads();  // until what was there is read
    load(queries, args.q_stride, first_row, args.num_rows, depth, args.head_dim, tiles.queries);
    load(keys, args.k_stride, first_feature, args.num_features, depth, args.head_dim, tiles.keys);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const auto query = *reinterpret_cast<const Pack<float, kPer>*>(&tiles.queries.values[d][y]);
      const auto key = *reinterpret_cast<const Pack<float, kPer>*>(&tiles.keys.values[d][x]);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) logits[i][j] += query.elements[i] * key.elements[j];
      }
    }
  }
  for (auto& row : logits) {
    for (float& logit : row) logit *= args.scale;
  }
}

// Blocks (rows, head, split); sums [splits, H, T].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_rows(HeadwiseScoresArgs args, std::int64_t tiles_per_split, RowSum* sums) {
  __shared__ Tiles tiles;
  const int x = threadIdx.x % kSide * kPer, y = threadIdx.x / kSide * kPer;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kTile, head = blockIdx.y;
  const std::int64_t begin = blockIdx.z * tiles_per_split * kTile;
  const std::int64_t end = min(begin + tiles_per_split * kTile, args.num_features);
  float logits[kPer][kPer];
  RowSum rows[kPer];
  for (RowSum& row : rows) row = {kMinusInfinity, 0.0f};
  for (std::int64_t first = begin; first < end; first += kTile) {
    multiply<T>(args, head, first_row, first, tiles, logits);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const Range range = range_of(args, first_row + y + i);
      float maximum = rows[i].maximum;
      for (int j = 0; j < kPer; ++j) {
        if (range.has(first + x + j)) maximum = fmaxf(maximum, logits[i][j]);
      }
      for (int offset = kSide / 2; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, offset));
      const float shift = shift_of(maximum);
      rows[i].total *= exp2f(rows[i].maximum - shift);
      for (int j = 0; j < kPer; ++j) {
        if (range.has(first + x + j)) rows[i].total += exp2f(logits[i][j] - shift);
      }
      rows[i].maximum = maximum;
    }
  }
  for (int i = 0; i < kPer; ++i) {
    float total = rows[i].total;
    for (int offset = kSide / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    const std::int64_t row = first_row + y + i;
    if (x == 0 && row < args.num_rows)
      sums[(blockIdx.z * args.num_heads + head) * args.num_rows + row] = {rows[i].maximum, total};
  }
}

// Blocks (features, head).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    score_features(HeadwiseScoresArgs args, std::int64_t splits, const RowSum* sums) {
  __shared__ Tiles tiles;
  __shared__ float log_sums[kTile], partial_scores[kSide][kTile];
  __shared__ int partial_counts[kSide][kTile];
  const int thread = threadIdx.x, x = thread % kSide * kPer, y = thread / kSide * kPer;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile, head = blockIdx.y;
  float logits[kPer][kPer], scores[kPer] = {};
  int counts[kPer] = {};  // rows that see the feature
  for (std::int64_t first_row = 0; first_row < args.num_rows; first_row += kTile) {
    __syncthreads();  // until the rows before are read
    if (thread < kTile && first_row + thread < args.num_rows) {
      log_sums[thread] =
          log_sum(sums + head * args.num_rows + first_row + thread, args.num_heads * args.num_rows, splits);
    }
    multiply<T>(args, head, first_row, first, tiles, logits);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const Range range = range_of(args, first_row + y + i);
      for (int j = 0; j < kPer; ++j) {
        if (!range.has(first + x + j)) continue;
        scores[j] += exp2f(logits[i][j] - log_sums[y + i]);
        ++counts[j];
      }
    }
  }
  for (int j = 0; j < kPer; ++j) {
    partial_scores[thread / kSide][x + j] = scores[j];
    partial_counts[thread / kSide][x + j] = counts[j];
  }
  __syncthreads();
  if (thread >= kTile || first + thread >= args.num_features) return;
  float score = 0.0f;
  int count = 0;
  for (int i = 0; i < kSide; ++i) {
    score += partial_scores[i][thread];
    count += partial_counts[i][thread];
  }
  args.scores[head * args.num_features + first + thread] =
      count > 0 ? score / static_cast<float>(count) : 0.0f;
}

void score_on_cores(const HeadwiseScoresArgs& args, const Splits& splits, RowSum* sums, Stream stream) {
  const auto heads = static_cast<unsigned>(args.num_heads);
  const auto row_tiles = static_cast<unsigned>(divide_up(args.num_rows, kTile));
  const auto feature_tiles = static_cast<unsigned>(divide_up(args.num_features, kTile));
  at_dtype(args.dtype, [&]<typename T>(const T*) {
    if (row_tiles > 0) {
      const dim3 grid(row_tiles, heads, static_cast<unsigned>(splits.count));
      launch(sum_rows<T>, grid, kThreads, stream, args, splits.tiles, sums);
    }
    launch(score_features<T>, dim3(feature_tiles, heads), kThreads, stream, args, splits.count, sums);
  });
}

Splits splits_of(const HeadwiseScoresArgs& args) {
  return fits_tensor_cores(args) ? tensor_core_splits(args) : split_features(args, kTile, kTile);
}

}  // namespace

std::int64_t headwise_scores_workspace(const HeadwiseScoresArgs& args) {
  return splits_of(args).count * args.num_heads * args.num_rows *
         static_cast<std::int64_t>(sizeof(RowSum) / sizeof(float));
}

void headwise_scores(const HeadwiseScoresArgs& args, float* workspace, Stream stream) {
  if (args.num_features == 0) return;
  HeadwiseScoresArgs in_bits = args;
  in_bits.scale *= kBitsPerNat;
  auto* const sums = reinterpret_cast<RowSum*>(workspace);
  if (fits_tensor_cores(args)) return score_on_tensor_cores(in_bits, sums, stream);
  score_on_cores(in_bits, splits_of(args), sums, stream);
}

}  // namespace trimserve::cuda
