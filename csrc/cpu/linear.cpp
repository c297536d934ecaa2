// linear: rows times a weight that lies as torch stores it.
//   x [R, K]     weight [N, K]     output [R, N] = x weight^T, or output + gate * x weight^T
//   Tiles of as many products as a vector has lanes stay in registers: sums along K, whose lanes are added up at its end,
//   so nothing is packed or transposed. Made for the few rows of a decode step: one row is bound by the bytes of the
//   weight, more by arithmetic. An output is the same to the last bit in every batch.

#include <cstring>

#include "simd.h"

namespace trimserve::cpu {
namespace {

// kRows rows of x times kWidth / kRows rows of the weight: lane r * kColumns + c of `sums`. Rows from num_rows on are not
// read, and columns from num_columns on. `ahead`, unless null, is weight that is read next: it is fetched meanwhile.
template <int kWidth, DType dtype, int kRows>
TRIMSERVE_INLINE void multiply(const Element<dtype>* x, std::int64_t x_stride, std::int64_t num_rows,
                               const Element<dtype>* weight, std::int64_t num_columns,
                               std::int64_t num_inputs, const Element<dtype>* ahead,
                               typename Simd<kWidth>::Floats& total) {
  using Stored = Packed<kWidth, dtype>;
  using Floats = typename Simd<kWidth>::Floats;
  constexpr int kColumns = kWidth / kRows, kSize = Stored::kVectors * kWidth;
  const Element<dtype>* rows[kRows];
  const Element<dtype>* columns[kColumns];
  unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
    rows[r] = x + std::min<std::int64_t>(r, num_rows - 1) * x_stride;
  });
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    columns[c] = weight + std::min<std::int64_t>(c, num_columns - 1) * num_inputs;
  });
  Floats sums[kWidth];
  unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = Floats{}; });
  const auto add = [&](std::int64_t k, const auto& load) TRIMSERVE_INLINE_LAMBDA {
    Floats w[kColumns][Stored::kVectors];
    unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { load(w[c], columns[c] + k); });
    unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
      Floats value[Stored::kVectors];
      load(value, rows[r] + k);
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
        unrolled<Stored::kVectors>(
            [&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[r * kColumns + c] += value[i] * w[c][i]; });
      });
    });
  };
  const std::int64_t whole = num_inputs / kSize * kSize;
  for (std::int64_t k = 0; k < whole; k += kSize) {
    if (ahead) {
      unrolled<kColumns>([&](auto c)
                             TRIMSERVE_INLINE_LAMBDA { __builtin_prefetch(ahead + c * num_inputs + k); });
    }
    add(k, [](Floats(&vectors)[Stored::kVectors], const Element<dtype>* source)
               TRIMSERVE_INLINE_LAMBDA { Stored::load(vectors, source); });
  }
  if (whole < num_inputs) {
    add(whole, [&](Floats(&vectors)[Stored::kVectors], const Element<dtype>* source) TRIMSERVE_INLINE_LAMBDA {
      Element<dtype> padded[kSize] = {};
      std::memcpy(padded, source, (num_inputs - whole) * sizeof *source);
      Stored::load(vectors, padded);
    });
  }
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

template <int kWidth, DType dtype, int kRows>
TRIMSERVE_INLINE void multiply_tile(const LinearArgs& args, std::int64_t row, std::int64_t column,
                                    bool is_first) {
  using Floats = typename Simd<kWidth>::Floats;
  constexpr int kColumns = kWidth / kRows;
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - row);
  const std::int64_t num_columns = std::min<std::int64_t>(kColumns, args.num_outputs - column);
  const auto* const x = static_cast<const Element<dtype>*>(args.x) + row * args.x_stride;
  const auto* const weight = static_cast<const Element<dtype>*>(args.weight) + column * args.num_inputs;
  const bool has_next = is_first && column + 2 * kColumns <= args.num_outputs;
  Floats sums;
  multiply<kWidth, dtype, kRows>(x, args.x_stride, num_rows, weight, num_columns, args.num_inputs,
                                 has_next ? weight + kColumns * args.num_inputs : nullptr, sums);
  sums *= args.gate;
  float products[kWidth];
  std::memcpy(products, &sums, sizeof products);
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
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, std::int64_t first_row, std::int64_t end_row,
                                     std::int64_t first_column) {
  constexpr int kRows = 4, kColumns = kWidth / kRows;
  const std::int64_t end_column = std::min(first_column + kLinearColumns, args.num_outputs);
  const std::int64_t last = (end_row - first_row) % kRows == 1 ? end_row - 1 : end_row;
  for (std::int64_t column = first_column; column < end_column; column += kColumns) {
    for (std::int64_t row = first_row; row < last; row += kRows)
      multiply_tile<kWidth, dtype, kRows>(args, row, column, row == first_row);
  }
  for (std::int64_t column = first_column; last < end_row && column < end_column; column += kWidth)
    multiply_tile<kWidth, dtype, 1>(args, last, column, false);
}

// So many rows that they stay in the second cache while the whole weight passes.
template <DType dtype>
std::int64_t rows_of_block(const LinearArgs& args) {
  constexpr std::int64_t kBytes = 256 * 1024;
  const std::int64_t rows =
      kBytes / (args.num_inputs * static_cast<std::int64_t>(sizeof(Element<dtype>)) + 1);
  return std::clamp<std::int64_t>(rows / 4 * 4, 8, 64);
}

}  // namespace

void linear(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      const std::int64_t size = rows_of_block<dtype>(args);
      for (std::int64_t row = 0; row < args.num_rows; row += size) {
        const std::int64_t end_row = std::min(row + size, args.num_rows);
        for (std::int64_t block = begin; block < end; ++block)
          multiply_block<width, dtype>(args, row, end_row, block * kLinearColumns);
      }
    });
  });
}

}  // namespace trimserve::cpu
