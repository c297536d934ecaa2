// Tiles of linear: kRows rows times kWidth / kRows outputs, as many products as a vector has lanes.

#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace trimserve::cpu {

// kFewestRows is the number of rows from which few_rows.h is faster, at least 2: a single row reads at full speed
// anyway. It is kNever where reading the weight is never the bottleneck.
constexpr int kNever = std::numeric_limits<int>::max();

// How to multiply registers of rows and of the weight: here as float32, whatever the dtype.
template <int kWidth, DType dtype>
struct FloatOperands {
  static constexpr int kVectors = Packed<kWidth, dtype>::kVectors, kSize = kVectors * kWidth;
  using Stored = Element<dtype>;
  using StoredWeight = Stored;
  using Floats = typename Simd<kWidth>::Floats;
  using Vector = Floats[kVectors];
  static constexpr int kFewestRows = dtype == DType::kFloat32 ? 2 : kNever;

  TRIMSERVE_INLINE static void load(Vector& x, const Stored* source) {
    Packed<kWidth, dtype>::load(x, source);
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& x, const Vector& w) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums += x[i] * w[i]; });
  }
};

#ifdef __x86_64__
// bfloat16 products in pairs: half the instructions, no conversions.
struct PairOperands {
  static constexpr int kSize = 32;
  using Stored = Element<DType::kBFloat16>;
  using StoredWeight = Stored;
  using Floats = Simd<16>::Floats;
  using Vector = Simd<16>::Bits;
  static constexpr int kFewestRows = 2;

  TRIMSERVE_INLINE static void load(Vector& x, const Stored* source) { std::memcpy(&x, source, sizeof x); }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& x, const Vector& w) { add_pairs(sums, x, w); }
};
#endif

// Stores `count` products, or adds them to the output. With a constant count the loop becomes one vector.
template <DType dtype, typename Count>
TRIMSERVE_INLINE void store(const float* products, Count count, bool accumulates, Element<dtype>* output) {
  if (accumulates) {
    for (std::int64_t c = 0; c < count; ++c)
      output[c] = Element<dtype>::from_float(output[c].to_float() + products[c]);
  } else {
    for (std::int64_t c = 0; c < count; ++c) output[c] = Element<dtype>::from_float(products[c]);
  }
}

// Adds up the lanes of a tile's sums, (row r, output c) at r * kColumns + c, stores them.
template <int kWidth, DType dtype, typename Operands, int kRows>
TRIMSERVE_INLINE void store_tile(const LinearArgs& args, std::int64_t row, std::int64_t column,
                                 typename Operands::Floats (&sums)[kWidth]) {
  constexpr int kColumns = kWidth / kRows;
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - row);
  const std::int64_t num_columns = std::min<std::int64_t>(kColumns, args.num_outputs - column);
  Simd<kWidth>::sum_lanes(sums);
  const typename Operands::Floats gated = sums[0] * args.gate;
  float products[kWidth];
  std::memcpy(products, &gated, sizeof products);
  auto* const output = static_cast<Element<dtype>*>(args.output) + row * args.num_outputs + column;
  if (num_columns == kColumns) {
    for (std::int64_t r = 0; r < num_rows; ++r)
      store<dtype>(products + r * kColumns, std::integral_constant<int, kColumns>(), args.accumulates,
                   output + r * args.num_outputs);
  } else {
    for (std::int64_t r = 0; r < num_rows; ++r)
      store<dtype>(products + r * kColumns, num_columns, args.accumulates, output + r * args.num_outputs);
  }
}

// Calls body with the type of the products that suit the arguments and the machine, the width and the dtype.
template <typename Body>
void at_operands(const LinearArgs& args, const Body& body) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
#ifdef __x86_64__
      if constexpr (width == 16 && dtype == DType::kBFloat16) {
        if (has_pair_products()) return body(width, dtype, std::type_identity<PairOperands>());
      }
#endif
      body(width, dtype, std::type_identity<FloatOperands<width, dtype>>());
    });
  });
}

}  // namespace trimserve::cpu
