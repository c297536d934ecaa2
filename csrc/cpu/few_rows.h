// linear for the few rows of a decode step, which multiply faster than the weight arrives from memory.
//
// A core reaches full memory bandwidth only with many cache misses outstanding, more than its reordering window finds
// between multiplications. So each line is prefetched some outputs ahead, and lines still missing are requested
// together shortly before they are needed. Rows are packed and cut along K, which leaves the first-level cache room for
// the prefetched lines. Results equal those of linear.cpp's loops to the last bit.

#pragma once

#include "linear_tiles.h"

namespace trimserve::cpu {

constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kPackedBytes = 32 * 1024;  // of rows that need not be cut
constexpr std::int64_t kPartBytes = 1024;         // of an output's weight, else
constexpr std::int64_t kAskedBytes = 512;         // of an output's weight, at once
constexpr std::int64_t kOutputsAhead = 8;

template <typename Operands>
TRIMSERVE_INLINE bool is_few(const LinearArgs& args) {
  return Operands::kFewestRows <= args.num_rows && args.num_rows <= kFewRows;
}

// Rows of the group that begins at `row`; the last may be missing.
TRIMSERVE_INLINE int rows_of_group(const LinearArgs& args, int width, std::int64_t row) {
  return width >= 8 && args.num_rows - row > 4 ? 8 : 4;
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
    const int num_rows = rows_of_group(args, kWidth, first);
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

// A part of K, [begin, end), and where the one that is read after it begins.
struct Part {
  std::int64_t begin, end, next;
};

// Some rows of the weight: of outputs [first, first + kColumns), of which those past the last are not read.
template <typename Stored>
struct Outputs {
  const Stored* weight;
  const Stored* ahead;  // to prefetch meanwhile, or null
  std::int64_t count;
  std::int64_t num_inputs;
};

// sums[r * kColumns + c] += products along a part of K.
template <int kWidth, typename Operands, int kRows>
TRIMSERVE_INLINE void add_part(const float* packed, const Outputs<typename Operands::StoredWeight>& outputs,
                               const Part& part, typename Operands::Floats (&sums)[kWidth]) {
  using Vector = typename Operands::Vector;
  using Stored = typename Operands::StoredWeight;
  constexpr int kColumns = kWidth / kRows, kSize = Operands::kSize;
  constexpr std::int64_t kAsked = kAskedBytes / sizeof(Stored), kLine = 64 / sizeof(Stored);
  const auto* const rows = reinterpret_cast<const char*>(packed);
  const std::int64_t whole = std::min(part.end, outputs.num_inputs / kSize * kSize);
  const Stored* weight[kColumns];
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    weight[c] = outputs.weight + std::min<std::int64_t>(c, outputs.count - 1) * outputs.num_inputs;
  });
  const auto add = [&](std::int64_t k, const Vector(&w)[kColumns]) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kRows>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
      Vector x;
      std::memcpy(&x, rows + (k / kSize * kRows + r) * sizeof x, sizeof x);
      unrolled<kColumns>([&](auto c)
                             TRIMSERVE_INLINE_LAMBDA { Operands::add(sums[r * kColumns + c], x, w[c]); });
    });
  };
  for (std::int64_t asked = part.begin; asked < whole; asked += kAsked) {
    const std::int64_t end = std::min(asked + kAsked, whole);
    if (outputs.ahead) {
      for (std::int64_t k = asked; k < end; k += kLine) {
        unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
          static_cast<void>(*reinterpret_cast<const volatile char*>(weight[c] + k));
        });
      }
    }
    for (std::int64_t k = asked; k < end; k += kSize) {
      Vector w[kColumns];
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
        if (outputs.ahead) __builtin_prefetch(outputs.ahead + c * outputs.num_inputs + k);
        Operands::load(w[c], weight[c] + k);
      });
      add(k, w);
    }
  }
  if (whole < part.end) {
    Vector w[kColumns];
    unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
      load_padded<Operands>(w[c], weight[c] + whole, part.end - whole);
    });
    add(whole, w);
  }
}

// A group of rows times a block of outputs, along a part of K. partials: its sums so far, unless the part is the whole.
template <int kWidth, DType dtype, typename Operands, int kRows>
TRIMSERVE_INLINE void multiply_group(const LinearArgs& args, const float* packed, std::int64_t row,
                                     std::int64_t block, const Part& part, float* partials) {
  constexpr int kColumns = kWidth / kRows;
  const auto* const weight = static_cast<const typename Operands::StoredWeight*>(args.weight);
  const std::int64_t first = block * kLinearColumns;
  const std::int64_t end = std::min(first + kLinearColumns, args.num_outputs);
  for (std::int64_t column = first; column < end; column += kColumns) {
    std::int64_t ahead = column + kOutputsAhead, shift = 0;
    if (ahead >= first + kLinearColumns) {  // is read with the next part, or with the next block's first one
      shift = part.next - part.begin;
      if (part.next) ahead -= kLinearColumns;
    }
    const Outputs<typename Operands::StoredWeight> outputs{
        weight + column * args.num_inputs,
        row == 0 && ahead + kColumns <= args.num_outputs ? weight + ahead * args.num_inputs + shift : nullptr,
        end - column, args.num_inputs};
    typename Operands::Floats sums[kWidth];
    float* const so_far = partials + (column - first) * kRows * kWidth;
    unrolled<kWidth>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      sums[i] = typename Operands::Floats{};
      if (part.begin) Simd<kWidth>::load(sums[i], so_far + i * kWidth);
    });
    add_part<kWidth, Operands, kRows>(packed, outputs, part, sums);
    if (part.end < args.num_inputs) {
      unrolled<kWidth>([&](auto i)
                           TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::store(so_far + i * kWidth, sums[i]); });
    } else {
      store_tile<kWidth, dtype, Operands, kRows>(args, row, column, sums);
    }
  }
}

// All rows times blocks of outputs.
template <int kWidth, DType dtype, typename Operands>
TRIMSERVE_INLINE void multiply_few(const LinearArgs& args, const float* packed, std::int64_t begin,
                                   std::int64_t end) {
  constexpr int kMost = std::min(kWidth, 8);
  const std::int64_t row_size = packed_row_size<Operands>(args);
  const std::int64_t bytes_of_8 = 8 * row_size * static_cast<std::int64_t>(sizeof(float));
  const bool fits =
      (args.num_rows > 4 ? (args.num_rows + 7) / 8 * bytes_of_8 : bytes_of_8 / 2) <= kPackedBytes;
  const std::int64_t part_size =
      fits ? args.num_inputs
           : kPartBytes / static_cast<std::int64_t>(sizeof(typename Operands::StoredWeight));
  alignas(64) float partials[kFewRows * kLinearColumns * kWidth];
  for (std::int64_t block = begin; block < end; ++block) {
    for (std::int64_t k = 0; k < args.num_inputs; k += part_size) {
      const std::int64_t next = k + part_size;
      const Part part{k, std::min(next, args.num_inputs), next < args.num_inputs ? next : 0};
      for (std::int64_t row = 0; row < args.num_rows;) {
        const float* const rows = packed + row * row_size;
        float* const so_far = partials + row * kLinearColumns * kWidth;
        const int num_rows = rows_of_group(args, kWidth, row);
        if (num_rows > 4) {
          multiply_group<kWidth, dtype, Operands, kMost>(args, rows, row, block, part, so_far);
        } else {
          multiply_group<kWidth, dtype, Operands, 4>(args, rows, row, block, part, so_far);
        }
        row += num_rows;
      }
    }
  }
}

}  // namespace trimserve::cpu
