// Panels of linear_many.cpp: kVectors * kWidth outputs of a weight, a part of K long, as they are multiplied: where a
// lane is an output. Quantized weights are the stored integers, which bfloat16 holds too; scales multiply the sums of a
// group.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "linear_tiles.h"
#include "quantized_units.h"

namespace trimserve::cpu {

constexpr std::int64_t kPanelVectors = 2;        // of outputs in a panel
constexpr std::int64_t kPartEntries = 256;       // of a panel, which then stays in the first-level cache
constexpr std::int64_t kReadInputs = kInt4Unit;  // of an output that are read at once, in every format
constexpr std::int64_t kMostGroups = 2 * kPartEntries / kInt4Unit;
static_assert(kPartEntries % kMostAdded == 0);

// Float32 products of one input and its weights.
template <int kWidth>
struct FloatProducts {
  using Entry = float;  // of a row, which a register of weights is multiplied with
  using Register = typename Simd<kWidth>::Floats;
  static constexpr int kInputs = 1;  // of an entry
  static constexpr int kRows = kWidth == 16 ? 8 : 4;
  template <DType dtype>
  using Operands = FloatOperands<kWidth, dtype>;

  // Entries kChunk * kWidth, ... of a unit.
  template <int kChunk>
  TRIMSERVE_INLINE static void take(Register& w, const std::int8_t* unit) {
    Int8Unit<kWidth, FloatMath<kWidth>>::template take<kChunk>(w, unit);
  }
  TRIMSERVE_INLINE static void add(Register (&sums)[kPanelVectors], const Register (&w)[kPanelVectors],
                                   const Entry& x) {
    for (int v = 0; v < kPanelVectors; ++v) sums[v] += w[v] * x;
  }
  template <DType dtype>
  TRIMSERVE_INLINE static Entry entry(const Element<dtype>* x, std::int64_t) {
    return x->to_float();
  }
};

#ifdef __x86_64__
// Products of pairs of bfloat16, where has_pair_products().
struct PairProducts {
  using Entry = std::uint32_t;
  using Register = Simd<16>::Bits;
  using Floats = Simd<16>::Floats;
  static constexpr int kInputs = 2;
  static constexpr int kRows = 8;
  template <DType>
  using Operands = PairOperands;

  template <int kChunk>
  TRIMSERVE_INLINE static void take(Register& w, const std::int8_t* unit) {
    Register words;
    Int8Unit<16, WordMath<16>>::take<kChunk>(words, unit);
    Simd<16>::Ints pairs;
    std::memcpy(&pairs, &words, sizeof pairs);
    const Floats even = __builtin_convertvector(pairs << 16 >> 16, Floats);
    const Floats odd = __builtin_convertvector(pairs >> 16, Floats);
    Register low, high;
    std::memcpy(&low, &even, sizeof low);
    std::memcpy(&high, &odd, sizeof high);
    w = low >> 16 | high;  // the lower halves of such small integers are 0
  }
  TRIMSERVE_INLINE static void add(Floats (&sums)[kPanelVectors], const Register (&w)[kPanelVectors],
                                   const Entry& x) {
    const Register pair = Register{} + x;
    for (int v = 0; v < kPanelVectors; ++v) add_pairs(sums[v], w[v], pair);
  }
  template <DType dtype>
  TRIMSERVE_INLINE static Entry entry(const Element<dtype>* x, std::int64_t num_left) {
    const auto bits = [](const Element<dtype>& value) TRIMSERVE_INLINE_LAMBDA {
      return Entry{Element<DType::kBFloat16>::from_float(value.to_float()).bits};
    };
    return bits(x[0]) | (num_left > 1 ? bits(x[1]) << 16 : 0);
  }
};
#endif

// Which outputs and inputs of the weight are in a panel.
struct PanelPart {
  std::int64_t first_output;
  std::int64_t num_outputs;  // what is behind them is not read
  std::int64_t first_input;
  std::int64_t num_inputs;
};

// Of so many inputs of one output, whole units unless they are its last ones.
template <WeightFormat format>
TRIMSERVE_INLINE std::int64_t stored_bytes(const LinearArgs& args, std::int64_t num_inputs) {
  if constexpr (format == WeightFormat::kInt4)
    return (num_inputs + kInt4Unit - 1) / kInt4Unit * kInt4UnitBytes;
  if constexpr (format == WeightFormat::kInt8) return num_inputs;
  return num_inputs * (args.dtype == DType::kFloat32 ? 4 : 2);
}

// Where the weights of an output begin that belong to a part.
template <WeightFormat format>
TRIMSERVE_INLINE const std::byte* stored_at(const LinearArgs& args, std::int64_t output, std::int64_t k) {
  const std::int64_t row_bytes = stored_bytes<format>(args, args.num_inputs);
  return static_cast<const std::byte*>(args.weight) + output * row_bytes + stored_bytes<format>(args, k);
}

// The integers of a unit of which so many inputs are left; what is missing is 0.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void read_unit(const std::byte* stored, std::int64_t num_left, std::int8_t* unit) {
  if constexpr (format == WeightFormat::kInt8) {
    if (num_left >= kReadInputs) {
      std::memcpy(unit, stored, kReadInputs);
    } else {
      std::memset(unit, 0, kReadInputs);
      std::memcpy(unit, stored, num_left);
    }
  } else {
    typedef std::int8_t Bytes __attribute__((vector_size(kReadInputs)));
    Simd<8>::Bits halves;  // in one vector, so that one store has what is loaded next
    if constexpr (kWidth == 4) {
      Simd<4>::Bits half;
      repeat<4>(half, stored);
      halves = __builtin_shufflevector(half, half, 0, 1, 2, 3, 0, 1, 2, 3);
    } else {
      repeat<8>(halves, stored);
    }
    halves = halves >> Simd<8>::Bits{0, 0, 0, 0, 4, 4, 4, 4} & 0x0f0f0f0fu;
    Bytes bytes;
    std::memcpy(&bytes, &halves, sizeof bytes);
    bytes -= 8;
    std::memcpy(unit, &bytes, sizeof bytes);
  }
}

// panel [entries, kPanelVectors * kWidth], of stored integers.
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void fill_quantized_panel(const LinearArgs& args, const PanelPart& part,
                                           typename Products::Register* panel) {
  constexpr int kEntries = kReadInputs / Products::kInputs, kChunks = kEntries / kWidth;
  for (std::int64_t v = 0; v < kPanelVectors; ++v) {
    const std::byte* stored[kWidth];
    for (std::int64_t lane = 0; lane < kWidth; ++lane) {
      const std::int64_t output = part.first_output + std::min(v * kWidth + lane, part.num_outputs - 1);
      stored[lane] = stored_at<format>(args, output, part.first_input);
    }
    for (std::int64_t k = 0; k < part.num_inputs; k += kReadInputs) {
      std::int8_t units[kWidth][kReadInputs];
      for (std::int64_t lane = 0; lane < kWidth; ++lane)
        read_unit<kWidth, format>(stored[lane] + stored_bytes<format>(args, k), part.num_inputs - k,
                                  units[lane]);
      unrolled<kChunks>([&](auto chunk) TRIMSERVE_INLINE_LAMBDA {
        typename Products::Register rows[kWidth];
        unrolled<kWidth>([&](auto i)
                             TRIMSERVE_INLINE_LAMBDA { Products::template take<chunk>(rows[i], units[i]); });
        transpose<kWidth>(rows);
        const std::int64_t entry = k / Products::kInputs + chunk * kWidth;
        for (int i = 0; i < kWidth; ++i) panel[(entry + i) * kPanelVectors + v] = rows[i];
      });
    }
  }
}

// The same of floats, whose registers are turned as they are.
template <int kWidth, typename Products, DType dtype>
TRIMSERVE_INLINE void fill_float_panel(const LinearArgs& args, const PanelPart& part,
                                       typename Products::Register* panel) {
  using Operands = typename Products::template Operands<dtype>;
  using Register = typename Products::Register;
  constexpr std::int64_t kSize = Operands::kSize;
  constexpr int kRegisters = sizeof(typename Operands::Vector) / sizeof(Register);
  const auto* const weight = static_cast<const typename Operands::Stored*>(args.weight) + part.first_input;
  for (std::int64_t v = 0; v < kPanelVectors; ++v) {
    const typename Operands::Stored* stored[kWidth];
    for (std::int64_t lane = 0; lane < kWidth; ++lane)
      stored[lane] =
          weight + (part.first_output + std::min(v * kWidth + lane, part.num_outputs - 1)) * args.num_inputs;
    const auto turn = [&](std::int64_t k, const auto& load) TRIMSERVE_INLINE_LAMBDA {
      Register rows[kRegisters][kWidth];
      unrolled<kWidth>([&](auto lane) TRIMSERVE_INLINE_LAMBDA {
        typename Operands::Vector vector;
        load(vector, stored[lane] + k);
        unrolled<kRegisters>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
          std::memcpy(&rows[r][lane], reinterpret_cast<const Register*>(&vector) + r, sizeof(Register));
        });
      });
      unrolled<kRegisters>([&](auto r) TRIMSERVE_INLINE_LAMBDA {
        transpose<kWidth>(rows[r]);
        for (int i = 0; i < kWidth; ++i)
          panel[(k / Products::kInputs + r * kWidth + i) * kPanelVectors + v] = rows[r][i];
      });
    };
    const std::int64_t whole = part.num_inputs / kSize * kSize;
    for (std::int64_t k = 0; k < whole; k += kSize)
      turn(k,
           [](auto& vector, const auto* source) TRIMSERVE_INLINE_LAMBDA { Operands::load(vector, source); });
    if (whole < part.num_inputs) {
      turn(whole, [&]<typename Stored>(auto& vector, const Stored* source) TRIMSERVE_INLINE_LAMBDA {
        Stored padded[kSize] = {};
        std::memcpy(padded, source, (part.num_inputs - whole) * sizeof *source);
        Operands::load(vector, padded);
      });
    }
  }
}

template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void fill_panel(const LinearArgs& args, const PanelPart& part,
                                 typename Products::Register* panel) {
  if constexpr (format != WeightFormat::kFloats) {
    fill_quantized_panel<kWidth, Products, format>(args, part, panel);
  } else if constexpr (Products::kInputs == 2) {
    fill_float_panel<kWidth, Products, DType::kBFloat16>(args, part, panel);
  } else if (args.dtype == DType::kFloat32) {
    fill_float_panel<kWidth, Products, DType::kFloat32>(args, part, panel);
  } else {
    fill_float_panel<kWidth, Products, DType::kFloat16>(args, part, panel);
  }
}

// The scales of a part's groups as floats, [groups, kPanelVectors * kWidth]. Of int8 the part is one group.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void take_scales(const LinearArgs& args, const PanelPart& part, float* scales) {
  const bool is_int4 = format == WeightFormat::kInt4;
  const std::int64_t row_size = is_int4 ? (args.num_inputs + args.group - 1) / args.group : 1;
  const std::int64_t first = is_int4 ? part.first_input / args.group : 0;
  const std::int64_t num_groups = is_int4 ? (part.num_inputs + args.group - 1) / args.group : 1;
  at_dtype(args.scale_dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t c = 0; c < kPanelVectors * kWidth; ++c) {
      const std::int64_t output = part.first_output + std::min(c, part.num_outputs - 1);
      const auto* const stored = static_cast<const Element<dtype>*>(args.scales) + output * row_size + first;
      for (std::int64_t g = 0; g < num_groups; ++g)
        scales[g * kPanelVectors * kWidth + c] = stored[g].to_float();
    }
  });
}

}  // namespace trimserve::cpu
