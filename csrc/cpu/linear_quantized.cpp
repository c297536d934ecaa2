// linear with int8 or int4 weights, for one row and for many, without floats of more than a few registers of them.
//   Rows are packed once as floats, in the order in which the weights' registers hold their inputs. A block of outputs
//   then passes rows and inputs in parts that stay in the first-level cache; sums along K stay vectors until the end.
//   int4: what a group's integers come to begins with -8 times the inputs' sum, and is added to the sums times the
//   group's scale. An output does not depend on the other rows, to the last bit.

#include "linear_quantized.h"

#include <algorithm>
#include <cstring>

#include "linear_tiles.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kRowsAtOnce = 32;     // whose sums stay in the second-level cache
constexpr std::int64_t kPartFloats = 4096;   // of packed rows; half of the first-level cache
constexpr std::int64_t kLongestGroup = 128;  // a part is a multiple of it
constexpr std::int64_t kQuad = 4;            // outputs that all rows pass together
constexpr std::int64_t kOutputsAhead = 8;    // to prefetch

std::int64_t units_of(std::int64_t num_inputs) { return (num_inputs + kUnit - 1) / kUnit; }

std::int64_t groups_of(const LinearArgs& args, std::int64_t num_inputs) {
  return (num_inputs + args.group - 1) / args.group;
}

// Rows are taken four at a time, then two, then one.
std::int64_t rows_of_tile(std::int64_t num_rows) { return num_rows >= 4 ? 4 : num_rows >= 2 ? 2 : 1; }

// Floats of a packed row: its elements, and behind those of its tile a vector for each group, which its sums begin
// with. The rows of a tile are interleaved vector by vector.
std::int64_t elements_of_row(const LinearArgs& args) { return units_of(args.num_inputs) * kUnit; }

template <int kWidth, typename Unit>
TRIMSERVE_INLINE std::int64_t size_of_row(const LinearArgs& args) {
  return elements_of_row(args) + (Unit::kHasGroups ? groups_of(args, args.num_inputs) * kWidth : 0);
}

// elements and offsets: of this row among the num_rows of its tile.
template <int kWidth, typename Unit, DType dtype>
TRIMSERVE_INLINE void pack_row(const LinearArgs& args, std::int64_t row, std::int64_t num_rows,
                               float* elements, float* offsets) {
  const auto* const x = static_cast<const Element<dtype>*>(args.x) + row * args.x_stride;
  const std::int64_t stride = num_rows * kWidth;
  for (std::int64_t unit = 0; unit < units_of(args.num_inputs); ++unit) {
    float* const offset = offsets + (Unit::kHasGroups ? unit * kUnit / args.group * stride : 0);
    if (Unit::kHasGroups && unit * kUnit % args.group == 0) std::fill_n(offset, kWidth, 0.0f);
    for (int r = 0; r < kUnit / kWidth; ++r, elements += stride) {
      for (int lane = 0; lane < kWidth; ++lane) {
        const std::int64_t k = unit * kUnit + Unit::input(r, lane);
        const float value = k < args.num_inputs ? x[k].to_float() : 0.0f;
        elements[lane] = value * Unit::factor(r);
        if (Unit::kHasGroups) offset[lane] -= 8.0f * value;
      }
    }
  }
}

// Some inputs of some outputs.
struct Part {
  const std::byte* weight;  // of the first output
  std::int64_t row_bytes;
  std::int64_t num_outputs;  // those past the last are not read
  std::int64_t ahead;        // bytes to what is prefetched meanwhile, or 0
  std::int64_t num_inputs;
  std::int64_t group;
  const float* scales;  // [groups, kLinearColumns]
};

// sums[r * kLinearColumns + c] += products of a tile's rows and outputs along a part. elements and offsets: as packed.
template <int kWidth, typename Unit, int kRows, int kColumns>
TRIMSERVE_INLINE void add_tile(const Part& part, const float* elements, const float* offsets, float* sums) {
  using Floats = typename Simd<kWidth>::Floats;
  const std::byte* weight[kColumns];
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    weight[c] = part.weight + std::min<std::int64_t>(c, part.num_outputs - 1) * part.row_bytes;
  });
  const float* scales = part.scales;
  Floats products[kRows * kColumns];
  const auto add_unit = [&] TRIMSERVE_INLINE_LAMBDA {
    typename Unit::Opened unit[kColumns];
    unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { Unit::open(unit[c], weight[c]); });
    unrolled<kUnit / kWidth>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
      Floats w[kColumns];
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { Unit::template take<r>(w[c], unit[c]); });
      unrolled<kRows>([&](auto row) TRIMSERVE_INLINE_LAMBDA {
        Floats x;
        Simd<kWidth>::load(x, elements + (r * kRows + row) * kWidth);
        unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { products[row * kColumns + c] += x * w[c]; });
      });
    });
    elements += kUnit * kRows;
  };
  const auto at_sums = [&](const auto& body) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kRows * kColumns>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      body(i, sums + (i / kColumns * kLinearColumns + i % kColumns) * kWidth);
    });
  };
  for (std::int64_t begin = 0; begin < part.num_inputs; begin += part.group) {
    const std::int64_t end = std::min(begin + part.group, part.num_inputs);
    at_sums([&](auto i, const float* sum) TRIMSERVE_INLINE_LAMBDA {
      Simd<kWidth>::load(products[i], Unit::kHasGroups ? offsets + i / kColumns * kWidth : sum);
    });
    std::int64_t k = begin;
    for (; k + (Unit::kHasGroups ? 1 : kUnit) <= end; k += kUnit) {
      if (part.ahead) {
        unrolled<kColumns>([&](auto c)
                               TRIMSERVE_INLINE_LAMBDA { __builtin_prefetch(weight[c] + part.ahead); });
      }
      add_unit();
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { weight[c] += Unit::kBytes; });
    }
    if (k < end) {
      std::byte padded[kColumns][kUnit] = {};
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
        std::memcpy(padded[c], weight[c], end - k);
        weight[c] = padded[c];
      });
      add_unit();
    }
    at_sums([&](auto i, float* sum) TRIMSERVE_INLINE_LAMBDA {
      if constexpr (Unit::kHasGroups) {
        Floats so_far;
        Simd<kWidth>::load(so_far, sum);
        Simd<kWidth>::store(sum, so_far + products[i] * scales[i % kColumns]);
      } else {
        Simd<kWidth>::store(sum, products[i]);
      }
    });
    offsets += kRows * kWidth;
    scales += kLinearColumns;
  }
}

// Four outputs of a tile of rows.
template <int kWidth, typename Unit>
TRIMSERVE_INLINE void add_quad(std::int64_t num_rows, const Part& quad, const float* elements,
                               const float* offsets, float* sums) {
  if (num_rows == 2) return add_tile<kWidth, Unit, 2, kQuad>(quad, elements, offsets, sums);
  if (num_rows == 1) return add_tile<kWidth, Unit, 1, kQuad>(quad, elements, offsets, sums);
  constexpr int kColumns = kWidth == 16 ? 4 : 2;  // as many sums as registers hold
  Part part = quad;
  for (std::int64_t c = 0; c < std::min(kQuad, quad.num_outputs); c += kColumns) {
    part.weight = quad.weight + c * quad.row_bytes;
    part.num_outputs = quad.num_outputs - c;
    part.scales = quad.scales + c;
    add_tile<kWidth, Unit, 4, kColumns>(part, elements, offsets, sums + c * kWidth);
  }
}

// int4: the scales of a block of outputs as floats [groups, kLinearColumns], those of missing outputs 0.
void take_scales(const LinearArgs& args, std::int64_t first_output, std::int64_t first_input,
                 std::int64_t num_inputs, float* scales) {
  const std::int64_t row_size = groups_of(args, args.num_inputs), count = groups_of(args, num_inputs);
  std::fill_n(scales, count * kLinearColumns, 0.0f);
  at_dtype(args.scale_dtype, [&](auto dtype) {
    const auto* const stored = static_cast<const Element<dtype>*>(args.scales) + first_input / args.group;
    const std::int64_t num_outputs = std::min(kLinearColumns, args.num_outputs - first_output);
    for (std::int64_t c = 0; c < num_outputs; ++c) {
      const Element<dtype>* const of_output = stored + (first_output + c) * row_size;
      for (std::int64_t g = 0; g < count; ++g) scales[g * kLinearColumns + c] = of_output[g].to_float();
    }
  });
}

// Adds up the lanes of a block's sums, (row r, output c) at r * kLinearColumns + c, scales them and stores them.
template <int kWidth, typename Unit, DType dtype>
TRIMSERVE_INLINE void store_rows(const LinearArgs& args, std::int64_t first_row, std::int64_t num_rows,
                                 std::int64_t first_output, const float* sums) {
  const auto* const scales = static_cast<const float*>(args.scales);
  auto* const output = static_cast<Element<dtype>*>(args.output);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t c = 0; c < kLinearColumns && first_output + c < args.num_outputs; c += kWidth) {
      typename Simd<kWidth>::Floats vectors[kWidth];
      std::memcpy(vectors, sums + (row * kLinearColumns + c) * kWidth, sizeof vectors);
      Simd<kWidth>::sum_lanes(vectors);
      const typename Simd<kWidth>::Floats gated = vectors[0] * args.gate;
      float products[kWidth];
      std::memcpy(products, &gated, sizeof products);
      const std::int64_t column = first_output + c;
      const std::int64_t count = std::min<std::int64_t>(kWidth, args.num_outputs - column);
      for (std::int64_t i = 0; !Unit::kHasGroups && i < count; ++i) products[i] *= scales[column + i];
      store<dtype>(products, count, args.accumulates, output + (first_row + row) * args.num_outputs + column);
    }
  }
}

// As many inputs as all rows at once leave room for.
std::int64_t part_size(std::int64_t num_rows) {
  return std::max(kPartFloats / num_rows / kLongestGroup * kLongestGroup, kLongestGroup);
}

template <int kWidth, typename Unit>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, const float* packed, std::int64_t first_row,
                                     std::int64_t first_output) {
  const std::int64_t num_rows = std::min(kRowsAtOnce, args.num_rows - first_row), size = part_size(num_rows);
  const std::int64_t row_size = size_of_row<kWidth, Unit>(args), row_elements = elements_of_row(args);
  const std::int64_t row_bytes = Unit::kHasGroups ? row_elements / kUnit * Unit::kBytes : args.num_inputs;
  alignas(64) float sums[kRowsAtOnce * kLinearColumns * kWidth];
  alignas(64) float scales[kPartFloats / kUnit * kLinearColumns];
  std::fill_n(sums, num_rows * kLinearColumns * kWidth, 0.0f);
  for (std::int64_t k = 0; k < args.num_inputs; k += size) {
    const std::int64_t num_inputs = std::min(size, args.num_inputs - k);
    if (Unit::kHasGroups) take_scales(args, first_output, k, num_inputs, scales);
    const auto* const weight = static_cast<const std::byte*>(args.weight) + k / kUnit * Unit::kBytes;
    const bool is_last = k + size >= args.num_inputs;
    for (std::int64_t c = 0; c < kLinearColumns && first_output + c < args.num_outputs; c += kQuad) {
      // What is read next: outputs of this block, in its next part if these are its last, or of the next block.
      const bool is_next = c + kOutputsAhead >= kLinearColumns;
      const std::int64_t outputs_ahead = kOutputsAhead - (is_next && !is_last ? kLinearColumns : 0);
      const std::int64_t inputs_ahead = !is_next ? 0 : is_last ? -k : size;
      const bool has_next = first_row == 0 && first_output + c + outputs_ahead + kQuad <= args.num_outputs;
      Part quad{weight + (first_output + c) * row_bytes,
                row_bytes,
                args.num_outputs - first_output - c,
                0,
                num_inputs,
                Unit::kHasGroups ? args.group : size,
                scales + c};
      for (std::int64_t row = 0; row < num_rows;) {
        const std::int64_t of_tile = rows_of_tile(num_rows - row);
        quad.ahead =
            has_next && row == 0 ? outputs_ahead * row_bytes + inputs_ahead / kUnit * Unit::kBytes : 0;
        const float* const tile = packed + (first_row + row) * row_size;
        const float* const offsets =
            tile + of_tile * (row_elements + (Unit::kHasGroups ? k / args.group * kWidth : 0));
        add_quad<kWidth, Unit>(of_tile, quad, tile + of_tile * k, offsets,
                               sums + (row * kLinearColumns + c) * kWidth);
        row += of_tile;
      }
    }
  }
  at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    store_rows<kWidth, Unit, dtype>(args, first_row, num_rows, first_output, sums);
  });
}

// Calls body with the width and the type of the units.
template <typename Body>
void at_units(const LinearArgs& args, const Body& body) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    if (args.format == WeightFormat::kInt4) return body(width, std::type_identity<Int4Unit<width>>());
    body(width, std::type_identity<Int8Unit<width>>());
  });
}

}  // namespace

std::int64_t quantized_packed_size(const LinearArgs& args) {
  std::int64_t size = 0;
  at_units(args, [&]<typename Unit>(auto width, std::type_identity<Unit>)
                     TRIMSERVE_INLINE_LAMBDA { size = args.num_rows * size_of_row<width, Unit>(args); });
  return size;
}

void pack_quantized_rows(const LinearArgs& args, float* packed) {
  at_units(args, [&]<typename Unit>(auto width, std::type_identity<Unit>) TRIMSERVE_INLINE_LAMBDA {
    const std::int64_t row_size = size_of_row<width, Unit>(args);
    for (std::int64_t first = 0; first < args.num_rows;) {
      const std::int64_t num_rows = rows_of_tile(args.num_rows - first);
      float* const tile = packed + first * row_size;
      for (std::int64_t r = 0; r < num_rows; ++r) {
        at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
          pack_row<width, Unit, dtype>(args, first + r, num_rows, tile + r * width,
                                       tile + num_rows * elements_of_row(args) + r * width);
        });
      }
      first += num_rows;
    }
  });
}

void linear_quantized(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end) {
  at_units(args, [&]<typename Unit>(auto width, std::type_identity<Unit>) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t row = 0; row < args.num_rows; row += kRowsAtOnce) {
      for (std::int64_t block = begin; block < end; ++block)
        multiply_block<width, Unit>(args, packed, row, block * kLinearColumns);
    }
  });
}

}  // namespace trimserve::cpu
