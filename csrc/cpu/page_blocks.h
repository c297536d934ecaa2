// Attention over one block: the kPagePositions keys or values of one KV head, contiguous in a page.
//
// Rows are padded_dim elements long, a whole number of vectors. Queries and sums over values are in the lane order of
// their dtype (simd.h), and int8 values are read in that order. `ahead` is the memory to prefetch, line by line, while
// the block is processed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "quantized_units.h"
#include "simd.h"

namespace trimserve::cpu {

// How to multiply queries and keys: here as float32, whatever the dtype.
template <int kWidth, DType kDtype>
struct FloatProducts {
  static constexpr DType dtype = kDtype;
  static constexpr int width = kWidth;
  static constexpr int kVectors = Packed<kWidth, dtype>::kVectors;
  static constexpr bool kHasScales = false;  // behind the rows of a block
  using Stored = Element<dtype>;             // of a page
  using Query = float;
  using Floats = typename Simd<kWidth>::Floats;
  using Sums = Floats;
  using Vector = Floats[kVectors];

  // Returns what logits are to be multiplied with.
  TRIMSERVE_INLINE static float pack_query(float* query, const Element<dtype>* row, std::int64_t padded_dim) {
    for (std::int64_t d = 0; d < padded_dim; d += kVectors * kWidth) {
      Vector x;
      Packed<kWidth, dtype>::load(x, row + d);
      std::memcpy(query + d, x, sizeof x);
    }
    return 1.0f;
  }
  TRIMSERVE_INLINE static void load_query(Vector& q, const float* query) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::load(q[i], query + i * kWidth); });
  }
  TRIMSERVE_INLINE static void load_key(Vector& k, const Stored* key) { Packed<kWidth, dtype>::load(k, key); }
  TRIMSERVE_INLINE static void load_value(Vector& v, const Stored* value) {
    Packed<kWidth, dtype>::load(v, value);
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& q, const Vector& k) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums += q[i] * k[i]; });
  }
};

// Keys and values as int8, whose scales are applied to logits and weights: widened in registers only.
template <int kWidth, DType kDtype>
struct Int8Products : FloatProducts<kWidth, kDtype> {
  using Base = FloatProducts<kWidth, kDtype>;
  using typename Base::Vector;
  static constexpr bool kHasScales = true;
  using Stored = std::int8_t;

  TRIMSERVE_INLINE static void load_key(Vector& k, const Stored* key) { load(k, key); }
  TRIMSERVE_INLINE static void load_value(Vector& v, const Stored* value) { load(v, value); }

 private:
  // In the lane order of Packed: one vector in order, even and odd elements of bfloat16, or halves in order.
  TRIMSERVE_INLINE static void load(Vector& k, const Stored* key) {
    if constexpr (kDtype == DType::kBFloat16) {
      Ints pairs;  // an even element in the low byte of a lane, an odd one above
      widen_pairs(pairs, key);
      const Ints even = pairs << 24 >> 24, odd = pairs >> 8;
      k[0] = __builtin_convertvector(even, typename Base::Floats);
      k[1] = __builtin_convertvector(odd, typename Base::Floats);
    } else {
      unrolled<Base::kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        Ints integers;
        widen(integers, key + i * kWidth);
        k[i] = __builtin_convertvector(integers, typename Base::Floats);
      });
    }
  }

  using Ints = typename Simd<kWidth>::Ints;
  typedef std::int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
  typedef std::int16_t Pairs __attribute__((vector_size(2 * kWidth), aligned(1), may_alias));

  TRIMSERVE_INLINE static void widen(Ints& integers, const Stored* source) {
#ifdef __x86_64__
    // In one instruction, which GCC 12 does not find by itself.
    if constexpr (kWidth >= 8) {
      asm("vpmovsxbd %1, %0" : "=v"(integers) : "m"(*reinterpret_cast<const Bytes*>(source)));
      return;
    }
#endif
    integers = __builtin_convertvector(*reinterpret_cast<const Bytes*>(source), Ints);
  }
  TRIMSERVE_INLINE static void widen_pairs(Ints& pairs, const Stored* source) {
#ifdef __x86_64__
    if constexpr (kWidth >= 8) {
      asm("vpmovsxwd %1, %0" : "=v"(pairs) : "m"(*reinterpret_cast<const Pairs*>(source)));
      return;
    }
#endif
    pairs = __builtin_convertvector(*reinterpret_cast<const Pairs*>(source), Ints);
  }
};

// The same for bfloat16 queries of at most kMostWords elements, which become int16 times a scale of their head: what is
// within 2^-6 of the largest is exact, and so are products and sums.
template <int kVectorWidth, bool kHasDots>
struct Int8WordProducts : Int8Products<kVectorWidth, DType::kBFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr int kWidth = kVectorWidth;
  using Stored = std::int8_t;
  using Query = std::int16_t;
  using Sums = typename Simd<kWidth>::Ints;
  using Vector = typename Simd<kWidth>::Bits;  // of int16

  TRIMSERVE_INLINE static float pack_query(Query* query, const Element<dtype>* row, std::int64_t padded_dim) {
    float largest = 0.0f, none = 0.0f;
    for (std::int64_t d = 0; d < padded_dim; ++d) {
      largest = std::max(largest, std::abs(row[d].to_float()));
      none += row[d].to_float() * 0.0f;  // NaN of what is not finite
    }
    const bool is_finite = none == 0.0f;
    const float factor = is_finite && largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (std::int64_t d = 0; d < padded_dim; ++d)
      query[d] = static_cast<Query>(is_finite ? std::nearbyint(row[d].to_float() * factor) : 0.0f);
    return is_finite ? largest / 32767.0f : none;
  }
  TRIMSERVE_INLINE static void load_query(Vector& q, const Query* query) { std::memcpy(&q, query, sizeof q); }
  TRIMSERVE_INLINE static void load_key(Vector& k, const Stored* key) {
    typedef std::int8_t Bytes __attribute__((vector_size(2 * kWidth), aligned(1), may_alias));
#ifdef __x86_64__
    if constexpr (kWidth >= 8) {
      asm("vpmovsxbw %1, %0" : "=v"(k) : "m"(*reinterpret_cast<const Bytes*>(key)));
      return;
    }
#endif
    const Words<kWidth> words = __builtin_convertvector(*reinterpret_cast<const Bytes*>(key), Words<kWidth>);
    std::memcpy(&k, &words, sizeof k);
  }
  TRIMSERVE_INLINE static void add(Sums& sums, const Vector& q, const Vector& k) {
#ifdef __x86_64__
    if constexpr (kHasDots) {
      Sums sum = sums;
      asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(k));
      sums = sum;
      return;
    }
#endif
    WordMath<kWidth>::add(sums, q, k);
  }
};
constexpr std::int64_t kMostWords = 2048;  // int32 holds the sums of a lane

#ifdef __x86_64__
// bfloat16 products in pairs, each exact, summed in float32: half the instructions, no conversions.
struct PairProducts {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr int width = 16;
  static constexpr int kVectors = 2;
  static constexpr bool kHasScales = false;
  using Stored = Element<dtype>;
  using Query = Element<dtype>;
  using Floats = Simd<width>::Floats;
  using Sums = Floats;
  using Vector = Simd<width>::Bits;

  TRIMSERVE_INLINE static float pack_query(Query* query, const Query* row, std::int64_t padded_dim) {
    std::memcpy(query, row, padded_dim * sizeof(Query));
    return 1.0f;
  }
  TRIMSERVE_INLINE static void load_query(Vector& q, const Query* query) { std::memcpy(&q, query, sizeof q); }
  TRIMSERVE_INLINE static void load_key(Vector& k, const Stored* key) { std::memcpy(&k, key, sizeof k); }
  TRIMSERVE_INLINE static void load_value(Floats (&v)[kVectors], const Stored* value) {
    Packed<width, dtype>::load(v, value);
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& q, const Vector& k) { add_pairs(sums, q, k); }
};
#endif

// logits[h * stride + p] = queries[h] . keys[p] * scale for kHeads heads. Each vector of keys is loaded once for all
// heads.
template <typename Products, int kHeads>
TRIMSERVE_INLINE void multiply_keys_of_heads(const typename Products::Query* queries,
                                             const typename Products::Stored* keys, std::int64_t padded_dim,
                                             float scale, float* logits, std::int64_t stride,
                                             const typename Products::Stored* ahead) {
  constexpr int kWidth = Products::width, kPositions = kWidth / kHeads, kSize = Products::kVectors * kWidth;
  for (std::int64_t p = 0; p < kPagePositions; p += kPositions) {
    typename Products::Sums sums[kWidth];
    unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = typename Products::Sums{}; });
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
    typename Products::Floats lanes[kWidth];
    unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      lanes[i] = __builtin_convertvector(sums[i], typename Products::Floats);
    });
    Simd<kWidth>::sum_lanes(lanes);
    const typename Products::Floats scaled = lanes[0] * scale;
    float products[kWidth];
    std::memcpy(products, &scaled, sizeof products);
    for (int h = 0; h < kHeads; ++h)
      std::memcpy(logits + h * stride + p, products + h * kPositions, kPositions * sizeof(float));
  }
}

// attended[h] += weights[h * stride + p] * values[p] over p < count, for kHeads heads and kRegisters registers of
// elements. Values from count on may be NaN.
template <typename Products, int kHeads, int kRegisters>
TRIMSERVE_INLINE void add_values_tile(const float* weights, std::int64_t stride,
                                      const typename Products::Stored* values, std::int64_t count,
                                      std::int64_t padded_dim, float* attended,
                                      const typename Products::Stored* ahead) {
  constexpr int kWidth = Products::width, kOfRegister = Products::kVectors;
  using Vectors = Simd<kWidth>;
  constexpr int kSize = kOfRegister * kWidth, kVectors = kRegisters * kOfRegister;
  typename Products::Floats sums[kHeads][kVectors], v[kRegisters][kOfRegister];
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Vectors::load(sums[h][i], attended + h * padded_dim + i * kWidth);
    });
  });
  for (std::int64_t p = 0; p < count; ++p) {
    unrolled<kRegisters>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Products::load_value(v[i], values + p * padded_dim + i * kSize);
      __builtin_prefetch(ahead + (p * kRegisters + i) * kSize);
    });
    unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
      const float weight = weights[h * stride + p];
      unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        sums[h][i] += weight * v[i / kOfRegister][i % kOfRegister];
      });
    });
  }
  unrolled<kHeads>([&](auto h) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      Vectors::store(attended + h * padded_dim + i * kWidth, sums[h][i]);
    });
  });
}

template <typename Products, int kHeads>
TRIMSERVE_INLINE void add_values_of_heads(const float* weights, std::int64_t stride,
                                          const typename Products::Stored* values, std::int64_t count,
                                          std::int64_t padded_dim, float* attended,
                                          const typename Products::Stored* ahead) {
  constexpr int kWidth = Products::width, kVectors = Products::kVectors, kSize = kVectors * kWidth;
  constexpr int kRegisters = (kWidth == 16 ? 4 : 2) / kVectors;  // AVX2 has half the registers
  std::int64_t d = 0;
  for (; d + kRegisters * kSize <= padded_dim; d += kRegisters * kSize)
    add_values_tile<Products, kHeads, kRegisters>(weights, stride, values + d, count, padded_dim,
                                                  attended + d, ahead + d * kPagePositions);
  for (; d < padded_dim; d += kSize)
    add_values_tile<Products, kHeads, 1>(weights, stride, values + d, count, padded_dim, attended + d,
                                         ahead + d * kPagePositions);
}

// numbers[h * stride + p] *= factors[h] * scales[p], for a block's positions and some heads; factors may be null for
// ones.
template <int kWidth>
TRIMSERVE_INLINE void multiply_scales(const std::int8_t* scales, const float* factors, std::int64_t num_heads,
                                      float* numbers, std::int64_t stride) {
  using Halves = Packed<kWidth, DType::kFloat16>;
  Element<DType::kFloat16> halves[Halves::kVectors * kWidth * (kWidth == 4 ? 2 : 1)] = {};
  std::memcpy(halves, scales, kPagePositions * sizeof *halves);
  constexpr int kVectors = kPagePositions / kWidth;
  typename Halves::Floats x[std::max(kVectors, Halves::kVectors)][1], number;
  for (int i = 0; i < kVectors; i += Halves::kVectors)
    Halves::load(reinterpret_cast<typename Halves::Floats(&)[Halves::kVectors]>(x[i]), halves + i * kWidth);
  for (std::int64_t h = 0; h < num_heads; ++h) {
    const float factor = factors ? factors[h] : 1.0f;
    for (int i = 0; i < kVectors; ++i) {
      float* const place = numbers + h * stride + i * kWidth;
      Simd<kWidth>::load(number, place);
      number *= x[i][0] * factor;
      Simd<kWidth>::store(place, number);
    }
  }
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
