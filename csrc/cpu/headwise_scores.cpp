// headwise_scores: how much the text attends to each visual feature, per query head.
//   q [T, H, Dh]   k [N, Hkv, Dh]   visibility [T, 2] int32: row t sees features [begin, end)
//   scores [H, N] float32: scores[h, n] = mean over the rows t that see n of
//     softmax(q[h, t] . k[h / (H / Hkv)] * scale, over what t sees)[n]; 0 where no row sees n.
//
//   The lanes of a vector are text rows. A block of kRowVectors vectors of one head's rows has its queries transposed
//   once; keys are read where they lie, one component at a time for all rows. Logits of the block go to a buffer
//   [N, rows of the block], are normalised there and added to the scores: [T, N] or [H, T, N] never exists. Maxima and
//   sums are lane by lane; lanes are added up at the end only, kWidth features at once. Reads k once per block. Heads
//   are independent and rows are added in order, so results repeat bit for bit for any number of threads.
//   With log_sums [H, T], which attention found, a logit becomes a weight by itself: one pass over the logits, not
//   three.

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kRowVectors = 2;
constexpr int kMaxRows = kRowVectors * 16;  // of a block, with the widest vectors
constexpr int kPadding = 16;                // features behind the last that may be written

// Features of the register tile: with two vectors of rows as many as leave registers for the operands.
template <int kWidth>
constexpr int kTileFeatures = kWidth == 16 ? 12 : 6;

struct Workspace {
  float* logits;       // [N + kPadding, rows of a block]
  float* queries;      // [Dh, rows of a block], scaled
  float* keys;         // [kTileFeatures, Dh]
  float* row_weights;  // [N + 1]: 1 / number of rows that see a feature
};

Workspace divide(const HeadwiseScoresArgs& args, float* workspace) {
  float* const queries = workspace + (args.num_features + kPadding) * kMaxRows;
  float* const keys = queries + args.head_dim * kMaxRows;
  return {workspace, queries, keys, keys + kPadding * args.head_dim};
}

TRIMSERVE_INLINE void count_rows(const HeadwiseScoresArgs& args, float* row_weights) {
  const std::int64_t n = args.num_features;
  std::fill_n(row_weights, n + 1, 0.0f);
  for (std::int64_t t = 0; t < args.num_rows; ++t) {
    row_weights[args.visibility[2 * t]] += 1.0f;
    row_weights[args.visibility[2 * t + 1]] -= 1.0f;
  }
  float count = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    count += row_weights[i];
    row_weights[i] = count > 0.0f ? 1.0f / count : 0.0f;
  }
}

// Some rows that see at least one feature, a lane each. Lanes without a row see nothing.
template <int kWidth>
struct RowBlock {
  using Ints = typename Simd<kWidth>::Ints;
  static constexpr int kRows = kRowVectors * kWidth;

  std::array<std::int64_t, kRows> rows;
  int size = 0;
  std::array<std::int32_t, kRows> begins{}, ends{};
  std::int32_t begin = std::numeric_limits<std::int32_t>::max();  // of what they see together
  std::int32_t end = 0;

  // Takes the next rows from t on.
  TRIMSERVE_INLINE RowBlock(const HeadwiseScoresArgs& args, std::int64_t& t) {
    for (; t < args.num_rows && size < kRows; ++t) {
      const std::int32_t first = args.visibility[2 * t], last = args.visibility[2 * t + 1];
      if (first == last) continue;
      begins[size] = first;
      ends[size] = last;
      rows[size++] = t;
      begin = std::min(begin, first);
      end = std::max(end, last);
    }
  }

  // All bits of the lanes of vector i that see feature n. By signs: GCC makes scalars of a comparison here.
  TRIMSERVE_INLINE void seeing(Ints& mask, int i, std::int32_t n) const {
    Ints first, last;
    std::memcpy(&first, &begins[i * kWidth], sizeof first);
    std::memcpy(&last, &ends[i * kWidth], sizeof last);
    mask = ((first - 1 - n) & (n - last)) >> 31;
  }
};

// x where mask has all bits, otherwise where it has none.
template <int kWidth>
TRIMSERVE_INLINE void choose(typename Simd<kWidth>::Floats& x, const typename Simd<kWidth>::Ints& mask,
                             float otherwise) {
  typename Simd<kWidth>::Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits & mask) | (std::bit_cast<std::int32_t>(otherwise) & ~mask);
  std::memcpy(&x, &bits, sizeof x);
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void transpose_queries(const HeadwiseScoresArgs& args, const RowBlock<kWidth>& block,
                                        std::int64_t head, float* queries) {
  constexpr int kRows = RowBlock<kWidth>::kRows;
  const auto* const q = static_cast<const Element<dtype>*>(args.q) + head * args.head_dim;
  std::fill_n(queries, args.head_dim * kRows, 0.0f);
  for (int r = 0; r < block.size; ++r) {
    const Element<dtype>* const query = q + block.rows[r] * args.q_stride;
    for (std::int64_t d = 0; d < args.head_dim; ++d)
      queries[d * kRows + r] = query[d].to_float() * args.scale;
  }
}

// Keys as rows of float32, `stride` apart: where they lie, or copied.
template <DType dtype>
TRIMSERVE_INLINE const float* float_keys(const Element<dtype>* keys, std::int64_t count,
                                         const HeadwiseScoresArgs& args, float* copy, std::int64_t& stride) {
  if constexpr (dtype == DType::kFloat32) {
    stride = args.k_stride;
    return &keys->value;
  } else {
    stride = args.head_dim;
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t d = 0; d < stride; ++d) copy[i * stride + d] = keys[i * args.k_stride + d].to_float();
    }
    return copy;
  }
}

// logits[i, rows] = keys[i] . queries for kFeatures features and kVectors vectors of rows.
template <int kWidth, int kVectors, int kFeatures>
TRIMSERVE_INLINE void multiply_tile(const float* queries, const float* keys, std::int64_t stride,
                                    std::int64_t head_dim, float* logits) {
  using Vectors = Simd<kWidth>;
  constexpr int kRows = RowBlock<kWidth>::kRows;
  typename Vectors::Floats sums[kFeatures][kVectors], q[kVectors];
  unrolled<kFeatures>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA { sums[i][j] = typename Vectors::Floats{}; });
  });
  for (std::int64_t d = 0; d < head_dim; ++d) {
    unrolled<kVectors>(
        [&](auto j) TRIMSERVE_INLINE_LAMBDA { Vectors::load(q[j], queries + d * kRows + j * kWidth); });
    unrolled<kFeatures>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      const float key = keys[i * stride + d];
      unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA { sums[i][j] += key * q[j]; });
    });
  }
  unrolled<kFeatures>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>(
        [&](auto j) TRIMSERVE_INLINE_LAMBDA { Vectors::store(logits + i * kRows + j * kWidth, sums[i][j]); });
  });
}

template <int kWidth, int kVectors, DType dtype>
TRIMSERVE_INLINE void multiply(const HeadwiseScoresArgs& args, const RowBlock<kWidth>& block,
                               std::int64_t kv_head, const Workspace& ws) {
  constexpr int kFeatures = kTileFeatures<kWidth>, kRows = RowBlock<kWidth>::kRows;
  const auto* const keys = static_cast<const Element<dtype>*>(args.k) + kv_head * args.head_dim;
  std::int64_t n = block.begin, stride;
  for (; n + kFeatures <= block.end; n += kFeatures) {
    const float* const tile = float_keys(keys + n * args.k_stride, kFeatures, args, ws.keys, stride);
    multiply_tile<kWidth, kVectors, kFeatures>(ws.queries, tile, stride, args.head_dim,
                                               ws.logits + n * kRows);
  }
  for (; n < block.end; ++n) {
    const float* const tile = float_keys(keys + n * args.k_stride, 1, args, ws.keys, stride);
    multiply_tile<kWidth, kVectors, 1>(ws.queries, tile, stride, args.head_dim, ws.logits + n * kRows);
  }
}

// The logits of vector i become exponentials under each lane's maximum, 0 where it sees nothing; `inverse` is one over
// their sum.
template <int kWidth>
TRIMSERVE_INLINE void exponentiate(const RowBlock<kWidth>& block, int i, float* column,
                                   typename Simd<kWidth>::Floats& inverse) {
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;
  constexpr int kRows = RowBlock<kWidth>::kRows;
  Floats x, maximum = Floats{} + kMinusInfinity, sum = {};
  typename Vectors::Ints seen;
  for (std::int32_t n = block.begin; n < block.end; ++n) {
    Vectors::load(x, column + n * kRows);
    block.seeing(seen, i, n);
    choose<kWidth>(x, seen, kMinusInfinity);
    maximum = x > maximum ? x : maximum;
  }
  for (std::int32_t n = block.begin; n < block.end; ++n) {
    Vectors::load(x, column + n * kRows);
    x -= maximum;
    Vectors::exp_of_nonpositive(x);
    block.seeing(seen, i, n);
    choose<kWidth>(x, seen, 0.0f);
    Vectors::store(column + n * kRows, x);
    sum += x;
  }
  inverse = 1.0f / sum;
}

// scores += what each lane's softmax gives, summed over lanes. log_sums: of the lanes, or null. Overwrites the logits.
template <int kWidth>
TRIMSERVE_INLINE void add_softmax(const RowBlock<kWidth>& block, const float* log_sums, float* logits,
                                  float* scores) {
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;
  constexpr int kRows = RowBlock<kWidth>::kRows;
  const int num_vectors = block.size > kWidth ? 2 : 1;
  for (int i = 0; i < num_vectors; ++i) {
    float* const column = logits + i * kWidth;
    Floats inverse{}, log_sum{};
    typename Vectors::Ints seen;
    if (log_sums) {
      Vectors::load(log_sum, log_sums + i * kWidth);
    } else {
      exponentiate<kWidth>(block, i, column, inverse);
    }
    for (std::int32_t n = block.begin; n < block.end; n += kWidth) {
      Floats weights[kWidth];
      unrolled<kWidth>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
        block.seeing(seen, i, n + j);
        Vectors::load(weights[j], column + (n + j) * kRows);
        if (log_sums) {
          weights[j] -= log_sum;
          Vectors::exp_of_nonpositive(weights[j]);
        } else {
          weights[j] *= inverse;
        }
        choose<kWidth>(weights[j], seen, 0.0f);  // a row with NaN spoils only what it sees
      });
      Vectors::sum_lanes(weights);
      float sums[kWidth];
      Vectors::store(sums, weights[0]);
      for (int j = 0; j < std::min(kWidth, block.end - n); ++j) scores[n + j] += sums[j];
    }
  }
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void score_heads(const HeadwiseScoresArgs& args, std::int64_t begin, std::int64_t end,
                                  const Workspace& ws) {
  count_rows(args, ws.row_weights);
  const std::int64_t num_features = args.num_features, heads_per_kv_head = args.num_heads / args.num_kv_heads;
  for (std::int64_t head = begin; head < end; ++head) {
    float* const scores = args.scores + head * num_features;
    std::fill_n(scores, num_features, 0.0f);
    for (std::int64_t t = 0; t < args.num_rows;) {
      const RowBlock<kWidth> block(args, t);
      transpose_queries<kWidth, dtype>(args, block, head, ws.queries);
      if (block.size > kWidth) {
        multiply<kWidth, 2, dtype>(args, block, head / heads_per_kv_head, ws);
      } else {
        multiply<kWidth, 1, dtype>(args, block, head / heads_per_kv_head, ws);
      }
      std::array<float, RowBlock<kWidth>::kRows> log_sums{};
      for (int r = 0; args.log_sums && r < block.size; ++r)
        log_sums[r] = args.log_sums[head * args.num_rows + block.rows[r]];
      add_softmax<kWidth>(block, args.log_sums ? log_sums.data() : nullptr, ws.logits, scores);
    }
    for (std::int64_t n = 0; n < num_features; ++n) scores[n] *= ws.row_weights[n];
  }
}

}  // namespace

std::int64_t headwise_scores_workspace(const HeadwiseScoresArgs& args) {
  return (args.num_features + kPadding) * kMaxRows + args.head_dim * (kMaxRows + kPadding) +
         args.num_features + 1;
}

void headwise_scores(const HeadwiseScoresArgs& args, std::int64_t begin, std::int64_t end, float* workspace) {
  const Workspace ws = divide(args, workspace);
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype,
             [&](auto dtype) TRIMSERVE_INLINE_LAMBDA { score_heads<width, dtype>(args, begin, end, ws); });
  });
}

}  // namespace trimserve::cpu
