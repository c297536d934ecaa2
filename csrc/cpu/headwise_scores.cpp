// headwise_scores: how much the text attends to each visual feature, per query head.
//   q [T, H, Dh]   k [N, Hkv, Dh]   visibility [T, 2] int32: row t sees features [begin, end)
//   scores [H, N] float32: scores[h, n] = mean over the rows t that see n of
//     softmax(q[h, t] . k[h / (H / Hkv)] * scale, over what t sees)[n]; 0 where no row sees n.
//
//   A head's keys are converted to float32 once, in panels of kPanel features, so that a vector holds one
//   component of several features and products need no horizontal sums; heads of one KV head share them. Then
//   kRowBlock rows at a time: their logits go to a buffer [kRowBlock, N], each row is normalised there and
//   added to the scores. [T, N] or [H, T, N] never exists. Reads k once per KV head, its panels once per
//   kRowBlock rows, q once. Heads are independent and rows are added in order, so results repeat bit for bit
//   for any number of threads.

#include <algorithm>
#include <array>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {
namespace {

constexpr int kTileRows = 6;  // rows of the register tile: 6 x 16 floats leave registers for operands on AVX2
constexpr int kRowBlock = 8 * kTileRows;
constexpr int kPanel = 16;  // features of a panel and of the register tile: a multiple of every vector width

TRIMSERVE_INLINE std::int64_t round_up(std::int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

struct Workspace {
  float* panels;       // [N / kPanel, Dh, kPanel], N rounded up
  float* logits;       // [kRowBlock, N rounded up]
  float* queries;      // [kRowBlock, Dh]
  float* row_weights;  // [N + 1]: 1 / number of rows that see a feature
};

TRIMSERVE_INLINE Workspace divide(const HeadwiseScoresArgs& args, float* workspace) {
  const std::int64_t padded = round_up(args.num_features);
  float* const panels = workspace;
  float* const logits = panels + padded * args.head_dim;
  float* const queries = logits + kRowBlock * padded;
  return {panels, logits, queries, queries + kRowBlock * args.head_dim};
}

// Some rows that see at least one feature, and the features that they see together.
struct RowBlock {
  std::array<std::int64_t, kRowBlock> rows;
  int size = 0;
  std::int64_t begin = std::numeric_limits<std::int64_t>::max();
  std::int64_t end = 0;
};

TRIMSERVE_INLINE RowBlock next_rows(const HeadwiseScoresArgs& args, std::int64_t& t) {
  RowBlock block;
  for (; t < args.num_rows && block.size < kRowBlock; ++t) {
    const std::int64_t begin = args.visibility[2 * t], end = args.visibility[2 * t + 1];
    if (begin == end) continue;
    block.rows[block.size++] = t;
    block.begin = std::min(block.begin, begin);
    block.end = std::max(block.end, end);
  }
  return block;
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

template <DType dtype>
TRIMSERVE_INLINE void pack_keys(const HeadwiseScoresArgs& args, std::int64_t kv_head, float* panels) {
  const auto* keys = static_cast<const Element<dtype>*>(args.k) + kv_head * args.head_dim;
  const std::int64_t padded = round_up(args.num_features);
  for (std::int64_t n = 0; n < padded; ++n) {
    float* column = panels + n / kPanel * kPanel * args.head_dim + n % kPanel;
    const Element<dtype>* key = keys + n * args.k_stride;
    const bool is_padding = n >= args.num_features;
    for (std::int64_t d = 0; d < args.head_dim; ++d)
      column[d * kPanel] = is_padding ? 0.0f : key[d].to_float();
  }
}

template <DType dtype>
TRIMSERVE_INLINE void load_queries(const HeadwiseScoresArgs& args, const RowBlock& block, std::int64_t head,
                                   float* queries) {
  const auto* q = static_cast<const Element<dtype>*>(args.q) + head * args.head_dim;
  for (int r = 0; r < block.size; ++r) {
    const Element<dtype>* query = q + block.rows[r] * args.q_stride;
    for (std::int64_t d = 0; d < args.head_dim; ++d) queries[r * args.head_dim + d] = query[d].to_float();
  }
  // The last tile is computed whole; what its missing rows give is never read.
  std::fill(queries + block.size * args.head_dim, queries + kRowBlock * args.head_dim, 0.0f);
}

// logits[r, 0..kPanel) = queries[r] . panel * scale, for kTileRows rows.
template <int kWidth>
TRIMSERVE_INLINE void multiply_tile(const float* queries, const float* panel, std::int64_t head_dim,
                                    float scale, float* logits, std::int64_t logits_stride) {
  using Vectors = Simd<kWidth>;
  constexpr int kParts = kPanel / kWidth;
  typename Vectors::Floats sums[kTileRows][kParts] = {};
  for (std::int64_t d = 0; d < head_dim; ++d) {
    typename Vectors::Floats keys[kParts];
    for (int i = 0; i < kParts; ++i) Vectors::load(keys[i], panel + d * kPanel + i * kWidth);
    for (int r = 0; r < kTileRows; ++r) {
      for (int i = 0; i < kParts; ++i) sums[r][i] += queries[r * head_dim + d] * keys[i];
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int i = 0; i < kParts; ++i)
      Vectors::store(logits + r * logits_stride + i * kWidth, sums[r][i] * scale);
  }
}

template <int kWidth>
TRIMSERVE_INLINE void multiply(const HeadwiseScoresArgs& args, const RowBlock& block, const Workspace& ws) {
  const std::int64_t padded = round_up(args.num_features);
  for (std::int64_t n = block.begin / kPanel * kPanel; n < block.end; n += kPanel) {
    for (int r = 0; r < block.size; r += kTileRows) {
      multiply_tile<kWidth>(ws.queries + r * args.head_dim, ws.panels + n * args.head_dim, args.head_dim,
                            args.scale, ws.logits + r * padded + n, padded);
    }
  }
}

// scores[begin, end) += softmax(logits[begin, end)). Overwrites logits, also up to whole vectors on both
// sides.
template <int kWidth>
TRIMSERVE_INLINE void add_softmax(float* logits, std::int64_t begin, std::int64_t end, float* scores) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  using Vectors = Simd<kWidth>;
  const std::int64_t first = begin / kPanel * kPanel, last = round_up(end);
  std::fill(logits + first, logits + begin, kMinusInfinity);
  std::fill(logits + end, logits + last, kMinusInfinity);

  typename Vectors::Floats x, maxima = typename Vectors::Floats{} + kMinusInfinity, sums = {};
  for (std::int64_t n = first; n < last; n += kWidth) {
    Vectors::load(x, logits + n);
    maxima = x > maxima ? x : maxima;
  }
  float maximum = maxima[0];
  for (int lane = 1; lane < kWidth; ++lane) maximum = std::max(maximum, maxima[lane]);

  for (std::int64_t n = first; n < last; n += kWidth) {
    Vectors::load(x, logits + n);
    x -= maximum;
    Vectors::exp_of_nonpositive(x);
    Vectors::store(logits + n, x);
    sums += x;
  }
  float sum = 0.0f;
  for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];

  const float inverse = 1.0f / sum;
  for (std::int64_t n = begin; n < end; ++n) scores[n] += logits[n] * inverse;
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void score_heads(const HeadwiseScoresArgs& args, std::int64_t begin, std::int64_t end,
                                  const Workspace& ws) {
  count_rows(args, ws.row_weights);
  const std::int64_t num_features = args.num_features, heads_per_kv_head = args.num_heads / args.num_kv_heads;
  for (std::int64_t head = begin; head < end; ++head) {
    if (head == begin || head % heads_per_kv_head == 0) {
      pack_keys<dtype>(args, head / heads_per_kv_head, ws.panels);
    }
    float* const scores = args.scores + head * num_features;
    std::fill_n(scores, num_features, 0.0f);
    for (std::int64_t t = 0; t < args.num_rows;) {
      const RowBlock block = next_rows(args, t);
      load_queries<dtype>(args, block, head, ws.queries);
      multiply<kWidth>(args, block, ws);
      for (int r = 0; r < block.size; ++r) {
        const std::int32_t* range = args.visibility + 2 * block.rows[r];
        add_softmax<kWidth>(ws.logits + r * round_up(num_features), range[0], range[1], scores);
      }
    }
    for (std::int64_t n = 0; n < num_features; ++n) scores[n] *= ws.row_weights[n];
  }
}

}  // namespace

std::int64_t headwise_scores_workspace(const HeadwiseScoresArgs& args) {
  const std::int64_t padded = round_up(args.num_features);
  return padded * args.head_dim + kRowBlock * (padded + args.head_dim) + args.num_features + 1;
}

void headwise_scores(const HeadwiseScoresArgs& args, std::int64_t begin, std::int64_t end, float* workspace) {
  const Workspace ws = divide(args, workspace);
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype,
             [&](auto dtype) TRIMSERVE_INLINE_LAMBDA { score_heads<width, dtype>(args, begin, end, ws); });
  });
}

}  // namespace trimserve::cpu
