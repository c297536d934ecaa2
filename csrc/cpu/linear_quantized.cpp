// linear with int8 or int4 weights, for up to 15 rows; on machines without products of bfloat16 pairs for any number of
// bfloat16 rows.
//   Rows are packed once, bfloat16 as int16 with scales (WordMath, or ByteMath in two bytes each) and others as
//   floats, in the order in which registers of weights hold their inputs. A block of outputs then passes rows and
//   inputs in parts that stay in the first-level cache. Weights leave their bytes in registers only, next to the
//   products. Sums of a group begin with -8 times the inputs' sum where weights are stored plus 8, and are added to
//   float32 sums along K times the scales; those stay vectors until the end. An output does not depend on the other
//   rows, to the last bit.

#include "linear_quantized.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "linear_tiles.h"
#include "quantized_rows.h"
#include "quantized_units.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kRowsAtOnce = 32;    // whose sums stay in the second-level cache
constexpr std::int64_t kPartBytes = 16384;  // of all these rows: half of the first-level cache
constexpr std::int64_t kPartInputs = 4096;  // of one row, at most
constexpr std::int64_t kMostGroups = kPartInputs / kInt4Unit;
constexpr std::int64_t kRowBytes = 20480;  // of a row that stays in the first-level cache
constexpr std::int64_t kLargeCache =
    49152;                                 // first-level, of cores that read two vectors of 64 bytes a cycle
constexpr std::int64_t kQuad = 4;          // outputs that all rows pass together
constexpr std::int64_t kOutputsAhead = 8;  // to prefetch
constexpr std::int64_t kBytesAhead = 16384;  // to prefetch for a row that is alone, at least

// Some inputs of some outputs.
struct Part {
  const std::byte* weight;  // of the first output
  std::int64_t row_bytes;
  std::int64_t num_outputs;  // those past the last are not read
  std::int64_t ahead;        // bytes to what is prefetched meanwhile, or 0
  std::int64_t num_inputs;
  // [outputs, scales_stride]: of a group's weights (int4); for a row that is alone, times its own.
  const float* scales;
  std::int64_t scales_stride;
  std::int64_t group;  // of inputs that share one
};

// sums[r * kLinearColumns + c] += products of a tile's rows and outputs along a part. elements and heads: as packed.
template <int kWidth, typename Math, typename Unit, int kRows, int kColumns, bool kIsAlone = false>
TRIMSERVE_INLINE void add_tile(const Part& part, const std::byte* elements, const Head<Math>* heads,
                               float* sums) {
  using Floats = typename Simd<kWidth>::Floats;
  constexpr std::int64_t kGroupBytes = Unit::bytes(Unit::kGroup);
  constexpr int kUnits = Unit::kGroup / Unit::kInputs, kRegisters = Unit::kInputs / Math::kInputs;
  // Of bytes, a lone row's group stays in registers while outputs pass one after another.
  constexpr int kAtOnce = kIsAlone && Math::kIsBytes ? 1 : kColumns;
  const std::byte* weight[kColumns];
  const float* scales = part.scales;
  unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
    weight[c] = part.weight + std::min<std::int64_t>(c, part.num_outputs - 1) * part.row_bytes;
  });
  const auto place = [](int i) TRIMSERVE_INLINE_LAMBDA {
    return (i / kColumns * kLinearColumns + i % kColumns) * kWidth;
  };
  const typename Math::Spread spread(Unit::kGroup / part.group);
  Floats so_far[kRows * kColumns];
  unrolled<kRows * kColumns>([&](auto i)
                                 TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::load(so_far[i], sums + place(i)); });
  // Outputs from `first` on.
  const auto add_group = [&](auto first) TRIMSERVE_INLINE_LAMBDA {
    typename Math::Sums products[kRows * kAtOnce];
    unrolled<kRows * kAtOnce>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      typename Math::Sums begun = {};
      if constexpr (Unit::kOffset > 0) Math::begin(begun, heads[i / kAtOnce].first);
      products[i] = begun;
    });
    unrolled<kUnits>([&](auto u) TRIMSERVE_INLINE_LAMBDA {
      typename Unit::Opened unit[kAtOnce];
      unrolled<kAtOnce>(
          [&](auto c) TRIMSERVE_INLINE_LAMBDA { Unit::open(unit[c], weight[first + c] + u * Unit::kBytes); });
      unrolled<kRegisters>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
        typename Math::Register w[kAtOnce];
        unrolled<kAtOnce>([&](auto c) TRIMSERVE_INLINE_LAMBDA { Unit::template take<r>(w[c], unit[c]); });
        unrolled<kRows>([&](auto row) TRIMSERVE_INLINE_LAMBDA {
          typename Math::Inputs x;
          Math::load(x, elements + ((u * kRegisters + r) * kRows + row) * sizeof x);
          unrolled<kAtOnce>([&](auto c)
                                TRIMSERVE_INLINE_LAMBDA { Math::add(products[row * kAtOnce + c], x, w[c]); });
        });
      });
    });
    constexpr bool kIsRowScaled = Math::kHasScales && !kIsAlone;
    constexpr bool kIsColumnScaled = Unit::kIsInt4 || (Math::kHasScales && kIsAlone);
    Floats of_row[kRows], of_column[kAtOnce];
    unrolled<kIsRowScaled ? kRows : 0>(
        [&](auto row) TRIMSERVE_INLINE_LAMBDA { spread(of_row[row], heads[row].scales); });
    unrolled<kIsColumnScaled ? kAtOnce : 0>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
      spread(of_column[c], scales + (first + c) * part.scales_stride);
    });
    unrolled<kRows * kAtOnce>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      constexpr int kPlace = i / kAtOnce * kColumns + first + i % kAtOnce;
      Floats floats, sum = so_far[kPlace];  // added to in place, it would stay in memory
      Math::to_floats(floats, products[i]);
      if constexpr (kIsRowScaled && kIsColumnScaled) {
        sum += floats * (of_row[i / kAtOnce] * of_column[i % kAtOnce]);
      } else if constexpr (kIsRowScaled) {
        sum += floats * of_row[i / kAtOnce];
      } else if constexpr (kIsColumnScaled) {
        sum += floats * of_column[i % kAtOnce];
      } else {
        sum += floats;
      }
      so_far[kPlace] = sum;
    });
  };
  for (std::int64_t left = part.num_inputs; left > 0; left -= Unit::kGroup) {
    std::byte padded[kColumns][kGroupBytes];
    if (left < Unit::kGroup) {
      unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA {
        std::memset(padded[c], 0, kGroupBytes);
        std::memcpy(padded[c], weight[c], Unit::bytes(left));
        weight[c] = padded[c];
      });
    } else if (part.ahead) {
      constexpr int kLine = 64, kLines = (kGroupBytes + kLine - 1) / kLine;
      unrolled<kColumns * kLines>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        __builtin_prefetch(weight[i / kLines] + part.ahead + i % kLines * kLine, 0, kSecondLevel);
      });
    }
    unrolled<kColumns / kAtOnce>([&](auto strip) TRIMSERVE_INLINE_LAMBDA {
      add_group(std::integral_constant<int, strip * kAtOnce>());
    });
    unrolled<kColumns>([&](auto c) TRIMSERVE_INLINE_LAMBDA { weight[c] += kGroupBytes; });
    elements += kUnits * kRegisters * kRows * sizeof(typename Math::Inputs);
    heads += kRows;
    scales += Unit::kGroup / part.group;
  }
  unrolled<kRows * kColumns>(
      [&](auto i) TRIMSERVE_INLINE_LAMBDA { Simd<kWidth>::store(sums + place(i), so_far[i]); });
}

// Four outputs of a tile of rows.
template <int kWidth, typename Math, typename Unit>
TRIMSERVE_INLINE void add_quad(std::int64_t num_rows, const Part& quad, const std::byte* elements,
                               const Head<Math>* heads, float* sums) {
  if (num_rows == 2) return add_tile<kWidth, Math, Unit, 2, kQuad>(quad, elements, heads, sums);
  if (num_rows == 1) return add_tile<kWidth, Math, Unit, 1, kQuad>(quad, elements, heads, sums);
  constexpr int kColumns = kWidth == 16 && !Math::kIsBytes ? 4 : 2;  // whose sums registers hold
  Part part = quad;
  for (std::int64_t c = 0; c < std::min(kQuad, quad.num_outputs); c += kColumns) {
    part.weight = quad.weight + c * quad.row_bytes;
    part.num_outputs = quad.num_outputs - c;
    part.scales = quad.scales + c * kMostGroups;
    add_tile<kWidth, Math, Unit, 4, kColumns>(part, elements, heads, sums + c * kWidth);
  }
}

// int4: the scales of a block of outputs as floats [kLinearColumns, stride], of some groups, times those of a row that
// is alone, or not. Up to a multiple of four groups they are filled up with 0.
TRIMSERVE_INLINE void take_scales(const LinearArgs& args, std::int64_t first_output, std::int64_t num_outputs,
                                  std::int64_t first_group, std::int64_t num_groups, std::int64_t stride,
                                  const float* of_row, float* scales) {
  const std::int64_t row_size = divide_up(args.num_inputs, args.group);
  const std::int64_t end = std::min(num_outputs, args.num_outputs - first_output);
  at_dtype(args.scale_dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    constexpr std::int64_t kLine = 64 / sizeof(Element<dtype>);
    for (std::int64_t c = 0; c < end; ++c) {
      const auto* const stored =
          static_cast<const Element<dtype>*>(args.scales) + (first_output + c) * row_size + first_group;
      for (std::int64_t g = 0; g < num_groups; g += kLine)
        __builtin_prefetch(stored + kLinearColumns * row_size + g, 0, kSecondLevel);
      float* const taken = scales + c * stride;
      if (of_row) {
        for (std::int64_t g = 0; g < num_groups; ++g) taken[g] = stored[g].to_float() * of_row[g];
      } else {
        for (std::int64_t g = 0; g < num_groups; ++g) taken[g] = stored[g].to_float();
      }
      for (std::int64_t g = num_groups; g % 4 != 0; ++g) taken[g] = 0.0f;
    }
  });
}

// Adds up the lanes of a block's sums, (row r, output c) at r * kLinearColumns + c, scales them and stores them.
template <int kWidth, bool kIsInt4, DType dtype>
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
      for (std::int64_t i = 0; !kIsInt4 && i < count; ++i) products[i] *= scales[column + i];
      store<dtype>(products, count, args.accumulates, output + (first_row + row) * args.num_outputs + column);
    }
  }
}

// As many inputs as all rows at once leave room for.
template <typename Math>
std::int64_t part_size(std::int64_t num_rows) {
  const std::int64_t size = kPartBytes / static_cast<std::int64_t>(sizeof(typename Math::Element)) / num_rows;
  return std::clamp(size / kMostAdded * kMostAdded, kMostAdded, kPartInputs);
}

// One quad of outputs, along a part of K, times all rows of a block.
template <int kWidth, typename Math, typename Unit>
TRIMSERVE_INLINE void add_rows(const LinearArgs& args, Part quad, const std::byte* rows,
                               std::int64_t num_rows, std::int64_t first_input, float* sums) {
  const PackedRow<Math, Unit> packed(args);
  for (std::int64_t row = 0; row < num_rows;) {
    const std::int64_t of_tile = rows_of_tile(num_rows - row);
    const std::byte* const tile = rows + row * packed.num_bytes;
    const std::byte* const elements = tile + of_tile * first_input * sizeof(typename Math::Element);
    const auto* const heads = reinterpret_cast<const Head<Math>*>(tile + of_tile * packed.element_bytes) +
                              of_tile * (first_input / Unit::kGroup);
    add_quad<kWidth, Math, Unit>(of_tile, quad, elements, heads, sums + row * kLinearColumns * kWidth);
    quad.ahead = 0;
    row += of_tile;
  }
}

template <int kWidth, typename Math, typename Unit>
TRIMSERVE_INLINE void multiply_block(const LinearArgs& args, const std::byte* rows, std::int64_t first_row,
                                     std::int64_t num_rows, std::int64_t first_output) {
  const std::int64_t size = part_size<Math>(num_rows);
  const std::int64_t row_bytes = Unit::bytes(args.num_inputs);
  alignas(64) float sums[kRowsAtOnce * kLinearColumns * kWidth];
  alignas(64) float scales[kLinearColumns * kMostGroups];
  const std::int64_t group = scale_group<Unit>(args);
  std::fill_n(sums, num_rows * kLinearColumns * kWidth, 0.0f);
  for (std::int64_t k = 0; k < args.num_inputs; k += size) {
    const std::int64_t num_inputs = std::min(size, args.num_inputs - k);
    if (Unit::kIsInt4)
      take_scales(args, first_output, kLinearColumns, k / args.group, divide_up(num_inputs, args.group),
                  kMostGroups, nullptr, scales);
    const auto* const weight = static_cast<const std::byte*>(args.weight) + Unit::bytes(k);
    const bool is_last = k + size >= args.num_inputs;
    for (std::int64_t c = 0; c < kLinearColumns && first_output + c < args.num_outputs; c += kQuad) {
      // What is read next: outputs of this block, in its next part if these are its last, or of the next block.
      const bool is_next = c + kOutputsAhead >= kLinearColumns;
      const std::int64_t outputs_ahead = kOutputsAhead - (is_next && !is_last ? kLinearColumns : 0);
      const std::int64_t inputs_ahead = !is_next ? 0 : is_last ? -k : size;
      const bool has_next = first_row == 0 && first_output + c + outputs_ahead + kQuad <= args.num_outputs;
      const std::int64_t ahead =
          outputs_ahead * row_bytes + inputs_ahead / kMostAdded * Unit::bytes(kMostAdded);
      const Part quad{weight + (first_output + c) * row_bytes,
                      row_bytes,
                      args.num_outputs - first_output - c,
                      has_next ? ahead : 0,
                      num_inputs,
                      scales + c * kMostGroups,
                      kMostGroups,
                      group};
      add_rows<kWidth, Math, Unit>(args, quad, rows, num_rows, k, sums + c * kWidth);
    }
  }
  at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    store_rows<kWidth, Unit::kIsInt4, dtype>(args, first_row, num_rows, first_output, sums);
  });
}

// Whether a core reads two vectors of 64 bytes a cycle: no system tells, but those with 48 KiB of first-level cache do.
bool reads_two_vectors() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const bool does = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 * 1024;
  return does;
#else
  return false;
#endif
}

// A block of outputs times a row that is alone, kColumns at a time. ahead: as of Part.
template <int kWidth, typename Math, typename Unit, int kColumns>
TRIMSERVE_INLINE void multiply_row(const LinearArgs& args, const LoneRow<Math, Unit>& x, std::int64_t row,
                                   std::int64_t first_output, std::int64_t ahead) {
  const std::int64_t row_bytes = Unit::bytes(args.num_inputs), group = scale_group<Unit>(args);
  const std::int64_t num_groups = divide_up(args.num_inputs, group), stride = divide_up(num_groups, 4) * 4;
  const std::int64_t num_outputs = std::min(kLinearColumns, args.num_outputs - first_output);
  const auto* const weight = static_cast<const std::byte*>(args.weight) + first_output * row_bytes;
  float scales[kColumns * LoneRow<Math, Unit>::kMostGroups + 3];  // which are read four at a time
  alignas(64) float sums[kLinearColumns * kWidth] = {};
  for (std::int64_t c = 0; c < num_outputs; c += kColumns) {
    Part part{weight + c * row_bytes, row_bytes, num_outputs - c, ahead, args.num_inputs, x.scales, 0, group};
    if (Unit::kIsInt4) {
      take_scales(args, first_output + c, kColumns, 0, num_groups, stride,
                  Math::kHasScales ? x.scales : nullptr, scales);
      part.scales = scales;
      part.scales_stride = stride;
    }
    add_tile<kWidth, Math, Unit, 1, kColumns, true>(part, x.elements, x.heads, sums + c * kWidth);
  }
  at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    store_rows<kWidth, Unit::kIsInt4, dtype>(args, row, 1, first_output, sums);
  });
}

// One by one, outputs are read in memory order, without prefetches: along a long sequence of addresses a core fetches
// ahead by itself. A row that the first-level cache cannot hold is read again for each, though: several outputs share
// it. So do they for bytes where a core reads one vector a cycle, since it reads more of the row than of the weight.
// Along several sequences it fetches too little ahead: what comes next is prefetched.
template <int kWidth, typename Math, typename Unit>
TRIMSERVE_INLINE void multiply_row(const LinearArgs& args, const LoneRow<Math, Unit>& x, std::int64_t row,
                                   std::int64_t first_output) {
  const bool is_in_order = !Math::kIsBytes || reads_two_vectors();
  if (is_in_order && PackedRow<Math, Unit>(args).num_bytes <= kRowBytes)
    return multiply_row<kWidth, Math, Unit, 1>(args, x, row, first_output, 0);
  constexpr int kColumns = kWidth == 16 && !Math::kIsBytes ? 8 : 4;
  const std::int64_t bytes = std::max<std::int64_t>(kColumns * Unit::bytes(args.num_inputs), 1);
  multiply_row<kWidth, Math, Unit, kColumns>(args, x, row, first_output,
                                             divide_up(kBytesAhead, bytes) * bytes);
}

// Calls body with the width, how rows are multiplied and what units of weights are.
template <typename Body>
void at_units(const LinearArgs& args, const Body& body) {
#ifdef __x86_64__
  if (args.format == WeightFormat::kInt4 && args.dtype == DType::kBFloat16 && has_byte_products()) {
    return with_avx512([&](auto width) TRIMSERVE_INLINE_LAMBDA {
      if (args.group == 64)
        return body(width, std::type_identity<ByteMath>(), std::type_identity<Int4Bytes64>());
      body(width, std::type_identity<ByteMath>(), std::type_identity<Int4Bytes>());
    });
  }
#endif
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    const auto with = [&]<typename Math>(std::type_identity<Math> math) TRIMSERVE_INLINE_LAMBDA {
      if (args.format == WeightFormat::kInt8)
        return body(width, math, std::type_identity<Int8Unit<width, Math>>());
      if (args.group == 32) return body(width, math, std::type_identity<Int4Unit<width, Math, 32>>());
      if (args.group == 64) return body(width, math, std::type_identity<Int4Of<width, Math, 64>>());
      body(width, math, std::type_identity<Int4Of<width, Math, 128>>());
    };
    if (args.dtype == DType::kBFloat16) return with(std::type_identity<WordMath<width>>());
    with(std::type_identity<FloatMath<width>>());
  });
}

}  // namespace

std::int64_t quantized_packed_size(const LinearArgs& args) {
  std::int64_t size = 0;
  at_units(args,
           [&]<typename Math, typename Unit>(auto, std::type_identity<Math>, std::type_identity<Unit>)
               TRIMSERVE_INLINE_LAMBDA { size = args.num_rows * PackedRow<Math, Unit>(args).num_bytes; });
  return size / static_cast<std::int64_t>(sizeof(float));
}

void pack_quantized_rows(const LinearArgs& args, float* packed) {
  at_units(args, [&]<typename Math, typename Unit>(auto, std::type_identity<Math>, std::type_identity<Unit>)
                     TRIMSERVE_INLINE_LAMBDA {
                       auto* const rows = reinterpret_cast<std::byte*>(packed);
                       const std::int64_t num_bytes = PackedRow<Math, Unit>(args).num_bytes;
                       for (std::int64_t row = 0; row < args.num_rows;) {
                         const std::int64_t num_rows = rows_of_tile(args.num_rows - row);
                         for (std::int64_t r = 0; r < num_rows; ++r) {
                           at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
                             pack_row<Math, Unit, dtype>(args, row + r, r, num_rows, rows + row * num_bytes);
                           });
                         }
                         row += num_rows;
                       }
                     });
}

void linear_quantized(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end) {
  at_units(args, [&]<typename Math, typename Unit>(auto width, std::type_identity<Math>,
                                                   std::type_identity<Unit>) TRIMSERVE_INLINE_LAMBDA {
    const auto* const rows = reinterpret_cast<const std::byte*>(packed);
    const std::int64_t num_bytes = PackedRow<Math, Unit>(args).num_bytes;
    for (std::int64_t row = 0; row < args.num_rows; row += kRowsAtOnce) {
      const std::int64_t num_rows = std::min(kRowsAtOnce, args.num_rows - row);
      // To read a row of floats takes longer than to read int4 weights: a tile's outputs share it.
      const bool is_alone =
          num_rows == 1 && (Math::kHasScales || !Unit::kIsInt4) &&
          divide_up(args.num_inputs, scale_group<Unit>(args)) <= LoneRow<Math, Unit>::kMostGroups;
      const std::byte* const first = rows + row * num_bytes;
      if (is_alone) {
        const LoneRow<Math, Unit> x(args, first);
        for (std::int64_t block = begin; block < end; ++block)
          multiply_row<width, Math, Unit>(args, x, row, block * kLinearColumns);
      } else {
        for (std::int64_t block = begin; block < end; ++block)
          multiply_block<width, Math, Unit>(args, first, row, num_rows, block * kLinearColumns);
      }
    }
  });
}

}  // namespace trimserve::cpu
