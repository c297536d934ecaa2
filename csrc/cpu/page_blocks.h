// Attention over one block: the kPagePositions keys or values of one KV head, contiguous in a page.
//
// Rows are padded_dim elements long, a whole number of vectors. Queries and sums over values are in the lane order of
// their dtype (simd.h). `ahead` is the memory to prefetch, line by line, while the block is processed.

#pragma once

#include <cstring>

#include "simd.h"

namespace trimserve::cpu {

// How to multiply queries and keys: here as float32, whatever the dtype.
template <int kWidth, DType kDtype>
struct FloatProducts {
  static constexpr DType dtype = kDtype;
  static constexpr int width = kWidth;
  static constexpr int kVectors = Packed<kWidth, dtype>::kVectors;
  using Query = float;
  using Floats = typename Simd<kWidth>::Floats;
  using Vector = Floats[kVectors];

  TRIMSERVE_INLINE static void pack_query(float* query, const Element<dtype>* row, std::int64_t padded_dim) {
    for (std::int64_t d = 0; d < padded_dim; d += kVectors * kWidth) {
      Vector x;
      Packed<kWidth, dtype>::load(x, row + d);
      std::memcpy(query + d, x, sizeof x);
    }
  }
  TRIMSERVE_INLINE static void load_query(Vector& q, const float* query) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::load(q[i], query + i * kWidth); });
  }
  TRIMSERVE_INLINE static void load_key(Vector& k, const Element<dtype>* key) {
    Packed<kWidth, dtype>::load(k, key);
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& q, const Vector& k) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums += q[i] * k[i]; });
  }
};

#ifdef __x86_64__
// bfloat16 products in pairs, each exact, summed in float32: half the instructions, no conversions.
struct PairProducts {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr int width = 16;
  static constexpr int kVectors = 2;
  using Query = Element<dtype>;
  using Floats = Simd<width>::Floats;
  using Vector = Simd<width>::Bits;

  TRIMSERVE_INLINE static void pack_query(Query* query, const Query* row, std::int64_t padded_dim) {
    std::memcpy(query, row, padded_dim * sizeof(Query));
  }
  TRIMSERVE_INLINE static void load_query(Vector& q, const Query* query) { std::memcpy(&q, query, sizeof q); }
  TRIMSERVE_INLINE static void load_key(Vector& k, const Query* key) { std::memcpy(&k, key, sizeof k); }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& q, const Vector& k) { add_pairs(sums, q, k); }
};
#endif

// logits[h * stride + p] = queries[h] . keys[p] * scale for kHeads heads. Each vector of keys is loaded once for all
// heads.
template <typename Products, int kHeads>
TRIMSERVE_INLINE void multiply_keys_of_heads(const typename Products::Query* queries,
                                             const Element<Products::dtype>* keys, std::int64_t padded_dim,
                                             float scale, float* logits, std::int64_t stride,
                                             const Element<Products::dtype>* ahead) {
  constexpr int kWidth = Products::width, kPositions = kWidth / kHeads, kSize = Products::kVectors * kWidth;
  for (std::int64_t p = 0; p < kPagePositions; p += kPositions) {
    typename Products::Floats sums[kWidth];
    unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = typename Products::Floats{}; });
    for (std::int64_t d = 0; d < padded_dim; d += kSize) {
      typename Products::Vector q[kHeads], k;
      unrolled<kHeads>(
          [&](auto h) TRIMSERVE_INLINE_LAMBDA { Products::load_query(q[h], queries + h * padded_dim + d); });
      unrolled<kPositions>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        Products::load_key(k, keys + (p + i) * padded_dim + d);
        __builtin_prefetch(ahead + p * padded_dim + d * kPositions + i * kSize);
        unrolled<kHeads>([&](auto h)
                             TRIMSERVE_INLINE_LAMBDA { Products::add(sums[h * kPositions + i], q[h], k); });
      });
    }
    Simd<kWidth>::sum_lanes(sums);
    const typename Products::Floats scaled = sums[0] * scale;
    float products[kWidth];
    std::memcpy(products, &scaled, sizeof products);
    for (int h = 0; h < kHeads; ++h)
      std::memcpy(logits + h * stride + p, products + h * kPositions, kPositions * sizeof(float));
  }
}

// attended[h] += weights[h * stride + p] * values[p] over p < count, for kHeads heads and kRegisters registers of
// elements. Values from count on may be NaN.
template <int kWidth, DType dtype, int kHeads, int kRegisters>
TRIMSERVE_INLINE void add_values_tile(const float* weights, std::int64_t stride, const Element<dtype>* values,
                                      std::int64_t count, std::int64_t padded_dim, float* attended,
                                      const Element<dtype>* ahead) {
  using Row = Packed<kWidth, dtype>;
  using Vectors = Simd<kWidth>;
  constexpr int kSize = Row::kVectors * kWidth, kVectors = kRegisters * Row::kVectors;
  typename Row::Floats sums[kHeads][kVectors], v[kRegisters][Row::kVectors];
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Vectors::load(sums[h][i], attended + h * padded_dim + i * kWidth);
    });
  });
  for (std::int64_t p = 0; p < count; ++p) {
    unrolled<kRegisters>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Row::load(v[i], values + p * padded_dim + i * kSize);
      __builtin_prefetch(ahead + (p * kRegisters + i) * kSize);
    });
    unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
      const float weight = weights[h * stride + p];
      unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        sums[h][i] += weight * v[i / Row::kVectors][i % Row::kVectors];
      });
    });
  }
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Vectors::store(attended + h * padded_dim + i * kWidth, sums[h][i]);
    });
  });
}

template <int kWidth, DType dtype, int kHeads>
TRIMSERVE_INLINE void add_values_of_heads(const float* weights, std::int64_t stride,
                                          const Element<dtype>* values, std::int64_t count,
                                          std::int64_t padded_dim, float* attended,
                                          const Element<dtype>* ahead) {
  constexpr int kVectors = Packed<kWidth, dtype>::kVectors, kSize = kVectors * kWidth;
  constexpr int kRegisters = (kWidth == 16 ? 4 : 2) / kVectors;  // AVX2 has half the registers
  std::int64_t d = 0;
  for (; d + kRegisters * kSize <= padded_dim; d += kRegisters * kSize)
    add_values_tile<kWidth, dtype, kHeads, kRegisters>(weights, stride, values + d, count, padded_dim,
                                                       attended + d, ahead + d * kPagePositions);
  for (; d < padded_dim; d += kSize)
    add_values_tile<kWidth, dtype, kHeads, 1>(weights, stride, values + d, count, padded_dim, attended + d,
                                              ahead + d * kPagePositions);
}

// Calls body(number of heads, first head) for tiles of 4, 2 or 1 heads that cover num_heads.
template <typename Body>
TRIMSERVE_INLINE void for_heads(std::int64_t num_heads, const Body& body) {
  std::int64_t h = 0;
  for (; h + 4 <= num_heads; h += 4) body(std::integral_constant<int, 4>(), h);
  for (; h + 2 <= num_heads; h += 2) body(std::integral_constant<int, 2>(), h);
  for (; h < num_heads; ++h) body(std::integral_constant<int, 1>(), h);
}

}  // namespace trimserve::cpu
