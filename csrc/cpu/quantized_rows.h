// Rows as linear_quantized.cpp multiplies them, packed once for all outputs.

#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "quantized_bytes.h"
#include "quantized_units.h"

namespace trimserve::cpu {

inline std::int64_t divide_up(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }

// Inputs that share a scale of the weights; of int8 all do, as far as a group goes.
template <typename Unit>
std::int64_t scale_group(const LinearArgs& args) {
  return Unit::kIsInt4 ? args.group : Unit::kGroup;
}

// Rows are taken four at a time, then two, then one: a tile.
inline std::int64_t rows_of_tile(std::int64_t num_rows) { return num_rows >= 4 ? 4 : num_rows >= 2 ? 2 : 1; }

// Of a row and a group of its inputs.
template <typename Math>
struct Head {
  typename Math::First first;  // what the group's sum begins with, if weights have an offset
  float scales[kMostScales];   // of the inputs, one for each group of the weights
};

// A packed row has its elements, whole groups of them, and then the heads of these. Rows of a tile are interleaved,
// elements by registers.
template <typename Math, typename Unit>
struct PackedRow {
  std::int64_t element_bytes;
  std::int64_t num_bytes;

  explicit PackedRow(const LinearArgs& args)
      : element_bytes(divide_up(args.num_inputs, Unit::kGroup) * Unit::kGroup *
                      sizeof(typename Math::Element)),
        num_bytes(
            divide_up(element_bytes + divide_up(args.num_inputs, Unit::kGroup) * sizeof(Head<Math>), 64) *
            64) {}
};

// A packed row that is alone.
template <typename Math, typename Unit>
struct LoneRow {
  static constexpr std::int64_t kMostGroups = 512;

  const std::byte* elements;
  const Head<Math>* heads;
  float scales[kMostGroups];  // of its inputs, one for each group of the weights

  LoneRow(const LinearArgs& args, const std::byte* packed)
      : elements(packed),
        heads(reinterpret_cast<const Head<Math>*>(packed + PackedRow<Math, Unit>(args).element_bytes)) {
    const std::int64_t of_head = Unit::kGroup / scale_group<Unit>(args);
    const std::int64_t num_groups = divide_up(args.num_inputs, scale_group<Unit>(args));
    for (std::int64_t g = 0; Math::kHasScales && g < num_groups; g += of_head)
      std::copy_n(heads[g / of_head].scales, std::min(of_head, num_groups - g), scales + g);
  }
};

// The power of two that makes 16 bits of a group's inputs, less than 32640; NaN if one of them is not finite, 0 if all
// are.
TRIMSERVE_INLINE float scale_of(const float* values, std::int64_t count) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i)
    largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & ~(1u << 31));
  if (largest >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  constexpr std::uint32_t kLastBit = 1u << 16;  // what makes 255 of 8 bits the next power of two
  const std::uint32_t exponent =
      std::max((largest + kLastBit) >> 23, 32u);  // smaller inputs than 2^-96 lose their last bits
  return largest ? std::bit_cast<float>((exponent - 14) << 23) : 0.0f;
}

// Bfloat16 inputs over their scale, to the nearest integer; 0 where the scale says that they are none, or all are 0.
TRIMSERVE_INLINE void round_to_words(const float* values, std::int64_t count, float scale,
                                     std::int16_t* words) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float factor = scale > 0 ? 1.0f / scale : 0.0f;
  for (std::int64_t i = 0; i < count; ++i)
    words[i] = static_cast<std::int16_t>(std::bit_cast<std::uint32_t>(values[i] * factor + kRound));
  if (!(scale > 0)) std::fill_n(words, count, std::int16_t{0});
}

// Inputs of a row that make a group of the unit, in which each `group` of them has a scale. elements: of its first
// register, `stride` registers apart.
template <typename Math, typename Unit>
TRIMSERVE_INLINE void pack_group(const float* values, std::int64_t stride, std::int64_t group,
                                 std::byte* elements, Head<Math>& head) {
  using Element = typename Math::Element;
  Element rounded[Unit::kGroup];
  head = Head<Math>{};
  if constexpr (Math::kHasScales) {
    for (std::int64_t k = 0; k < Unit::kGroup; k += group) {
      const float scale = scale_of(values + k, group);
      round_to_words(values + k, group, scale, rounded + k);
      head.scales[k / group] = scale;
    }
  } else {
    std::copy_n(values, Unit::kGroup, rounded);
  }
  for (std::int64_t unit = 0; unit < Unit::kGroup / Unit::kInputs; ++unit) {
    unrolled<Unit::kInputs / Math::kInputs>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
      Element vector[Math::kInputs];
      unrolled<Math::kInputs>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
        vector[i] = rounded[unit * Unit::kInputs + Unit::input(r, i)];
      });
      Math::template count<Unit::kOffset>(head.first, vector);
      for (Element& each : vector) each *= static_cast<Element>(Unit::factor(r));
      Math::pack(elements, vector);
      elements += stride * sizeof vector;
    });
  }
}

// Row r of a tile of num_rows.
template <typename Math, typename Unit, DType dtype>
TRIMSERVE_INLINE void pack_row(const LinearArgs& args, std::int64_t row, std::int64_t r,
                               std::int64_t num_rows, std::byte* tile) {
  const auto* const x = static_cast<const Element<dtype>*>(args.x) + row * args.x_stride;
  std::byte* elements = tile + r * sizeof(typename Math::Inputs);
  auto* head = reinterpret_cast<Head<Math>*>(tile + num_rows * PackedRow<Math, Unit>(args).element_bytes) + r;
  for (std::int64_t k = 0; k < args.num_inputs; k += Unit::kGroup, head += num_rows) {
    float values[Unit::kGroup] = {};
    const std::int64_t count = std::min(Unit::kGroup, args.num_inputs - k);
    for (std::int64_t i = 0; i < count; ++i) values[i] = x[k + i].to_float();
    pack_group<Math, Unit>(values, num_rows, scale_group<Unit>(args), elements, *head);
    elements += num_rows * Unit::kGroup * sizeof(typename Math::Element);
  }
}

}  // namespace trimserve::cpu
