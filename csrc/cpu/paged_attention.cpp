// paged_attention: one row of each sequence attends to the sequence's positions, whose keys and values lie in pages.
//   q, attended [B, H, Dh]   pages [P, G, 2, Hkv, 16, Dh], one layer   tables [B, max_pages] int32   lengths [B] int32
//   bias [B, max_pages * 16] float32, or null for zeros
//   attended[b, h] = sum over positions p < lengths[b] of softmax(q[b, h] . k[p] * scale + bias[b, p])[p] * v[p],
//     k and v of KV head h / (H / Hkv) in page tables[b, p / 16] at offset p % 16; 0 where lengths[b] is 0.
//   int8 pages [.., 16, Dh + 2] have 16 times Dh integers, then 16 float16 that multiply them; they are widened in
//   registers only.
//
//   A sequence is cut into pieces of kPiecePositions. Some KV heads of a piece are processed together: keys to logits
//   for all their query heads, then softmax, then values. A page's keys are contiguous, so memory is read once and in
//   order, and the next blocks are prefetched meanwhile. A sequence of one piece is then finished; longer ones leave
//   sums, maxima and totals that merge_pieces combines in order. Pieces depend on the sequence's own length only, so
//   results repeat bit for bit for any number of threads and in any batch. Arithmetic in float32.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "page_blocks.h"
#include "simd.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kPiecePositions = 512;  // logits of a piece stay in the second cache, at most
constexpr std::int64_t kAheadBytes = 8192;     // to fetch: what is read until memory has answered
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kPiecePositions % kPagePositions == 0);

TRIMSERVE_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// An empty sequence also counts as one page and one piece, which write its zeros.
TRIMSERVE_INLINE std::int64_t num_pages(std::int64_t num_positions) {
  return std::max<std::int64_t>(divide_up(num_positions, kPagePositions), 1);
}

TRIMSERVE_INLINE std::int64_t num_pieces(std::int64_t length) {
  return std::max<std::int64_t>(divide_up(length, kPiecePositions), 1);
}

// Elements of a register: rows are padded to a multiple of it.
TRIMSERVE_INLINE std::int64_t register_size(int width, DType dtype) {
  return dtype == DType::kFloat32 ? width : 2 * width;
}

// The widest vectors whose registers rows of head_dim fill, or the narrowest.
int vector_width(const PagedAttentionArgs& args) {
  int width = widest_vector();
  while (width > 4 && args.head_dim % register_size(width, args.dtype) != 0) width /= 2;
  return width;
}

std::int64_t padded_head_dim(const PagedAttentionArgs& args) {
  const std::int64_t size = register_size(vector_width(args), args.dtype);
  return divide_up(args.head_dim, size) * size;
}

// What a piece leaves of one head: weighted sum of values in lane order, largest logit, total of the weights.
TRIMSERVE_INLINE std::int64_t partial_size(std::int64_t padded_dim) { return padded_dim + 2; }

// Some KV heads of one piece, positions [begin, end).
struct Item {
  std::int64_t sequence;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t first_kv_head;
  std::int64_t end_kv_head;
  float* partials;  // [H, partial_size]; null if the piece is the whole sequence
};

struct Workspace {
  std::int64_t padded_dim;
  float* logits;        // [H, kPiecePositions]; then weights
  float* queries;       // [H, padded_dim]
  float* attended;      // [H, padded_dim], weighted sums of values
  float* maxima;        // [H], largest logits
  float* totals;        // [H], of the weights
  float* query_scales;  // [H], what logits are multiplied with
  float* rows;          // [kPagePositions, padded_dim]
};

Workspace divide(const PagedAttentionArgs& args, float* workspace) {
  const std::int64_t padded_dim = padded_head_dim(args), padded_size = args.num_heads * padded_dim;
  float* const queries = workspace + args.num_heads * kPiecePositions;
  float* const attended = queries + padded_size;
  float* const maxima = attended + padded_size;
  float* const totals = maxima + args.num_heads;
  float* const query_scales = totals + args.num_heads;
  return {padded_dim, workspace, queries,      attended,
          maxima,     totals,    query_scales, query_scales + args.num_heads};
}

// Rows of head_dim elements as rows of padded_dim: where they lie, or copied.
template <typename Stored>
TRIMSERVE_INLINE const Stored* padded_rows(const Stored* rows, std::int64_t num_rows, std::int64_t head_dim,
                                           const Workspace& ws) {
  if (head_dim == ws.padded_dim) return rows;
  auto* const copy = reinterpret_cast<Stored*>(ws.rows);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    std::copy_n(rows + r * head_dim, head_dim, copy + r * ws.padded_dim);
    std::fill(copy + r * ws.padded_dim + head_dim, copy + (r + 1) * ws.padded_dim, Stored{});
  }
  return copy;
}

// out[0..head_dim) = row * factor. row: padded, in lane order.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void store_row(const float* row, float factor, std::int64_t head_dim, Element<dtype>* out) {
  using Row = Packed<kWidth, dtype>;
  constexpr std::int64_t kSize = Row::kVectors * kWidth;
  for (std::int64_t d = 0; d < head_dim; d += kSize) {
    typename Row::Floats x[Row::kVectors];
    std::memcpy(x, row + d, sizeof x);
    for (int i = 0; i < Row::kVectors; ++i) x[i] *= factor;
    if (d + kSize <= head_dim) {
      Row::store(out + d, x);
    } else {
      Element<dtype> last[kSize];
      Row::store(last, x);
      std::copy_n(last, head_dim - d, out + d);
    }
  }
}

// logits[h * kPiecePositions + p] of kHeads heads, p < count, become exp(logit - the head's maximum); up to whole pages
// they are overwritten. Several heads at once, because each step waits for the one before.
template <int kWidth, int kHeads>
TRIMSERVE_INLINE void exponentiate(float* logits, std::int64_t count, float* maxima, float* totals) {
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;
  const std::int64_t end = divide_up(count, kPagePositions) * kPagePositions;
  Floats x, shifts[kHeads], sums[kHeads];
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t p = count; p < end; ++p) logits[h * kPiecePositions + p] = kMinusInfinity;
    shifts[h] = Floats{} + kMinusInfinity;
    sums[h] = Floats{};
  });
  for (std::int64_t p = 0; p < end; p += kWidth) {
    unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
      Vectors::load(x, logits + h * kPiecePositions + p);
      shifts[h] = x > shifts[h] ? x : shifts[h];
    });
  }
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    Vectors::combine_lanes(shifts[h],
                           [](auto& a, const auto& b) TRIMSERVE_INLINE_LAMBDA { a = a > b ? a : b; });
    maxima[h] = shifts[h][0];
    shifts[h] = shifts[h] == kMinusInfinity ? Floats{} : shifts[h];  // all weights 0 then, not NaN
  });
  for (std::int64_t p = 0; p < end; p += kWidth) {
    unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
      Vectors::load(x, logits + h * kPiecePositions + p);
      x -= shifts[h];
      Vectors::exp_of_nonpositive(x);
      Vectors::store(logits + h * kPiecePositions + p, x);
      sums[h] += x;
    });
  }
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    Vectors::combine_lanes(sums[h], [](auto& a, const auto& b) TRIMSERVE_INLINE_LAMBDA { a += b; });
    totals[h] = sums[h][0];
  });
}

// The blocks of an item: its heads of a page, then those of the next page.
template <typename Stored>
struct Blocks {
  const Stored* first;  // of the item's first head in page 0
  const std::int32_t* table;
  std::int64_t num_pages;
  std::int64_t num_heads;
  std::int64_t page_stride;
  std::int64_t block_size;
  std::int64_t num_ahead;

  TRIMSERVE_INLINE const Stored* at(std::int64_t page, std::int64_t head) const {
    return first + table[page] * page_stride + head * block_size;
  }
  // What to fetch while the block (page, head) is worked on: kAheadBytes on, or of what comes `behind` these.
  TRIMSERVE_INLINE const Stored* ahead_of(std::int64_t page, std::int64_t head, std::int64_t behind) const {
    head += num_ahead;
    page += head / num_heads;
    head %= num_heads;
    return page < num_pages ? at(page, head) : at(std::min(page - num_pages, num_pages - 1), head) + behind;
  }
};

// The item's heads of ws.attended, ws.maxima and ws.totals.
template <typename Products>
TRIMSERVE_INLINE void attend(const PagedAttentionArgs& args, const Item& item, const Workspace& ws) {
  constexpr int kWidth = Products::width;
  constexpr DType dtype = Products::dtype;
  using Stored = typename Products::Stored;
  const std::int64_t head_dim = args.head_dim, padded_dim = ws.padded_dim,
                     group = args.num_heads / args.num_kv_heads;
  const std::int64_t first_head = item.first_kv_head * group, end_head = item.end_kv_head * group;
  const std::int64_t count = item.end - item.begin, pages = divide_up(count, kPagePositions);
  auto* const queries = reinterpret_cast<typename Products::Query*>(ws.queries);
  const auto* const q = static_cast<const Element<dtype>*>(args.q) + item.sequence * args.q_stride;
  for (std::int64_t h = first_head; h < end_head; ++h)
    ws.query_scales[h] = Products::pack_query(queries + h * padded_dim,
                                              padded_rows(q + h * head_dim, 1, head_dim, ws), padded_dim);
  std::fill(ws.attended + first_head * padded_dim, ws.attended + end_head * padded_dim, 0.0f);

  const std::int64_t row_size = head_dim + (Products::kHasScales ? kScaleBytes : 0),
                     block_size = kPagePositions * row_size, half_size = args.num_kv_heads * block_size;
  Blocks<Stored> blocks{static_cast<const Stored*>(args.pages) + item.first_kv_head * block_size,
                        args.tables + item.sequence * args.table_stride + item.begin / kPagePositions,
                        pages,
                        item.end_kv_head - item.first_kv_head,
                        args.page_stride,
                        block_size,
                        divide_up(kAheadBytes, block_size * sizeof(Stored))};
  for (std::int64_t page = 0; page < pages; ++page) {
    for (std::int64_t i = 0; i < blocks.num_heads; ++i) {
      const Stored* const stored = blocks.at(page, i);
      const Stored* const keys = padded_rows(stored, kPagePositions, head_dim, ws);
      const Stored* const ahead = blocks.ahead_of(page, i, half_size);
      const std::int64_t first = first_head + i * group;
      for_heads(group, [&](auto heads, std::int64_t h) TRIMSERVE_INLINE_LAMBDA {
        multiply_keys_of_heads<Products, heads>(
            queries + (first + h) * padded_dim, keys, padded_dim, args.scale,
            ws.logits + (first + h) * kPiecePositions + page * kPagePositions, kPiecePositions, ahead);
      });
      if constexpr (Products::kHasScales)
        multiply_scales<kWidth>(stored + kPagePositions * head_dim, ws.query_scales + first, group,
                                ws.logits + first * kPiecePositions + page * kPagePositions, kPiecePositions);
    }
  }
  const float* const bias = args.bias ? args.bias + item.sequence * args.bias_stride + item.begin : nullptr;
  for (std::int64_t h = first_head; bias && h < end_head; ++h) {
    for (std::int64_t p = 0; p < count; ++p) ws.logits[h * kPiecePositions + p] += bias[p];
  }
  for_heads(end_head - first_head, [&](auto heads, std::int64_t h) TRIMSERVE_INLINE_LAMBDA {
    h += first_head;
    exponentiate<kWidth, heads>(ws.logits + h * kPiecePositions, count, ws.maxima + h, ws.totals + h);
  });
  blocks.first += half_size;
  for (std::int64_t page = 0; page < pages; ++page) {
    for (std::int64_t i = 0; i < blocks.num_heads; ++i) {
      const Stored* const stored = blocks.at(page, i);
      const Stored* const values = padded_rows(stored, kPagePositions, head_dim, ws);
      const Stored* const ahead = blocks.ahead_of(page, i, 0);
      const std::int64_t first = first_head + i * group, p = page * kPagePositions;
      if constexpr (Products::kHasScales)
        multiply_scales<kWidth>(stored + kPagePositions * head_dim, nullptr, group,
                                ws.logits + first * kPiecePositions + p, kPiecePositions);
      for_heads(group, [&](auto heads, std::int64_t h) TRIMSERVE_INLINE_LAMBDA {
        add_values_of_heads<Products, heads>(ws.logits + (first + h) * kPiecePositions + p, kPiecePositions,
                                             values, std::min(kPagePositions, count - p), padded_dim,
                                             ws.attended + (first + h) * padded_dim, ahead);
      });
    }
  }
}

// Where the item's heads go: finished to args.attended, or as partials.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void store_item(const PagedAttentionArgs& args, const Item& item, const Workspace& ws) {
  const std::int64_t head_dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  auto* const attended =
      static_cast<Element<dtype>*>(args.attended) + item.sequence * args.num_heads * head_dim;
  for (std::int64_t h = item.first_kv_head * group; h < item.end_kv_head * group; ++h) {
    const float* const row = ws.attended + h * ws.padded_dim;
    if (item.partials) {
      float* const partial = item.partials + h * partial_size(ws.padded_dim);
      std::copy_n(row, ws.padded_dim, partial);
      partial[ws.padded_dim] = ws.maxima[h];
      partial[ws.padded_dim + 1] = ws.totals[h];
    } else {
      const float factor = item.begin == item.end ? 0.0f : 1.0f / ws.totals[h];
      store_row<kWidth>(row, factor, head_dim, attended + h * head_dim);
    }
  }
}

// The heads of pieces whose first page is in [begin, end), pages counted in the order of sequences, pieces, heads.
template <typename Products>
TRIMSERVE_INLINE void attend_pages(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end,
                                   float* partials, const Workspace& ws) {
  std::int64_t first_page = 0;
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t length = args.lengths[b], pieces = num_pieces(length);
    for (std::int64_t i = 0; i < pieces; ++i) {
      Item item{b, i * kPiecePositions, std::min((i + 1) * kPiecePositions, length), 0, 0, nullptr};
      const std::int64_t pages = num_pages(item.end - item.begin);
      const auto head_at = [&](std::int64_t page) {
        return std::clamp<std::int64_t>(divide_up(page - first_page, pages), 0, args.num_kv_heads);
      };
      item.first_kv_head = head_at(std::max(begin, first_page));
      item.end_kv_head = head_at(std::max(end, first_page));
      if (pieces > 1) item.partials = partials;
      if (item.first_kv_head < item.end_kv_head) {
        attend<Products>(args, item, ws);
        store_item<Products::width, Products::dtype>(args, item, ws);
      }
      first_page += pages * args.num_kv_heads;
      if (pieces > 1) partials += args.num_heads * partial_size(ws.padded_dim);
    }
  }
}

// The same of int8 pages.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void attend_int8(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end,
                                  float* partials, const Workspace& ws) {
  if constexpr (dtype == DType::kBFloat16) {
    if (kWidth == 16 && has_pair_products() &&
        args.head_dim <= kMostWords)  // machines that have one have both
      return attend_pages<Int8WordProducts<kWidth, kWidth == 16>>(args, begin, end, partials, ws);
    if (args.head_dim <= kMostWords)
      return attend_pages<Int8WordProducts<kWidth, false>>(args, begin, end, partials, ws);
  }
  attend_pages<Int8Products<kWidth, dtype>>(args, begin, end, partials, ws);
}

// One head of a sequence of several pieces, whose partials are `stride` apart.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void merge_head(float* partials, std::int64_t stride, std::int64_t pieces,
                                 std::int64_t padded_dim, std::int64_t head_dim, Element<dtype>* attended) {
  float maximum = kMinusInfinity, total = 0.0f;
  for (std::int64_t i = 0; i < pieces; ++i) maximum = std::max(maximum, partials[i * stride + padded_dim]);
  const float shift = maximum == kMinusInfinity ? 0.0f : maximum;
  for (std::int64_t i = 0; i < pieces; ++i) {
    const float* const partial = partials + i * stride;
    const float weight = std::exp(partial[padded_dim] - shift);
    total += weight * partial[padded_dim + 1];
    for (std::int64_t d = 0; d < padded_dim; ++d)
      partials[d] = (i == 0 ? 0.0f : partials[d]) + weight * partial[d];
  }
  store_row<kWidth>(partials, 1.0f / total, head_dim, attended);
}

}  // namespace

PagedAttentionSizes paged_attention_sizes(const PagedAttentionArgs& args) {
  const std::int64_t padded_dim = padded_head_dim(args);
  PagedAttentionSizes sizes{};
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t pieces = num_pieces(args.lengths[b]);
    sizes.num_pages += args.num_kv_heads * num_pages(args.lengths[b]);
    if (pieces > 1) sizes.partials += pieces * args.num_heads * partial_size(padded_dim);
  }
  sizes.workspace = args.num_heads * (kPiecePositions + 2 * padded_dim + 3) + kPagePositions * padded_dim;
  return sizes;
}

void paged_attention(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                     float* workspace) {
  const Workspace ws = divide(args, workspace);
  at_width(vector_width(args), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      if (args.is_int8) return attend_int8<width, dtype>(args, begin, end, partials, ws);
#ifdef __x86_64__
      if constexpr (width == PairProducts::width && dtype == PairProducts::dtype) {
        if (has_pair_products()) return attend_pages<PairProducts>(args, begin, end, partials, ws);
      }
#endif
      attend_pages<FloatProducts<width, dtype>>(args, begin, end, partials, ws);
    });
  });
}

void merge_pieces(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials) {
  const std::int64_t padded_dim = padded_head_dim(args), size = partial_size(padded_dim),
                     stride = args.num_heads * size;
  at_width(vector_width(args), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      auto* const attended = static_cast<Element<dtype>*>(args.attended);
      float* of_sequence = partials;
      for (std::int64_t b = 0; b < args.num_sequences; ++b) {
        const std::int64_t pieces = num_pieces(args.lengths[b]), first_row = b * args.num_heads;
        if (pieces == 1) continue;
        for (std::int64_t row = std::max(begin, first_row); row < std::min(end, first_row + args.num_heads);
             ++row) {
          merge_head<width>(of_sequence + (row - first_row) * size, stride, pieces, padded_dim, args.head_dim,
                            attended + row * args.head_dim);
        }
        of_sequence += pieces * stride;
      }
    });
  });
}

}  // namespace trimserve::cpu
