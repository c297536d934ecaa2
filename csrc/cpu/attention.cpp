// attention: rows of one prompt or image attend to its keys.
//   q, attended [T, H, Dh]   k, v [N, Hkv, Dh]   visibility [T, 2] int32: row t sees [begin, end)
//   bias [N] float32, or null for zeros   log_sums [H, T] float32
//   attended[t, h] = sum over what t sees of softmax(q[t, h] . k[n] * scale + bias[n])[n] * v[n], k and v of KV head
//     h / (H / Hkv); log_sums[h, t] = log of the sum of the exponentials. 0 and -inf where t sees nothing.
//
//   The lanes of a vector are rows: those of all query heads of a KV head, row by row. A block of rows passes over the
//   keys in blocks of kBlockKeys, which are packed once for all tiles of the block: keys to logits, exponentials under
//   a running maximum, values. Key blocks that no row of a tile sees are skipped. Where a block begins depends on the
//   keys only, so a row's result does not depend on the other rows or on the number of threads, to the last bit.
//   bfloat16 weights are rounded to bfloat16 where the machine multiplies pairs; everything else is float32.

#include <cmath>
#include <limits>

#include "attention_tiles.h"
#include "kernels.h"

namespace trimserve::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kBlockKeys = 128;  // their logits, of a tile, stay in the first-level cache
constexpr std::int64_t kBlockTiles = 4;   // share the packing of keys and values

// Memory of a call; that of tiles lies one tile after another.
struct Workspace {
  std::int64_t dim;        // Dh, padded to whole steps
  std::int64_t dim_units;  // units of Dh
  std::int64_t lanes;      // of a tile
  float* queries;          // units [tiles, dim_units, lanes]
  float* attended;         // [tiles, dim, lanes]
  float* maxima;           // [tiles, lanes], of the logits until now
  float* totals;           // [tiles, lanes], of the exponentials
  std::int32_t* begins;    // [tiles, lanes]
  std::int32_t* ends;      // [tiles, lanes]
  float* logits;           // [kBlockKeys, lanes]; then units of weights
  float* keys;             // units [kBlockKeys, dim_units]
  float* values;           // units [kBlockKeys / kElements, dim]
  float* bias;             // [kBlockKeys]
  std::int64_t size;
};

template <typename Units>
TRIMSERVE_INLINE Workspace divide(const AttentionArgs& args, float* memory) {
  Workspace ws{};
  float* const start = memory;
  const auto take = [&](std::int64_t count) TRIMSERVE_INLINE_LAMBDA {
    float* const part = memory;
    memory += round_up(count, 16);
    return part;
  };
  ws.dim = round_up(args.head_dim, Units::kStep);
  ws.dim_units = round_up(args.head_dim, Units::kElements) / Units::kElements;
  ws.lanes = kTileVectors * Units::kWidth;
  const std::int64_t lanes = kBlockTiles * ws.lanes;
  ws.queries = take(ws.dim_units * lanes);
  ws.attended = take(ws.dim * lanes);
  ws.maxima = take(lanes);
  ws.totals = take(lanes);
  ws.begins = reinterpret_cast<std::int32_t*>(take(lanes));
  ws.ends = reinterpret_cast<std::int32_t*>(take(lanes));
  ws.logits = take(kBlockKeys * ws.lanes);
  ws.keys = take(kBlockKeys * ws.dim_units);
  ws.values = take(kBlockKeys / Units::kElements * ws.dim);
  ws.bias = take(kBlockKeys);
  ws.size = memory - start;
  return ws;
}

// Rows of a KV head that share vectors. Row r is query head r % group, of the KV head, of text row r / group.
struct Tile {
  std::int64_t first_row;
  std::int64_t num_rows;
  std::int64_t num_vectors;
  std::int32_t begin = std::numeric_limits<std::int32_t>::max();  // of what any row sees
  std::int32_t end = 0;
  std::int32_t common_begin = 0;  // of what every row sees
  std::int32_t common_end = std::numeric_limits<std::int32_t>::max();

  TRIMSERVE_INLINE bool sees(std::int64_t first, std::int64_t last) const {
    return begin < last && first < end;
  }
  TRIMSERVE_INLINE bool sees_all(std::int64_t first, std::int64_t last) const {
    return common_begin <= first && last <= common_end;
  }
};

// The workspace of tile `index` of a block.
TRIMSERVE_INLINE Workspace of_tile(Workspace ws, std::int64_t index) {
  ws.queries += index * ws.dim_units * ws.lanes;
  ws.attended += index * ws.dim * ws.lanes;
  ws.maxima += index * ws.lanes;
  ws.totals += index * ws.lanes;
  ws.begins += index * ws.lanes;
  ws.ends += index * ws.lanes;
  return ws;
}

// Packs queries and ranges of a tile; attended nothing yet. Lanes without a row see nothing.
template <typename Units>
TRIMSERVE_INLINE Tile begin_tile(const AttentionArgs& args, std::int64_t kv_head, std::int64_t first_row,
                                 std::int64_t num_rows, const Workspace& ws) {
  using Stored = Element<Units::dtype>;
  const std::int64_t group = args.num_heads / args.num_kv_heads, head_dim = args.head_dim;
  Tile tile{first_row, num_rows, (num_rows + Units::kWidth - 1) / Units::kWidth};
  const std::int64_t lanes = tile.num_vectors * Units::kWidth;
  auto* const queries = reinterpret_cast<typename Units::Unit*>(ws.queries);
  std::fill_n(queries, ws.dim_units * lanes, typename Units::Unit{});
  std::fill_n(ws.attended, ws.dim * lanes, 0.0f);
  std::fill_n(ws.maxima, lanes, kMinusInfinity);
  std::fill_n(ws.totals, lanes, 0.0f);
  std::fill_n(ws.begins, lanes, 0);
  std::fill_n(ws.ends, lanes, 0);
  for (std::int64_t lane = 0; lane < num_rows; ++lane) {
    const std::int64_t t = (first_row + lane) / group, head = kv_head * group + (first_row + lane) % group;
    const auto* const row = static_cast<const Stored*>(args.q) + t * args.q_stride + head * head_dim;
    Stored padded[2] = {};
    for (std::int64_t u = 0; u < ws.dim_units; ++u) {
      const std::int64_t d = u * Units::kElements;
      std::copy_n(row + d, std::min<std::int64_t>(Units::kElements, head_dim - d), padded);
      if (d + Units::kElements > head_dim) padded[1] = {};
      queries[u * lanes + lane] = Units::unit(padded, 1);
    }
    const std::int32_t begin = args.visibility[2 * t], end = args.visibility[2 * t + 1];
    ws.begins[lane] = begin;
    ws.ends[lane] = end;
    if (begin < end) tile.begin = std::min(tile.begin, begin);
    if (begin < end) tile.end = std::max(tile.end, end);
    tile.common_begin = std::max(tile.common_begin, begin);
    tile.common_end = std::min(tile.common_end, end);
  }
  return tile;
}

// Logits of `count` keys from `first` on, and the maxima with them. A masked logit is -inf.
template <typename Units, int kVectors, bool kIsMasked>
TRIMSERVE_INLINE void multiply_keys(const Workspace& ws, std::int64_t first, std::int64_t count, float scale,
                                    typename Units::Floats (&maxima)[kVectors]) {
  using Vectors = Simd<Units::kWidth>;
  const auto* const keys = reinterpret_cast<const typename Units::Unit*>(ws.keys);
  const auto* const queries = reinterpret_cast<const typename Units::Unit*>(ws.queries);
  typename Vectors::Ints begins[kVectors], ends[kVectors];
  unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
    std::memcpy(&begins[j], ws.begins + j * Units::kWidth, sizeof begins[j]);
    std::memcpy(&ends[j], ws.ends + j * Units::kWidth, sizeof ends[j]);
  });
  for (std::int64_t n = 0; n < count; n += Units::kStep) {
    typename Units::Floats sums[Units::kStep][kVectors];
    multiply_step<Units, kVectors>(keys + n * ws.dim_units, ws.dim_units, 1, queries, ws.dim_units, sums);
    unrolled<Units::kStep>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      const std::int32_t index = static_cast<std::int32_t>(first + n + i);
      unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
        typename Units::Floats x = sums[i][j] * scale + ws.bias[n + i];
        if constexpr (kIsMasked) {
          const typename Vectors::Ints seen = (begins[j] <= index) & (ends[j] > index);
          x = seen ? x : typename Units::Floats{} + kMinusInfinity;
        }
        maxima[j] = x > maxima[j] ? x : maxima[j];
        Vectors::store(ws.logits + ((n + i) * kVectors + j) * Units::kWidth, x);
      });
    });
  }
}

// Logits of `count` keys become units of exp(logit - shift), whose sums are added to totals.
template <typename Units, int kVectors>
TRIMSERVE_INLINE void exponentiate(const Workspace& ws, std::int64_t count,
                                   const typename Units::Floats (&shifts)[kVectors],
                                   typename Units::Floats (&totals)[kVectors]) {
  constexpr int kWidth = Units::kWidth, kElements = Units::kElements;
  auto* const weights = reinterpret_cast<typename Units::Unit*>(ws.logits);
  for (std::int64_t u = 0; u < count / kElements; ++u) {
    unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
      typename Units::Floats x[kElements];
      unrolled<kElements>([&](auto e) TRIMSERVE_INLINE_LAMBDA {
        Simd<kWidth>::load(x[e], ws.logits + ((u * kElements + e) * kVectors + j) * kWidth);
        x[e] -= shifts[j];
        Simd<kWidth>::exp_of_nonpositive(x[e]);
        totals[j] += x[e];
      });
      typename Units::Vector units;
      Units::pack(units, x);
      std::memcpy(weights + (u * kVectors + j) * kWidth, &units, sizeof units);
    });
  }
}

// attended = attended * factor + weights . values, of `count` positions.
template <typename Units, int kVectors>
TRIMSERVE_INLINE void add_values(const Workspace& ws, std::int64_t count,
                                 const typename Units::Floats (&factors)[kVectors]) {
  using Vectors = Simd<Units::kWidth>;
  const auto* const values = reinterpret_cast<const typename Units::Unit*>(ws.values);
  const auto* const weights = reinterpret_cast<const typename Units::Unit*>(ws.logits);
  for (std::int64_t d = 0; d < ws.dim; d += Units::kStep) {
    typename Units::Floats sums[Units::kStep][kVectors];
    multiply_step<Units, kVectors>(values + d, 1, ws.dim, weights, count / Units::kElements, sums);
    unrolled<Units::kStep>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
        float* const place = ws.attended + ((d + i) * kVectors + j) * Units::kWidth;
        typename Units::Floats x;
        Vectors::load(x, place);
        x = x * factors[j] + sums[i][j];
        Vectors::store(place, x);
      });
    });
  }
}

// One tile, `count` packed keys and values from `first` on; count is a whole number of steps.
template <typename Units, int kVectors>
TRIMSERVE_INLINE void attend_tile(const Tile& tile, const Workspace& ws, std::int64_t first,
                                  std::int64_t count, float scale) {
  using Vectors = Simd<Units::kWidth>;
  typename Units::Floats before[kVectors], maxima[kVectors], totals[kVectors], factors[kVectors];
  unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
    Vectors::load(before[j], ws.maxima + j * Units::kWidth);
    Vectors::load(totals[j], ws.totals + j * Units::kWidth);
    maxima[j] = before[j];
  });
  if (tile.sees_all(first, first + count)) {
    multiply_keys<Units, kVectors, false>(ws, first, count, scale, maxima);
  } else {
    multiply_keys<Units, kVectors, true>(ws, first, count, scale, maxima);
  }
  typename Units::Floats shifts[kVectors];
  unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
    shifts[j] = maxima[j] == kMinusInfinity ? typename Units::Floats{} : maxima[j];  // not NaN
    factors[j] = before[j] - shifts[j];
    Vectors::exp_of_nonpositive(factors[j]);
    totals[j] *= factors[j];
  });
  exponentiate<Units, kVectors>(ws, count, shifts, totals);
  add_values<Units, kVectors>(ws, count, factors);
  unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
    Vectors::store(ws.maxima + j * Units::kWidth, maxima[j]);
    Vectors::store(ws.totals + j * Units::kWidth, totals[j]);
  });
}

template <typename Units>
TRIMSERVE_INLINE void finish_tile(const AttentionArgs& args, std::int64_t kv_head, const Tile& tile,
                                  const Workspace& ws) {
  const std::int64_t group = args.num_heads / args.num_kv_heads, lanes = tile.num_vectors * Units::kWidth;
  for (std::int64_t lane = 0; lane < tile.num_rows; ++lane) {
    const std::int64_t row = tile.first_row + lane, t = row / group, head = kv_head * group + row % group;
    const bool sees = ws.begins[lane] < ws.ends[lane];
    const float factor = sees ? 1.0f / ws.totals[lane] : 0.0f;
    auto* const out =
        static_cast<Element<Units::dtype>*>(args.attended) + (t * args.num_heads + head) * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; ++d)
      out[d] = Element<Units::dtype>::from_float(ws.attended[d * lanes + lane] * factor);
    args.log_sums[head * args.num_rows + t] =
        sees ? ws.maxima[lane] + std::log(ws.totals[lane]) : kMinusInfinity;
  }
}

// Packs `count` keys and values from `first` on, padded to whole steps.
template <typename Units>
TRIMSERVE_INLINE void pack_block(const AttentionArgs& args, std::int64_t kv_head, std::int64_t first,
                                 std::int64_t count, const Workspace& ws) {
  using Stored = Element<Units::dtype>;
  const std::int64_t head_dim = args.head_dim;
  pack_keys<Units>(static_cast<const Stored*>(args.k) + first * args.k_stride + kv_head * head_dim,
                   args.k_stride, count, head_dim, ws.dim_units,
                   reinterpret_cast<typename Units::Unit*>(ws.keys));
  pack_values<Units>(static_cast<const Stored*>(args.v) + first * args.v_stride + kv_head * head_dim,
                     args.v_stride, count, head_dim, ws.dim,
                     reinterpret_cast<typename Units::Unit*>(ws.values));
  std::fill_n(ws.bias, kBlockKeys, 0.0f);
  if (args.bias) std::copy_n(args.bias + first, count, ws.bias);
}

// Rows [first_row, first_row + num_rows) of a KV head.
template <typename Units>
TRIMSERVE_INLINE void attend_block(const AttentionArgs& args, std::int64_t kv_head, std::int64_t first_row,
                                   std::int64_t num_rows, const Workspace& ws) {
  Tile tiles[kBlockTiles];
  std::int64_t num_tiles = 0, begin = args.num_keys, end = 0;
  for (std::int64_t r = 0; r < num_rows; r += ws.lanes, ++num_tiles) {
    tiles[num_tiles] = begin_tile<Units>(args, kv_head, first_row + r, std::min(ws.lanes, num_rows - r),
                                         of_tile(ws, num_tiles));
    begin = std::min<std::int64_t>(begin, tiles[num_tiles].begin);
    end = std::max<std::int64_t>(end, tiles[num_tiles].end);
  }
  for (std::int64_t first = begin / kBlockKeys * kBlockKeys; first < end; first += kBlockKeys) {
    const std::int64_t size = std::min(kBlockKeys, args.num_keys - first);
    const std::int64_t count = round_up(size, Units::kStep);
    pack_block<Units>(args, kv_head, first, size, ws);
    for (std::int64_t i = 0; i < num_tiles; ++i) {
      const Tile& tile = tiles[i];
      if (!tile.sees(first, first + size)) continue;
      const Workspace own = of_tile(ws, i);
      if (tile.num_vectors == 3) attend_tile<Units, 3>(tile, own, first, count, args.scale);
      if (tile.num_vectors == 2) attend_tile<Units, 2>(tile, own, first, count, args.scale);
      if (tile.num_vectors == 1) attend_tile<Units, 1>(tile, own, first, count, args.scale);
    }
  }
  for (std::int64_t i = 0; i < num_tiles; ++i) finish_tile<Units>(args, kv_head, tiles[i], of_tile(ws, i));
}
static_assert(kTileVectors == 3);

// Blocks of one KV head.
template <typename Units>
TRIMSERVE_INLINE std::int64_t rows_of_block() {
  return kBlockTiles * kTileVectors * Units::kWidth;
}

template <typename Units>
TRIMSERVE_INLINE std::int64_t num_blocks(const AttentionArgs& args) {
  const std::int64_t rows = args.num_rows * (args.num_heads / args.num_kv_heads);
  return round_up(rows, rows_of_block<Units>()) / rows_of_block<Units>();
}

}  // namespace

AttentionSizes attention_sizes(const AttentionArgs& args) {
  AttentionSizes sizes{};
  at_units(args.dtype, [&]<typename Units>(std::type_identity<Units>) TRIMSERVE_INLINE_LAMBDA {
    sizes = {args.num_kv_heads * num_blocks<Units>(args), divide<Units>(args, nullptr).size};
  });
  return sizes;
}

void attention(const AttentionArgs& args, std::int64_t begin, std::int64_t end, float* workspace) {
  at_units(args.dtype, [&]<typename Units>(std::type_identity<Units>) TRIMSERVE_INLINE_LAMBDA {
    const Workspace ws = divide<Units>(args, workspace);
    const std::int64_t blocks = num_blocks<Units>(args), size = rows_of_block<Units>();
    const std::int64_t num_rows = args.num_rows * (args.num_heads / args.num_kv_heads);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i % blocks * size;
      attend_block<Units>(args, i / blocks, row, std::min(size, num_rows - row), ws);
    }
  });
}

}  // namespace trimserve::cpu
