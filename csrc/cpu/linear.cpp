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

// What fills a register, and how it becomes floats.
template <int kWidth, DType dtype>
struct Floating : Packed<kWidth, dtype> {
  using Stored = Element<dtype>;
};

template <int kWidth>
struct Int8 {
  static constexpr int kVectors = 1;
  using Stored = std::int8_t;
  using Floats = typename Simd<kWidth>::Floats;
  using Ints = typename Simd<kWidth>::Ints;
  typedef std::int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));

  TRIMSERVE_INLINE static void load(Floats (&x)[1], const std::int8_t* source) {
    Ints wide;
#ifdef __x86_64__
    if constexpr (kWidth >= 8) {  // in one instruction, which GCC 12 does not find by itself
      asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bytes*>(source)));
      x[0] = __builtin_convertvector(wide, Floats);
      return;
    }
#endif
    Bytes bytes;
    std::memcpy(&bytes, source, sizeof bytes);
    wide = __builtin_convertvector(bytes, Ints);
    x[0] = __builtin_convertvector(wide, Floats);
  }
};

// kRows rows of x times kWidth / kRows rows of the weight: lane r * kColumns + c of `total`. Rows from num_rows on
// are not read, and columns from num_columns on. `ahead`, unless null, is weight that is read next: it is fetched
// meanwhile.
template <int kWidth, typename X, typename Weight, int kRows>
TRIMSERVE_INLINE void multiply(const typename X::Stored* x, std::int64_t x_stride, std::int64_t num_rows,
                               const typename Weight::Stored* weight, std::int64_t num_columns,
                               std::int64_t num_inputs, const typename Weight::Stored* ahead,
                               typename Simd<kWidth>::Floats& total) {
  using Floats = typename Simd<kWidth>::Floats;
  static_assert(X::kVectors == Weight::kVectors);
  constexpr int kColumns = kWidth / kRows, kVectors = X::kVectors, kSize = kVectors * kWidth;
  constexpr int kAtOnce = std::min(kColumns, 8);  // memory is read fastest in few streams
  const typename X::Stored* rows[kRows];
  const typename Weight::Stored* columns[kColumns];
  unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
    rows[r] = x + std::min<std::int64_t>(r, num_rows - 1) * x_stride;
  });
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    columns[c] = weight + std::min<std::int64_t>(c, num_columns - 1) * num_inputs;
  });
  Floats sums[kWidth];
  unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = Floats{}; });
  const std::int64_t whole = num_inputs / kSize * kSize;
  unrolled<kColumns / kAtOnce>([&](auto strip) TRIMSERVE_INLINE_LAMBDA {
    constexpr int kFirst = strip * kAtOnce;
    const auto add = [&](std::int64_t k, const auto& load) TRIMSERVE_INLINE_LAMBDA {
      Floats w[kAtOnce][kVectors];
      unrolled<kAtOnce>([&](auto c)
                            TRIMSERVE_INLINE_LAMBDA { load(Weight(), w[c], columns[kFirst + c] + k); });
      unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
        Floats value[kVectors];
        load(X(), value, rows[r] + k);
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          unrolled<kVectors>(
              [&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[r * kColumns + kFirst + c] += value[i] * w[c][i]; });
        });
      });
    };
    for (std::int64_t k = 0; k < whole; k += kSize) {
      if (ahead) {
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          __builtin_prefetch(ahead + (kFirst + c) * num_inputs + k);
        });
      }
      add(k, [](auto operand, Floats(&vectors)[kVectors], const auto* source)
                 TRIMSERVE_INLINE_LAMBDA { operand.load(vectors, source); });
    }
    if (whole < num_inputs) {
      add(whole, [&](auto operand, Floats(&vectors)[kVectors], const auto* source) TRIMSERVE_INLINE_LAMBDA {
        typename decltype(operand)::Stored padded[kSize] = {};
        std::memcpy(padded, source, (num_inputs - whole) * sizeof *source);
        operand.load(vectors, padded);
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

template <int kWidth, DType dtype, bool kIsInt8, int kRows>
TRIMSERVE_INLINE void multiply_tile(const LinearArgs& args, std::int64_t row, std::int64_t column,
                                    bool is_first) {
  using Floats = typename Simd<kWidth>::Floats;
  using X = Floating<kWidth, kIsInt8 ? DType::kFloat32 : dtype>;
  using Weight = std::conditional_t<kIsInt8, Int8<kWidth>, X>;
  constexpr int kColumns = kWidth / kRows;
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - row);
  const std::int64_t num_columns = std::min<std::int64_t>(kColumns, args.num_outputs - column);
  const auto* const x = static_cast<const typename X::Stored*>(args.x) + row * args.x_stride;
  const auto* const weight =
      static_cast<const typename Weight::Stored*>(args.weight) + column * args.num_inputs;
  // One row of floats reads ahead by itself: it waits for nothing else.
  constexpr bool kFetches = kRows > 1 || kIsInt8;
  const bool has_next = kFetches && is_first && column + 2 * kColumns <= args.num_outputs;
  Floats sums;
  multiply<kWidth, X, Weight, kRows>(x, args.x_stride, num_rows, weight, num_columns, args.num_inputs,
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
template <int kWidth, DType dtype, bool kIsInt8>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, std::int64_t first_row, std::int64_t end_row,
                                     std::int64_t first_column) {
  constexpr int kRows = 4, kColumns = kWidth / kRows;
  const std::int64_t end_column = std::min(first_column + kLinearColumns, args.num_outputs);
  const std::int64_t last = (end_row - first_row) % kRows == 1 ? end_row - 1 : end_row;
  for (std::int64_t column = first_column; column < end_column; column += kColumns) {
    for (std::int64_t row = first_row; row < last; row += kRows)
      multiply_tile<kWidth, dtype, kIsInt8, kRows>(args, row, column, row == first_row);
  }
  for (std::int64_t column = first_column; last < end_row && column < end_column; column += kWidth)
    multiply_tile<kWidth, dtype, kIsInt8, 1>(args, last, column, true);
}

// So many rows that they stay in the second cache while the whole weight passes.
std::int64_t rows_of_block(const LinearArgs& args) {
  constexpr std::int64_t kBytes = 256 * 1024;
  const std::int64_t element_bytes = args.scales || args.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t rows = kBytes / (args.num_inputs * element_bytes + 1);
  return std::clamp<std::int64_t>(rows / 4 * 4, 8, 64);
}

}  // namespace

void linear(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = rows_of_block(args);
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      for (std::int64_t row = 0; row < args.num_rows; row += size) {
        const std::int64_t end_row = std::min(row + size, args.num_rows);
        for (std::int64_t block = begin; block < end; ++block) {
          if (args.scales) {
            multiply_block<width, dtype, true>(args, row, end_row, block * kLinearColumns);
          } else {
            multiply_block<width, dtype, false>(args, row, end_row, block * kLinearColumns);
          }
        }
      }
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
