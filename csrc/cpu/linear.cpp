// linear: rows times a weight in torch's own layout.
//   x [R, K]     weight [N, K]     scales [N] of an int8 weight
//   output [R, N] = gate * x weight^T, or output + gate * x weight^T
//   A tile of as many outputs as a vector has lanes stays in registers, one vector of partial sums along K each; lanes
//   are added up at the end, so the weight is neither packed nor transposed. The few rows of a decode step, which are
//   bound by reading the weight, have loops of their own (few_rows.h), and so have many rows (linear_many.cpp). An
//   output does not depend on the other rows, to the last bit.

#include "few_rows.h"
#include "linear_quantized.h"
#include "linear_tiles.h"

namespace trimserve::cpu {
namespace {

// kRows rows of x times kColumns rows of the weight, summed along K except across lanes. Rows from num_rows on and
// columns from num_columns on are not read. `ahead` is the weight to prefetch meanwhile, or null: that of a single row
// is read as fast as it comes, and goes to the second-level cache, which has more places for misses.
template <int kWidth, typename Operands, int kRows>
TRIMSERVE_INLINE void multiply(const typename Operands::Stored* x, std::int64_t x_stride,
                               std::int64_t num_rows, const typename Operands::StoredWeight* weight,
                               std::int64_t num_columns, std::int64_t num_inputs,
                               const typename Operands::StoredWeight* ahead,
                               typename Operands::Floats (&sums)[kWidth]) {
  using Vector = typename Operands::Vector;
  constexpr int kColumns = kWidth / kRows, kSize = Operands::kSize;
  constexpr int kAtOnce = std::min(kColumns, kWidth == 16 ? 8 : 4);
  const typename Operands::Stored* rows[kRows];
  const typename Operands::StoredWeight* columns[kColumns];
  unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
    rows[r] = x + std::min<std::int64_t>(r, num_rows - 1) * x_stride;
  });
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    columns[c] = weight + std::min<std::int64_t>(c, num_columns - 1) * num_inputs;
  });
  unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA { sums[i] = typename Operands::Floats{}; });
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
          Operands::add(sums[r * kColumns + kFirst + c], value, w[c]);
        });
      });
    };
    const auto step = [&](std::int64_t k) TRIMSERVE_INLINE_LAMBDA {
      if (ahead) {
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          __builtin_prefetch(ahead + (kFirst + c) * num_inputs + k, 0,
                             kRows == 1 ? kSecondLevel : kFirstLevel);
        });
      }
      add(k,
          [](Vector& vector, const auto* source) TRIMSERVE_INLINE_LAMBDA { Operands::load(vector, source); });
    };
    std::int64_t k = 0;
    for (; k < whole; k += kSize) step(k);
    if (whole < num_inputs) {
      add(whole, [&]<typename Stored>(Vector& vector, const Stored* source) TRIMSERVE_INLINE_LAMBDA {
        Stored padded[kSize] = {};
        std::memcpy(padded, source, (num_inputs - whole) * sizeof *source);
        Operands::load(vector, padded);
      });
    }
  });
}

template <int kWidth, DType dtype, typename Operands, int kRows>
TRIMSERVE_INLINE void multiply_tile(const LinearArgs& args, std::int64_t row, std::int64_t column,
                                    bool is_first) {
  using Weight = typename Operands::StoredWeight;
  constexpr int kColumns = kWidth / kRows;
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - row);
  const std::int64_t num_columns = std::min<std::int64_t>(kColumns, args.num_outputs - column);
  const auto* const x = static_cast<const typename Operands::Stored*>(args.x) + row * args.x_stride;
  const auto* const weight = static_cast<const Weight*>(args.weight) + column * args.num_inputs;
  const bool has_next = is_first && column + 2 * kColumns <= args.num_outputs;
  typename Operands::Floats sums[kWidth];
  multiply<kWidth, Operands, kRows>(x, args.x_stride, num_rows, weight, num_columns, args.num_inputs,
                                    has_next ? weight + kColumns * args.num_inputs : nullptr, sums);
  store_tile<kWidth, dtype, Operands, kRows>(args, row, column, sums);
}

// A block of columns of some rows: four rows at a time while the weight stays in the first-level cache; a single row
// left over goes alone.
template <int kWidth, DType dtype, typename Operands>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, std::int64_t first_row, std::int64_t end_row,
                                     std::int64_t first_column) {
  constexpr int kRows = 4, kColumns = kWidth / kRows;
  const std::int64_t end_column = std::min(first_column + kLinearColumns, args.num_outputs);
  const std::int64_t last = (end_row - first_row) % kRows == 1 ? end_row - 1 : end_row;
  for (std::int64_t column = first_column; column < end_column; column += kColumns) {
    for (std::int64_t row = first_row; row < last; row += kRows)
      multiply_tile<kWidth, dtype, Operands, kRows>(args, row, column, row == first_row);
  }
  for (std::int64_t column = first_column; last < end_row && column < end_column; column += kWidth)
    multiply_tile<kWidth, dtype, Operands, 1>(args, last, column, true);
}

// As many rows as stay in the second-level cache while the whole weight passes.
std::int64_t rows_of_block(const LinearArgs& args) {
  constexpr std::int64_t kBytes = 256 * 1024;
  const std::int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const std::int64_t rows = kBytes / (args.num_inputs * element_bytes + 1);
  return std::clamp<std::int64_t>(rows / 4 * 4, 8, 64);
}

template <int kWidth, DType dtype, typename Operands>
TRIMSERVE_INLINE void multiply_all(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = rows_of_block(args);
  for (std::int64_t row = 0; row < args.num_rows; row += size) {
    const std::int64_t end_row = std::min(row + size, args.num_rows);
    for (std::int64_t block = begin; block < end; ++block)
      multiply_block<kWidth, dtype, Operands>(args, row, end_row, block * kLinearColumns);
  }
}

}  // namespace

std::int64_t packed_size(const LinearArgs& args) {
  if (has_many_rows(args)) return many_packed_size(args);
  if (args.format != WeightFormat::kFloats) return quantized_packed_size(args);
  std::int64_t size = 0;
  at_operands(args, [&]<typename Operands>(auto, auto, std::type_identity<Operands>) TRIMSERVE_INLINE_LAMBDA {
    if constexpr (Operands::kFewestRows < kNever)
      size = is_few<Operands>(args) ? (args.num_rows + 7) * packed_row_size<Operands>(args) : 0;
  });
  return size;
}

void pack_rows(const LinearArgs& args, float* packed) {
  if (has_many_rows(args)) return pack_many_rows(args, packed);
  if (args.format != WeightFormat::kFloats) return pack_quantized_rows(args, packed);
  at_operands(args,
              [&]<typename Operands>(auto width, auto, std::type_identity<Operands>) TRIMSERVE_INLINE_LAMBDA {
                if constexpr (Operands::kFewestRows < kNever) pack_few<width, Operands>(args, packed);
              });
}

void linear(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end) {
  if (has_many_rows(args)) return linear_many(args, packed, begin, end);
  if (args.format != WeightFormat::kFloats) return linear_quantized(args, packed, begin, end);
  at_operands(args, [&]<typename Operands>(auto width, auto dtype, std::type_identity<Operands>)
                        TRIMSERVE_INLINE_LAMBDA {
                          if constexpr (Operands::kFewestRows < kNever) {
                            if (packed) return multiply_few<width, dtype, Operands>(args, packed, begin, end);
                          }
                          multiply_all<width, dtype, Operands>(args, begin, end);
                        });
}

}  // namespace trimserve::cpu
