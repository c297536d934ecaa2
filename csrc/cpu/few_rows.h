// linear for the few rows of a decode step, which multiply about as fast as the weight arrives from memory.
//
// Rows are packed; a tile is some of them times three outputs, as many sums as registers hold, along all of K. The
// weight passes once, in memory order, and is prefetched two tiles ahead into the second-level cache: into the first,
// prefetches would take the places for misses that the loads need. Results equal those of linear.cpp's loops to the
// last bit.

#pragma once

#include "linear_tiles.h"

namespace trimserve::cpu {

constexpr std::int64_t kFewRows = 48;
constexpr int kFewColumns = 3;
constexpr int kTilesAhead = 2;

// Rows of a tile, at most.
template <int kWidth>
constexpr int kMostRows = kWidth == 16 ? 8 : 4;

template <typename Operands>
TRIMSERVE_INLINE bool is_few(const LinearArgs& args) {
  return Operands::kFewestRows <= args.num_rows && args.num_rows <= kFewRows;
}

// Rows of the group that begins at `row`; the last may be missing.
template <int kWidth>
TRIMSERVE_INLINE int rows_of_group(const LinearArgs& args, std::int64_t row) {
  return args.num_rows - row > 4 ? kMostRows<kWidth> : 4;
}

// Floats of a packed row: registers, the last padded with zeros.
template <typename Operands>
TRIMSERVE_INLINE std::int64_t packed_row_size(const LinearArgs& args) {
  constexpr std::int64_t kBytes = sizeof(typename Operands::Vector), kFloatBytes = sizeof(float);
  return (args.num_inputs + Operands::kSize - 1) / Operands::kSize * (kBytes / kFloatBytes);
}

template <typename Operands, typename Stored>
TRIMSERVE_INLINE void load_padded(typename Operands::Vector& vector, const Stored* source,
                                  std::int64_t count) {
  Stored padded[Operands::kSize] = {};
  std::copy_n(source, count, padded);
  Operands::load(vector, padded);
}

// Groups of rows, each as registers [K / kSize, rows of the group].
template <int kWidth, typename Operands>
TRIMSERVE_INLINE void pack_few(const LinearArgs& args, float* packed) {
  constexpr int kSize = Operands::kSize;
  typename Operands::Vector vector;
  const std::int64_t row_size = packed_row_size<Operands>(args);
  for (std::int64_t first = 0; first < args.num_rows;) {
    const int num_rows = rows_of_group<kWidth>(args, first);
    for (int r = 0; r < num_rows; ++r) {
      const std::int64_t row = std::min(first + r, args.num_rows - 1);
      const auto* const x = static_cast<const typename Operands::Stored*>(args.x) + row * args.x_stride;
      char* target = reinterpret_cast<char*>(packed + first * row_size) + r * sizeof vector;
      for (std::int64_t k = 0; k < args.num_inputs; k += kSize, target += num_rows * sizeof vector) {
        if (k + kSize <= args.num_inputs) {
          Operands::load(vector, x + k);
        } else {
          load_padded<Operands>(vector, x + k, args.num_inputs - k);
        }
        std::memcpy(target, &vector, sizeof vector);
      }
    }
    first += num_rows;
  }
}

// The products of a group of rows with the outputs from `column` on, of which those from `end` on are not read.
template <int kWidth, DType dtype, typename Operands, int kRows>
TRIMSERVE_INLINE void multiply_few_tile(const LinearArgs& args, const float* packed, std::int64_t row,
                                        std::int64_t column, std::int64_t end) {
  using Vector = typename Operands::Vector;
  using Floats = typename Operands::Floats;
  constexpr int kSize = Operands::kSize, kSums = kRows * kFewColumns, kGroups = (kSums + kWidth - 1) / kWidth;
  const auto* const rows = reinterpret_cast<const char*>(packed);
  const auto* const first =
      static_cast<const typename Operands::StoredWeight*>(args.weight) + column * args.num_inputs;
  const std::int64_t num_columns = std::min<std::int64_t>(kFewColumns, end - column);
  const std::int64_t ahead = kTilesAhead * kFewColumns * args.num_inputs,
                     whole = args.num_inputs / kSize * kSize;
  const typename Operands::StoredWeight* weight[kFewColumns];
  unrolled<kFewColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    weight[c] = first + std::min<std::int64_t>(c, num_columns - 1) * args.num_inputs;
  });
  Floats sums[kGroups][kWidth];
  unrolled<kGroups * kWidth>([&](auto i)
                                 TRIMSERVE_INLINE_LAMBDA { sums[i / kWidth][i % kWidth] = Floats{}; });
  const auto add = [&](std::int64_t k, const Vector(&w)[kFewColumns]) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
      Vector x;
      std::memcpy(&x, rows + (k / kSize * kRows + r) * sizeof x, sizeof x);
      unrolled<kFewColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
        constexpr int kSum = r * kFewColumns + c;
        Operands::add(sums[kSum / kWidth][kSum % kWidth], x, w[c]);
      });
    });
  };
  Vector w[kFewColumns];
  for (std::int64_t k = 0; k < whole; k += kSize) {
    unrolled<kFewColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
      __builtin_prefetch(weight[c] + k + ahead, 0, kSecondLevel);
      Operands::load(w[c], weight[c] + k);
    });
    add(k, w);
  }
  if (whole < args.num_inputs) {
    unrolled<kFewColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
      load_padded<Operands>(w[c], weight[c] + whole, args.num_inputs - whole);
    });
    add(whole, w);
  }
  unrolled<kGroups>([&](auto group) TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::sum_lanes(sums[group]); });
  float products[kGroups * kWidth];
  unrolled<kGroups>([&](auto group) TRIMSERVE_INLINE_LAMBDA {
    Simd<kWidth>::store(products + group * kWidth, sums[group][0] * args.gate);
  });
  auto* const output = static_cast<Element<dtype>*>(args.output) + row * args.num_outputs + column;
  for (std::int64_t r = 0; r < std::min<std::int64_t>(kRows, args.num_rows - row); ++r)
    store<dtype>(products + r * kFewColumns, num_columns, args.accumulates, output + r * args.num_outputs);
}

// All rows times blocks of outputs.
template <int kWidth, DType dtype, typename Operands>
TRIMSERVE_INLINE void multiply_few(const LinearArgs& args, const float* packed, std::int64_t begin,
                                   std::int64_t end) {
  const std::int64_t row_size = packed_row_size<Operands>(args);
  const std::int64_t end_column = std::min(end * kLinearColumns, args.num_outputs);
  for (std::int64_t column = begin * kLinearColumns; column < end_column; column += kFewColumns) {
    for (std::int64_t row = 0; row < args.num_rows;) {
      const float* const rows = packed + row * row_size;
      const int num_rows = rows_of_group<kWidth>(args, row);
      if (num_rows == kMostRows<kWidth>) {
        multiply_few_tile<kWidth, dtype, Operands, kMostRows<kWidth>>(args, rows, row, column, end_column);
      } else {
        multiply_few_tile<kWidth, dtype, Operands, 4>(args, rows, row, column, end_column);
      }
      row += num_rows;
    }
  }
}

}  // namespace trimserve::cpu
