// paged_attention: one row of each sequence attends to the sequence's positions, whose keys and values lie in pages.
//   q, attended [B, H, Dh]   pages [P, G, 2, Hkv, 16, Dh], one layer   tables [B, max_pages] int32   lengths [B] int32
//   attended[b, h] = sum over positions p < lengths[b] of softmax(q[b, h] . k[p] * scale + bias[b, p])[p] * v[p], k and v of
//     KV head h / (H / Hkv) in page tables[b, p / 16] at offset p % 16; 0 where lengths[b] is 0.
//
//   A sequence is cut into pieces of kPiecePositions; an item is one KV head of one piece. It goes through the
//   piece's keys for the logits of all query heads of the group, takes their softmax, then goes through the values: a
//   block (one page, one head) is contiguous, comes from memory once and from cache for the group's other heads. A
//   sequence of one piece is finished then; longer ones leave sums, maxima and totals that merge_pieces adds up in
//   order. Pieces depend on the sequence's own length only, so results repeat bit for bit for any number of threads
//   and in any company. Arithmetic in float32.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kPiecePositions = 512;  // logits of a piece stay in the first-level cache
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kPiecePositions % kPagePositions == 0);

TRIMSERVE_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Also a sequence without positions has a page and a piece: an item must write its zeros.
TRIMSERVE_INLINE std::int64_t num_pages(std::int64_t num_positions) {
  return std::max<std::int64_t>(divide_up(num_positions, kPagePositions), 1);
}

TRIMSERVE_INLINE std::int64_t num_pieces(std::int64_t length) {
  return std::max<std::int64_t>(divide_up(length, kPiecePositions), 1);
}

// The vectors to use: the widest that head_dim is a multiple of, or the narrowest.
int vector_width(std::int64_t head_dim) {
  static const int widest = widest_vector();
  int width = widest;
  while (width > 4 && head_dim % width != 0) width /= 2;
  return width;
}

std::int64_t padded_head_dim(std::int64_t head_dim) {
  const int width = vector_width(head_dim);
  return divide_up(head_dim, width) * width;
}

// One KV head of one piece: positions [begin, end).
struct Item {
  std::int64_t sequence;
  std::int64_t kv_head;
  std::int64_t begin;
  std::int64_t end;
  float* partials;  // of the group's first head; null: the piece is the whole sequence
};

// What a piece leaves of one head: weighted sum of values [Dh], largest logit, total of the weights.
TRIMSERVE_INLINE std::int64_t partial_size(const PagedAttentionArgs& args) { return args.head_dim + 2; }

struct Workspace {
  float* logits;    // [group, kPiecePositions], the group being the query heads of one KV head; then weights
  float* block;     // [kPagePositions, padded Dh]
  float* queries;   // [group, padded Dh], scaled
  float* attended;  // [group, padded Dh], weighted sums of values
  float* maxima;    // [group], largest logits
  float* totals;    // [group], of the weights
};

template <DType dtype>
TRIMSERVE_INLINE void store_row(const float* row, float factor, std::int64_t head_dim, Element<dtype>* out) {
  for (std::int64_t d = 0; d < head_dim; ++d) out[d] = Element<dtype>::from_float(row[d] * factor);
}

// The page's block as float32 rows, padded_dim apart: where it lies if it has that form, else copied.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE const float* load_block(const Element<dtype>* block, std::int64_t head_dim,
                                         std::int64_t padded_dim, float* floats) {
  if constexpr (dtype == DType::kFloat32) {
    if (head_dim == padded_dim) return &block->value;
  }
  for (std::int64_t p = 0; p < kPagePositions; ++p) {
    for (std::int64_t d = 0; d < head_dim; ++d)
      floats[p * padded_dim + d] = block[p * head_dim + d].to_float();
    for (std::int64_t d = head_dim; d < padded_dim; ++d) floats[p * padded_dim + d] = 0.0f;
  }
  return floats;
}

// logits[0..kPagePositions) = keys . query
template <int kWidth>
TRIMSERVE_INLINE void multiply_keys(const float* query, const float* keys, std::int64_t padded_dim,
                                    float* logits) {
  using Vectors = Simd<kWidth>;
  for (std::int64_t p = 0; p < kPagePositions; p += kWidth) {
    typename Vectors::Floats sums[kWidth] = {}, q, k;
    for (std::int64_t d = 0; d < padded_dim; d += kWidth) {
      Vectors::load(q, query + d);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        Vectors::load(k, keys + (p + i) * padded_dim + d);
        sums[i] += q * k;
      }
    }
    Vectors::sum_lanes(sums);
    Vectors::store(logits + p, sums[0]);
  }
}

// logits[0..count) become exp(logit - maximum); up to whole pages they are overwritten.
template <int kWidth>
TRIMSERVE_INLINE void exponentiate(float* logits, std::int64_t count, float& maximum, float& total) {
  using Vectors = Simd<kWidth>;
  const std::int64_t end = divide_up(count, kPagePositions) * kPagePositions;
  std::fill(logits + count, logits + end, kMinusInfinity);

  typename Vectors::Floats x, maxima = typename Vectors::Floats{} + kMinusInfinity, totals = {};
  for (std::int64_t p = 0; p < end; p += kWidth) {
    Vectors::load(x, logits + p);
    maxima = x > maxima ? x : maxima;
  }
  maximum = kMinusInfinity;
  for (int lane = 0; lane < kWidth; ++lane) maximum = std::max(maximum, maxima[lane]);
  const float shift = maximum == kMinusInfinity ? 0.0f : maximum;  // all weights 0 then, not NaN

  for (std::int64_t p = 0; p < end; p += kWidth) {
    Vectors::load(x, logits + p);
    x -= shift;
    Vectors::exp_of_nonpositive(x);
    Vectors::store(logits + p, x);
    totals += x;
  }
  total = 0.0f;
  for (int lane = 0; lane < kWidth; ++lane) total += totals[lane];
}

// attended[0..kVectors * kWidth) += weights[0..count) . values. Positions from count on may be NaN.
template <int kWidth, int kVectors>
TRIMSERVE_INLINE void add_values(const float* weights, const float* values, std::int64_t count,
                                 std::int64_t padded_dim, float* attended) {
  using Vectors = Simd<kWidth>;
  typename Vectors::Floats sums[kVectors], v;
  for (int i = 0; i < kVectors; ++i) Vectors::load(sums[i], attended + i * kWidth);
  for (std::int64_t p = 0; p < count; ++p) {
    for (int i = 0; i < kVectors; ++i) {
      Vectors::load(v, values + p * padded_dim + i * kWidth);
      sums[i] += weights[p] * v;
    }
  }
  for (int i = 0; i < kVectors; ++i) Vectors::store(attended + i * kWidth, sums[i]);
}

template <int kWidth>
TRIMSERVE_INLINE void multiply_values(const float* weights, const float* values, std::int64_t count,
                                      std::int64_t padded_dim, float* attended) {
  constexpr int kVectors = 4;
  std::int64_t d = 0;
  for (; d + kVectors * kWidth <= padded_dim; d += kVectors * kWidth)
    add_values<kWidth, kVectors>(weights, values + d, count, padded_dim, attended + d);
  for (; d < padded_dim; d += kWidth)
    add_values<kWidth, 1>(weights, values + d, count, padded_dim, attended + d);
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void load_queries(const Element<dtype>* q, std::int64_t group, std::int64_t head_dim,
                                   std::int64_t padded_dim, float scale, float* queries) {
  std::fill_n(queries, group * padded_dim, 0.0f);
  for (std::int64_t h = 0; h < group; ++h) {
    for (std::int64_t d = 0; d < head_dim; ++d)
      queries[h * padded_dim + d] = q[h * head_dim + d].to_float() * scale;
  }
}

// The item's part of ws.attended, ws.maxima and ws.totals.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void attend(const PagedAttentionArgs& args, const Item& item, const Workspace& ws) {
  const std::int64_t head_dim = args.head_dim, padded_dim = divide_up(head_dim, kWidth) * kWidth;
  const std::int64_t group = args.num_heads / args.num_kv_heads, count = item.end - item.begin;
  const auto* const q = static_cast<const Element<dtype>*>(args.q) + item.sequence * args.q_stride;
  load_queries<kWidth>(q + item.kv_head * group * head_dim, group, head_dim, padded_dim, args.scale,
                       ws.queries);
  std::fill_n(ws.attended, group * padded_dim, 0.0f);

  const std::int64_t block_size = kPagePositions * head_dim;
  const std::int32_t* const table =
      args.tables + item.sequence * args.table_stride + item.begin / kPagePositions;
  const auto* const keys = static_cast<const Element<dtype>*>(args.pages) + item.kv_head * block_size;
  const auto* const values = keys + args.num_kv_heads * block_size;
  for (std::int64_t p = 0; p < count; p += kPagePositions) {
    const float* const block = load_block<kWidth>(keys + table[p / kPagePositions] * args.page_stride,
                                                  head_dim, padded_dim, ws.block);
    for (std::int64_t h = 0; h < group; ++h)
      multiply_keys<kWidth>(ws.queries + h * padded_dim, block, padded_dim,
                            ws.logits + h * kPiecePositions + p);
  }
  if (args.bias) {
    const float* const bias = args.bias + item.sequence * args.bias_stride + item.begin;
    for (std::int64_t h = 0; h < group; ++h) {
      for (std::int64_t p = 0; p < count; ++p) ws.logits[h * kPiecePositions + p] += bias[p];
    }
  }
  for (std::int64_t h = 0; h < group; ++h)
    exponentiate<kWidth>(ws.logits + h * kPiecePositions, count, ws.maxima[h], ws.totals[h]);
  for (std::int64_t p = 0; p < count; p += kPagePositions) {
    const float* const block = load_block<kWidth>(values + table[p / kPagePositions] * args.page_stride,
                                                  head_dim, padded_dim, ws.block);
    for (std::int64_t h = 0; h < group; ++h) {
      multiply_values<kWidth>(ws.logits + h * kPiecePositions + p, block, std::min(kPagePositions, count - p),
                              padded_dim, ws.attended + h * padded_dim);
    }
  }
}

// Where the item's heads go: finished to args.attended, or as partials.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void store_item(const PagedAttentionArgs& args, const Item& item, const Workspace& ws) {
  const std::int64_t head_dim = args.head_dim, padded_dim = divide_up(head_dim, kWidth) * kWidth;
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  const std::int64_t first_row = item.sequence * args.num_heads + item.kv_head * group;
  for (std::int64_t h = 0; h < group; ++h) {
    const float* const row = ws.attended + h * padded_dim;
    if (item.partials) {
      float* const partial = item.partials + h * partial_size(args);
      std::copy_n(row, head_dim, partial);
      partial[head_dim] = ws.maxima[h];
      partial[head_dim + 1] = ws.totals[h];
    } else {
      const bool is_empty = item.begin == item.end;
      store_row(row, is_empty ? 0.0f : 1.0f / ws.totals[h], head_dim,
                static_cast<Element<dtype>*>(args.attended) + (first_row + h) * head_dim);
    }
  }
}

// The items whose first page is in [begin, end), pages counted in the order of sequences, pieces, heads.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void attend_pages(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end,
                                   float* partials, const Workspace& ws) {
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  std::int64_t page = 0;
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t length = args.lengths[b], pieces = num_pieces(length);
    for (std::int64_t i = 0; i < pieces; ++i) {
      Item item{b, 0, i * kPiecePositions, 0, nullptr};
      item.end = std::min(item.begin + kPiecePositions, length);
      for (; item.kv_head < args.num_kv_heads; ++item.kv_head, page += num_pages(item.end - item.begin)) {
        if (page < begin || page >= end) continue;
        item.partials = pieces > 1 ? partials + item.kv_head * group * partial_size(args) : nullptr;
        attend<kWidth, dtype>(args, item, ws);
        store_item<kWidth, dtype>(args, item, ws);
      }
      if (pieces > 1) partials += args.num_heads * partial_size(args);
    }
  }
}

template <int kWidth>
TRIMSERVE_INLINE void attend_pages_of_dtype(const PagedAttentionArgs& args, std::int64_t begin,
                                            std::int64_t end, float* partials, const Workspace& ws) {
  switch (args.dtype) {
    case DType::kFloat32:
      return attend_pages<kWidth, DType::kFloat32>(args, begin, end, partials, ws);
    case DType::kBFloat16:
      return attend_pages<kWidth, DType::kBFloat16>(args, begin, end, partials, ws);
    case DType::kFloat16:
      return attend_pages<kWidth, DType::kFloat16>(args, begin, end, partials, ws);
  }
}

TRIMSERVE_TARGET_AVX512
void attend_pages_16(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                     const Workspace& ws) {
  attend_pages_of_dtype<16>(args, begin, end, partials, ws);
}

TRIMSERVE_TARGET_AVX2
void attend_pages_8(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                    const Workspace& ws) {
  attend_pages_of_dtype<8>(args, begin, end, partials, ws);
}

void attend_pages_4(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                    const Workspace& ws) {
  attend_pages_of_dtype<4>(args, begin, end, partials, ws);
}

Workspace divide(const PagedAttentionArgs& args, float* workspace) {
  const std::int64_t group = args.num_heads / args.num_kv_heads, padded_dim = padded_head_dim(args.head_dim);
  float* const logits = workspace;
  float* const block = logits + group * kPiecePositions;
  float* const queries = block + kPagePositions * padded_dim;
  float* const attended = queries + group * padded_dim;
  float* const maxima = attended + group * padded_dim;
  return {logits, block, queries, attended, maxima, maxima + group};
}

// partials: of one head, `stride` apart. The first becomes the sum, weighted to a common maximum.
float merge_head(float* partials, std::int64_t stride, std::int64_t pieces, std::int64_t head_dim) {
  float maximum = kMinusInfinity, total = 0.0f;
  for (std::int64_t i = 0; i < pieces; ++i) maximum = std::max(maximum, partials[i * stride + head_dim]);
  const float shift = maximum == kMinusInfinity ? 0.0f : maximum;
  for (std::int64_t i = 0; i < pieces; ++i) {
    const float* const partial = partials + i * stride;
    const float weight = std::exp(partial[head_dim] - shift);
    total += weight * partial[head_dim + 1];
    for (std::int64_t d = 0; d < head_dim; ++d)
      partials[d] = (i == 0 ? 0.0f : partials[d]) + weight * partial[d];
  }
  return total;
}

template <DType dtype>
void merge_sequences(const PagedAttentionArgs& args, float* partials) {
  auto* const attended = static_cast<Element<dtype>*>(args.attended);
  const std::int64_t size = partial_size(args), stride = args.num_heads * size;
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t pieces = num_pieces(args.lengths[b]);
    if (pieces == 1) continue;
    for (std::int64_t h = 0; h < args.num_heads; ++h) {
      const float total = merge_head(partials + h * size, stride, pieces, args.head_dim);
      store_row(partials + h * size, 1.0f / total, args.head_dim,
                attended + (b * args.num_heads + h) * args.head_dim);
    }
    partials += pieces * stride;
  }
}

}  // namespace

PagedAttentionSizes paged_attention_sizes(const PagedAttentionArgs& args) {
  const std::int64_t group = args.num_heads / args.num_kv_heads, padded_dim = padded_head_dim(args.head_dim);
  PagedAttentionSizes sizes{};
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t pieces = num_pieces(args.lengths[b]);
    sizes.num_pages += args.num_kv_heads * num_pages(args.lengths[b]);
    if (pieces > 1) sizes.partials += pieces * args.num_heads * partial_size(args);
  }
  sizes.workspace = group * (kPiecePositions + 2 * padded_dim + 2) + kPagePositions * padded_dim;
  return sizes;
}

void paged_attention(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                     float* workspace) {
  const int width = vector_width(args.head_dim);
  const auto attend_here = width == 16 ? attend_pages_16 : width == 8 ? attend_pages_8 : attend_pages_4;
  attend_here(args, begin, end, partials, divide(args, workspace));
}

void merge_pieces(const PagedAttentionArgs& args, float* partials) {
  switch (args.dtype) {
    case DType::kFloat32:
      return merge_sequences<DType::kFloat32>(args, partials);
    case DType::kBFloat16:
      return merge_sequences<DType::kBFloat16>(args, partials);
    case DType::kFloat16:
      return merge_sequences<DType::kFloat16>(args, partials);
  }
}

}  // namespace trimserve::cpu
