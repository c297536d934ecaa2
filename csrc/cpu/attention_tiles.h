// Matrix products of attention over many rows, in blocks that stay in cache.
//
// The lanes of a vector are query rows, kTileVectors vectors of them to a tile. Queries and weights are packed with one
// value of each lane side by side; keys and values are broadcast. What is multiplied is a unit of 32 bits: a float, or
// a pair of bfloat16 where the machine multiplies those (two components of a key; two positions of a value). Dimensions
// are padded with zeros to whole steps, so that no loop has a tail.

#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace trimserve::cpu {

constexpr std::int64_t kTileVectors = 3;  // with the sums of a step they leave registers for the operands

TRIMSERVE_INLINE std::int64_t round_up(std::int64_t n, std::int64_t size) {
  return (n + size - 1) / size * size;
}

// How to multiply rows and keys: here as float32, whatever the dtype.
template <int kVectorWidth, DType kDtype>
struct FloatUnits {
  static constexpr int kWidth = kVectorWidth;
  static constexpr DType dtype = kDtype;
  static constexpr int kElements = 1;  // of a unit
  static constexpr int kStep = kWidth == 16 ? 8 : 4;
  using Unit = float;
  using Floats = typename Simd<kWidth>::Floats;
  using Vector = Floats;

  TRIMSERVE_INLINE static Unit unit(const Element<dtype>* elements, std::int64_t) {
    return elements->to_float();
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Unit& x, const Vector& y) { sums += x * y; }
  // Units of the weights of kElements positions.
  TRIMSERVE_INLINE static void pack(Vector& units, const Floats (&weights)[kElements]) { units = weights[0]; }
};

#ifdef __x86_64__
// Pairs of bfloat16: each product exact, summed in float32.
struct PairUnits {
  static constexpr int kWidth = 16;
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr int kElements = 2;
  static constexpr int kStep = 8;
  using Unit = std::uint32_t;
  using Floats = Simd<kWidth>::Floats;
  using Vector = Simd<kWidth>::Bits;

  TRIMSERVE_INLINE static Unit unit(const Element<dtype>* elements, std::int64_t stride) {
    return elements[0].bits | std::uint32_t{elements[stride].bits} << 16;
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Unit& x, const Vector& y) {
    const Vector same = Vector{} + x;
    add_pairs(sums, same, y);
  }
  TRIMSERVE_INLINE static void pack(Vector& units, const Floats (&weights)[kElements]) {
    Packed<kWidth, dtype>::store(reinterpret_cast<Element<dtype>*>(&units), weights);
  }
};
#endif

// Calls body with the type of the units that suit the dtype and the machine.
template <typename Body>
void at_units(DType kind, const Body& body) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(kind, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
#ifdef __x86_64__
      if constexpr (width == PairUnits::kWidth && dtype == PairUnits::dtype) {
        if (has_pair_products()) return body(std::type_identity<PairUnits>());
      }
#endif
      body(std::type_identity<FloatUnits<width, dtype>>());
    });
  });
}

// sums[i][j] = sum over u < count of broadcast(scalars[i * step + u * stride]) * vectors[u][j].
template <typename Units, int kVectors>
TRIMSERVE_INLINE void multiply_step(const typename Units::Unit* scalars, std::int64_t step,
                                    std::int64_t stride, const typename Units::Unit* vectors,
                                    std::int64_t count,
                                    typename Units::Floats (&sums)[Units::kStep][kVectors]) {
  constexpr int kWidth = Units::kWidth;
  unrolled<Units::kStep>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA { sums[i][j] = typename Units::Floats{}; });
  });
  for (std::int64_t u = 0; u < count; ++u) {
    typename Units::Vector y[kVectors];
    unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA {
      std::memcpy(&y[j], vectors + (u * kVectors + j) * kWidth, sizeof y[j]);
    });
    unrolled<Units::kStep>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      const typename Units::Unit x = scalars[i * step + u * stride];
      unrolled<kVectors>([&](auto j) TRIMSERVE_INLINE_LAMBDA { Units::add(sums[i][j], x, y[j]); });
    });
  }
}

// Rows of head_dim elements -> units [num_rows, dim_units], components side by side; zeros behind.
template <typename Units>
TRIMSERVE_INLINE void pack_keys(const Element<Units::dtype>* rows, std::int64_t stride, std::int64_t num_rows,
                                std::int64_t head_dim, std::int64_t dim_units, typename Units::Unit* packed) {
  const std::int64_t num_rounded = round_up(num_rows, Units::kStep), whole = head_dim / Units::kElements;
  for (std::int64_t r = 0; r < num_rounded; ++r, packed += dim_units) {
    std::int64_t u = 0;
    if (r < num_rows) {
      const auto* const row = rows + r * stride;
      if constexpr (sizeof(typename Units::Unit) == Units::kElements * sizeof *row) {
        std::memcpy(packed, row, whole * sizeof *packed);
        u = whole;
      }
      for (; u < whole; ++u) packed[u] = Units::unit(row + u * Units::kElements, 1);
      if (head_dim % Units::kElements) {
        const Element<Units::dtype> last[2] = {row[head_dim - 1], {}};
        packed[u++] = Units::unit(last, 1);
      }
    }
    std::fill(packed + u, packed + dim_units, typename Units::Unit{});
  }
}

// Rows of head_dim elements -> units [num_rows / kElements, dim], positions side by side; zeros behind.
template <typename Units>
TRIMSERVE_INLINE void pack_values(const Element<Units::dtype>* rows, std::int64_t stride,
                                  std::int64_t num_rows, std::int64_t head_dim, std::int64_t dim,
                                  typename Units::Unit* packed) {
  const std::int64_t num_rounded = round_up(num_rows, Units::kStep);
  for (std::int64_t r = 0; r < num_rounded; r += Units::kElements, packed += dim) {
    const auto* const row = rows + r * stride;
    std::int64_t d = 0;
    if (r + Units::kElements <= num_rows) {
      for (; d < head_dim; ++d) packed[d] = Units::unit(row + d, stride);
    } else if (r < num_rows) {
      for (; d < head_dim; ++d) {
        const Element<Units::dtype> last[2] = {row[d], {}};
        packed[d] = Units::unit(last, 1);
      }
    }
    std::fill(packed + d, packed + dim, typename Units::Unit{});
  }
}

}  // namespace trimserve::cpu
