// linear: rows times a weight that lies as torch stores it.
//   x [R, K]     weight [N, K]     scales [N] of an int8 weight
//   output [R, N] = x weight^T, or output + gate * x weight^T
//   Tiles of as many products as a vector has lanes stay in registers: sums along K, whose lanes are added up at its
//   end, so nothing is packed or transposed. Made for the few rows of a decode step: one row is bound by the bytes of
//   the weight, more by arithmetic. An output is the same to the last bit in every batch.

#include <cstring>
#include <type_traits>

#include "simd.h"

namespace trimserve::cpu {
namespace {

// How registers full of rows meet registers full of the weight: float32 products of whatever dtype.
template <int kWidth, DType dtype>
struct FloatProducts {
  static constexpr int kVectors = Packed<kWidth, dtype>::kVectors, kSize = kVectors * kWidth;
  using Stored = Element<dtype>;
  using StoredWeight = Stored;
  using Floats = typename Simd<kWidth>::Floats;
  using Vector = Floats[kVectors];

  TRIMSERVE_INLINE static void load(Vector& x, const Stored* source) {
    Packed<kWidth, dtype>::load(x, source);
  }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& x, const Vector& w) {
    unrolled<kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums += x[i] * w[i]; });
  }
};

template <int kWidth>
struct Int8Products : FloatProducts<kWidth, DType::kFloat32> {
  using Base = FloatProducts<kWidth, DType::kFloat32>;
  using Base::load;
  using StoredWeight = std::int8_t;
  using Ints = typename Simd<kWidth>::Ints;
  typedef std::int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));

  TRIMSERVE_INLINE static void load(typename Base::Vector& w, const std::int8_t* source) {
    Ints wide;
#ifdef __x86_64__
    if constexpr (kWidth >= 8) {  // in one instruction, which GCC 12 does not find by itself
      asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bytes*>(source)));
      w[0] = __builtin_convertvector(wide, typename Base::Floats);
      return;
    }
#endif
    Bytes bytes;
    std::memcpy(&bytes, source, sizeof bytes);
    wide = __builtin_convertvector(bytes, Ints);
    w[0] = __builtin_convertvector(wide, typename Base::Floats);
  }
};

#ifdef __x86_64__
// bfloat16 products in pairs: half the instructions, none to convert.
struct PairProducts {
  static constexpr int kSize = 32;
  using Stored = Element<DType::kBFloat16>;
  using StoredWeight = Stored;
  using Floats = Simd<16>::Floats;
  using Vector = Simd<16>::Bits;

  TRIMSERVE_INLINE static void load(Vector& x, const Stored* source) { std::memcpy(&x, source, sizeof x); }
  TRIMSERVE_INLINE static void add(Floats& sums, const Vector& x, const Vector& w) { add_pairs(sums, x, w); }
};
#endif

// kRows rows of x times kWidth / kRows rows of the weight: lane r * kColumns + c of `total`. Rows from num_rows on
// are not read, and columns from num_columns on. `ahead`, unless null, is weight that is read next: it is fetched
// meanwhile.
template <int kWidth, typename Products, int kRows>
TRIMSERVE_INLINE void multiply(const typename Products::Stored* x, std::int64_t x_stride,
                               std::int64_t num_rows, const typename Products::StoredWeight* weight,
                               std::int64_t num_columns, std::int64_t num_inputs,
                               const typename Products::StoredWeight* ahead,
                               typename Products::Floats& total) {
  using Vector = typename Products::Vector;
  constexpr int kColumns = kWidth / kRows, kSize = Products::kSize;
  constexpr int kAtOnce = std::min(kColumns, 8);  // memory is read fastest in few streams
  const typename Products::Stored* rows[kRows];
  const typename Products::StoredWeight* columns[kColumns];
  unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
    rows[r] = x + std::min<std::int64_t>(r, num_rows - 1) * x_stride;
  });
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    columns[c] = weight + std::min<std::int64_t>(c, num_columns - 1) * num_inputs;
  });
  typename Products::Floats sums[kWidth];
  unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = typename Products::Floats{}; });
  const std::int64_t whole = num_inputs / kSize * kSize;
  unrolled<kColumns / kAtOnce>([&](auto strip) TRIMSERVE_INLINE_LAMBDA {
    constexpr int kFirst = strip * kAtOnce;
    const auto add = [&](std::int64_t k, const auto& load) TRIMSERVE_INLINE_LAMBDA {
      Vector w[kAtOnce];
      unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA { load(w[c], columns[kFirst + c] + k); });
      unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
        Vector value;
        load(value, rows[r] + k);
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          Products::add(sums[r * kColumns + kFirst + c], value, w[c]);
        });
      });
    };
    for (std::int64_t k = 0; k < whole; k += kSize) {
      if (ahead) {
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          __builtin_prefetch(ahead + (kFirst + c) * num_inputs + k);
        });
      }
      add(k,
          [](Vector& vector, const auto* source) TRIMSERVE_INLINE_LAMBDA { Products::load(vector, source); });
    }
    if (whole < num_inputs) {
      add(whole, [&]<typename Stored>(Vector& vector, const Stored* source) TRIMSERVE_INLINE_LAMBDA {
        Stored padded[kSize] = {};
        std::memcpy(padded, source, (num_inputs - whole) * sizeof *source);
        Products::load(vector, padded);
      });
    }
  });
  Simd<kWidth>::sum_lanes(sums);
  total = sums[0];
}

// `count` products to where they belong; a constant count makes it a vector.
template <DType dtype, typename Count>
TRIMSERVE_INLINE void store(const float* products, Count count, bool accumulates, Element<dtype>* output) {
  if (accumulates) {
    for (std::int64_t c = 0; c < count; ++c)
      output[c] = Element<dtype>::from_float(output[c].to_float() + products[c]);
  } else {
    for (std::int64_t c = 0; c < count; ++c) output[c] = Element<dtype>::from_float(products[c]);
  }
}

template <int kWidth, DType dtype, typename Products, int kRows>
TRIMSERVE_INLINE void multiply_tile(const LinearArgs& args, std::int64_t row, std::int64_t column,
                                    bool is_first) {
  using Weight = typename Products::StoredWeight;
  constexpr int kColumns = kWidth / kRows;
  constexpr bool kIsInt8 = std::is_same_v<Weight, std::int8_t>;
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - row);
  const std::int64_t num_columns = std::min<std::int64_t>(kColumns, args.num_outputs - column);
  const auto* const x = static_cast<const typename Products::Stored*>(args.x) + row * args.x_stride;
  const auto* const weight = static_cast<const Weight*>(args.weight) + column * args.num_inputs;
  // One row of floats reads ahead by itself: it waits for nothing else.
  constexpr bool kFetches = kRows > 1 || kIsInt8;
  const bool has_next = kFetches && is_first && column + 2 * kColumns <= args.num_outputs;
  typename Products::Floats sums;
  multiply<kWidth, Products, kRows>(x, args.x_stride, num_rows, weight, num_columns, args.num_inputs,
                                    has_next ? weight + kColumns * args.num_inputs : nullptr, sums);
  sums *= args.gate;
  float products[kWidth];
  std::memcpy(products, &sums, sizeof products);
  if constexpr (kIsInt8) {
    for (std::int64_t r = 0; r < num_rows; ++r) {
      for (std::int64_t c = 0; c < num_columns; ++c) products[r * kColumns + c] *= args.scales[column + c];
    }
  }
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

// A block of columns of some rows: four rows at a time while the weight's are in the first cache, a last one alone.
template <int kWidth, DType dtype, typename Products>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, std::int64_t first_row, std::int64_t end_row,
                                     std::int64_t first_column) {
  constexpr int kRows = 4, kColumns = kWidth / kRows;
  const std::int64_t end_column = std::min(first_column + kLinearColumns, args.num_outputs);
  const std::int64_t last = (end_row - first_row) % kRows == 1 ? end_row - 1 : end_row;
  for (std::int64_t column = first_column; column < end_column; column += kColumns) {
    for (std::int64_t row = first_row; row < last; row += kRows)
      multiply_tile<kWidth, dtype, Products, kRows>(args, row, column, row == first_row);
  }
  for (std::int64_t column = first_column; last < end_row && column < end_column; column += kWidth)
    multiply_tile<kWidth, dtype, Products, 1>(args, last, column, true);
}

// So many rows that they stay in the second cache while the whole weight passes.
std::int64_t rows_of_block(const LinearArgs& args) {
  constexpr std::int64_t kBytes = 256 * 1024;
  const std::int64_t element_bytes = args.scales || args.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t rows = kBytes / (args.num_inputs * element_bytes + 1);
  return std::clamp<std::int64_t>(rows / 4 * 4, 8, 64);
}

template <int kWidth, DType dtype, typename Products>
TRIMSERVE_INLINE void multiply_all(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = rows_of_block(args);
  for (std::int64_t row = 0; row < args.num_rows; row += size) {
    const std::int64_t end_row = std::min(row + size, args.num_rows);
    for (std::int64_t block = begin; block < end; ++block)
      multiply_block<kWidth, dtype, Products>(args, row, end_row, block * kLinearColumns);
  }
}

}  // namespace

void linear(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      if (args.scales) return multiply_all<width, dtype, Int8Products<width>>(args, begin, end);
#ifdef __x86_64__
      if constexpr (width == 16 && dtype == DType::kBFloat16) {
        if (has_pair_products()) return multiply_all<width, dtype, PairProducts>(args, begin, end);
      }
#endif
      multiply_all<width, dtype, FloatProducts<width, dtype>>(args, begin, end);
    });
  });
}

void to_floats(const void* x, DType dtype, std::int64_t count, float* floats) {
  at_dtype(dtype, [&](auto constant) {
    const auto* const elements = static_cast<const Element<constant>*>(x);
    for (std::int64_t i = 0; i < count; ++i) floats[i] = elements[i].to_float();
  });
}

}  // namespace trimserve::cpu
