// linear with int8 or int4 weights, for many rows: what bounds it is the products, not reading the weight.
//   A panel of outputs, a part of K long, becomes floats in the first- or second-level cache, where a lane is an
//   output, and all rows pass it. Its numbers are the stored integers, which bfloat16 holds too; scales multiply the
//   sums of a group. An output does not depend on the other rows, to the last bit.

#include <algorithm>
#include <cstring>

#include "linear_quantized.h"
#include "linear_tiles.h"
#include "quantized_units.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kFewestRows = 16;
constexpr std::int64_t kVectors = 2;       // of outputs in a panel
constexpr std::int64_t kPartInputs = 512;  // of a panel
constexpr std::int64_t kMostGroups = kPartInputs / kUnit;
static_assert(kPartInputs % kLongestGroup == 0 && kLinearRows % 8 == 0);

std::int64_t divide_up(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }

// Float32 products of one input and its weights.
template <int kWidth>
struct FloatProducts {
  using Entry = float;  // of a row, which a register of weights is multiplied with
  using Register = typename Simd<kWidth>::Floats;
  static constexpr int kInputs = 1;  // of an entry
  static constexpr int kRows = kWidth == 16 ? 8 : 4;

  // Entries kChunk * kWidth, ... of a unit.
  template <int kChunk>
  TRIMSERVE_INLINE static void take(Register& w, const std::int8_t* unit) {
    Int8Unit<kWidth, FloatMath<kWidth>>::template take<kChunk>(w, unit);
  }
  TRIMSERVE_INLINE static void add(Register (&sums)[kVectors], const Register (&w)[kVectors],
                                   const Entry& x) {
    for (int v = 0; v < kVectors; ++v) sums[v] += w[v] * x;
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
  TRIMSERVE_INLINE static void add(Floats (&sums)[kVectors], const Register (&w)[kVectors], const Entry& x) {
    const Register pair = Register{} + x;
    for (int v = 0; v < kVectors; ++v) add_pairs(sums[v], w[v], pair);
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

// Packed rows: tiles of kRows, whose entries lie together; what is missing of the last row's tile or unit is 0.
template <typename Products>
std::int64_t entries_of_row(const LinearArgs& args) {
  return divide_up(args.num_inputs, kUnit) * (kUnit / Products::kInputs);
}

template <typename Products, DType dtype>
TRIMSERVE_INLINE void pack_tile(const LinearArgs& args, std::int64_t first_row,
                                typename Products::Entry* packed) {
  constexpr int kRows = Products::kRows;
  std::fill_n(packed, kRows * entries_of_row<Products>(args), typename Products::Entry{});
  const std::int64_t num_rows = std::min<std::int64_t>(kRows, args.num_rows - first_row);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const auto* const x = static_cast<const Element<dtype>*>(args.x) + (first_row + r) * args.x_stride;
    for (std::int64_t k = 0; k < args.num_inputs; k += Products::kInputs)
      packed[k / Products::kInputs * kRows + r] = Products::template entry<dtype>(x + k, args.num_inputs - k);
  }
}

// Of a panel: kVectors * kWidth outputs, some inputs.
struct Part {
  std::int64_t first_output;
  std::int64_t num_outputs;  // what is behind them is not read
  std::int64_t first_input;
  std::int64_t num_inputs;
};

template <WeightFormat format>
constexpr std::int64_t kUnitBytes = format == WeightFormat::kInt4 ? kInt4UnitBytes : kUnit;

// Where the weights of an output begin that belong to a part.
template <WeightFormat format>
TRIMSERVE_INLINE const std::byte* stored_at(const LinearArgs& args, std::int64_t output, std::int64_t k) {
  const std::int64_t row_bytes =
      format == WeightFormat::kInt4 ? divide_up(args.num_inputs, kUnit) * kInt4UnitBytes : args.num_inputs;
  return static_cast<const std::byte*>(args.weight) + output * row_bytes + k / kUnit * kUnitBytes<format>;
}

// The integers of a unit of which so many inputs are left; what is missing is 0.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void read_unit(const std::byte* stored, std::int64_t num_left, std::int8_t* unit) {
  if constexpr (format == WeightFormat::kInt8) {
    if (num_left >= kUnit) {
      std::memcpy(unit, stored, kUnit);
    } else {
      std::memset(unit, 0, kUnit);
      std::memcpy(unit, stored, num_left);
    }
  } else {
    typedef std::int8_t Bytes __attribute__((vector_size(kUnit)));
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

// Fetches a share of the part that comes after this one: what is for row `begin` to row `end` of all rows.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void prefetch_next(const LinearArgs& args, const Part& part, std::int64_t begin,
                                    std::int64_t end) {
  constexpr std::int64_t kLine = 64, kOutputs = kVectors * kWidth;
  const std::int64_t next_input = part.first_input + kPartInputs;
  const bool is_last = next_input >= args.num_inputs;
  const std::int64_t first_output = part.first_output + (is_last ? kOutputs : 0);
  const std::int64_t first_input = is_last ? 0 : next_input;
  const std::int64_t num_bytes =
      std::min(kPartInputs, args.num_inputs - first_input) / kUnit * kUnitBytes<format>;
  const std::int64_t end_output =
      std::min(first_output + kOutputs * std::min(end, args.num_rows) / args.num_rows, args.num_outputs);
  for (std::int64_t output = first_output + kOutputs * begin / args.num_rows; output < end_output; ++output) {
    const std::byte* const stored = stored_at<format>(args, output, first_input);
    for (std::int64_t byte = 0; byte < num_bytes; byte += kLine) __builtin_prefetch(stored + byte);
  }
}

// panel [entries, kVectors * kWidth]
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void fill_panel(const LinearArgs& args, const Part& part,
                                 typename Products::Register* panel) {
  constexpr int kEntries = kUnit / Products::kInputs, kChunks = kEntries / kWidth;
  for (std::int64_t v = 0; v < kVectors; ++v) {
    const std::byte* stored[kWidth];
    for (std::int64_t lane = 0; lane < kWidth; ++lane) {
      const std::int64_t output = part.first_output + std::min(v * kWidth + lane, part.num_outputs - 1);
      stored[lane] = stored_at<format>(args, output, part.first_input);
    }
    for (std::int64_t k = 0; k < part.num_inputs; k += kUnit) {
      std::int8_t units[kWidth][kUnit];
      for (std::int64_t lane = 0; lane < kWidth; ++lane)
        read_unit<kWidth, format>(stored[lane] + k / kUnit * kUnitBytes<format>, part.num_inputs - k,
                                  units[lane]);
      unrolled<kChunks>([&](auto chunk) TRIMSERVE_INLINE_LAMBDA {
        typename Products::Register rows[kWidth];
        unrolled<kWidth>([&](auto i)
                             TRIMSERVE_INLINE_LAMBDA { Products::template take<chunk>(rows[i], units[i]); });
        transpose<kWidth>(rows);
        const std::int64_t entry = k / Products::kInputs + chunk * kWidth;
        for (int i = 0; i < kWidth; ++i) panel[(entry + i) * kVectors + v] = rows[i];
      });
    }
  }
}

// The scales of a part's groups as floats, [groups, kVectors * kWidth]. Of int8 the part is one group.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void take_scales(const LinearArgs& args, const Part& part, float* scales) {
  const bool is_int4 = format == WeightFormat::kInt4;
  const std::int64_t row_size = is_int4 ? divide_up(args.num_inputs, args.group) : 1;
  const std::int64_t first = is_int4 ? part.first_input / args.group : 0;
  const std::int64_t num_groups = is_int4 ? divide_up(part.num_inputs, args.group) : 1;
  at_dtype(args.scale_dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
    for (std::int64_t c = 0; c < kVectors * kWidth; ++c) {
      const std::int64_t output = part.first_output + std::min(c, part.num_outputs - 1);
      const auto* const stored = static_cast<const Element<dtype>*>(args.scales) + output * row_size + first;
      for (std::int64_t g = 0; g < num_groups; ++g) scales[g * kVectors * kWidth + c] = stored[g].to_float();
    }
  });
}

// totals [kRows, kVectors] += the products of a tile of rows and a part, by groups of so many entries.
template <int kWidth, typename Products>
TRIMSERVE_INLINE void add_tile(const typename Products::Entry* x, const typename Products::Register* panel,
                               std::int64_t num_entries, std::int64_t group_entries,
                               const typename Simd<kWidth>::Floats* scales,
                               typename Simd<kWidth>::Floats* totals) {
  constexpr int kRows = Products::kRows;
  for (std::int64_t begin = 0; begin < num_entries; begin += group_entries, scales += kVectors) {
    const std::int64_t end = std::min(begin + group_entries, num_entries);
    typename Simd<kWidth>::Floats sums[kRows][kVectors];
    unrolled<kRows * kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      sums[i / kVectors][i % kVectors] = typename Simd<kWidth>::Floats{};
    });
    for (std::int64_t entry = begin; entry < end; ++entry) {
      typename Products::Register w[kVectors];
      unrolled<kVectors>([&](auto v) TRIMSERVE_INLINE_LAMBDA { w[v] = panel[entry * kVectors + v]; });
      unrolled<kRows>([&](auto r)
                          TRIMSERVE_INLINE_LAMBDA { Products::add(sums[r], w, x[entry * kRows + r]); });
    }
    unrolled<kRows * kVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      totals[i] += sums[i / kVectors][i % kVectors] * scales[i % kVectors];
    });
  }
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void store_rows(const LinearArgs& args, const Part& part,
                                 const typename Simd<kWidth>::Floats* totals) {
  for (std::int64_t row = 0; row < args.num_rows; ++row) {
    auto* const output = static_cast<Element<dtype>*>(args.output) + row * args.num_outputs;
    float products[kVectors * kWidth];
    std::memcpy(products, totals + row * kVectors, sizeof products);
    for (float& product : products) product *= args.gate;
    store<dtype>(products, part.num_outputs, args.accumulates, output + part.first_output);
  }
}

// All rows, and the outputs of a part that is moved along K.
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void multiply_panel(const LinearArgs& args, const typename Products::Entry* packed,
                                     Part part) {
  using Floats = typename Simd<kWidth>::Floats;
  constexpr int kRows = Products::kRows, kInputs = Products::kInputs;
  typename Products::Register panel[kPartInputs / kInputs * kVectors];
  Floats scales[kMostGroups * kVectors], totals[kLinearRows * kVectors];
  std::fill_n(totals, divide_up(args.num_rows, kRows) * kRows * kVectors, Floats{});
  const std::int64_t group_inputs = format == WeightFormat::kInt4 ? args.group : kPartInputs;
  for (std::int64_t k = 0; k < args.num_inputs; k += kPartInputs) {
    part.first_input = k;
    part.num_inputs = std::min(kPartInputs, args.num_inputs - k);
    fill_panel<kWidth, Products, format>(args, part, panel);
    take_scales<kWidth, format>(args, part, reinterpret_cast<float*>(scales));
    const std::int64_t num_entries = divide_up(part.num_inputs, kUnit) * (kUnit / kInputs);
    for (std::int64_t row = 0; row < args.num_rows; row += kRows) {
      prefetch_next<kWidth, format>(args, part, row, row + kRows);
      add_tile<kWidth, Products>(packed + row * entries_of_row<Products>(args) + k / kInputs * kRows, panel,
                                 num_entries, group_inputs / kInputs, scales, totals + row * kVectors);
    }
  }
  at_dtype(args.dtype,
           [&](auto dtype) TRIMSERVE_INLINE_LAMBDA { store_rows<kWidth, dtype>(args, part, totals); });
}

template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void multiply_many(const LinearArgs& args, const float* packed, std::int64_t begin,
                                    std::int64_t end) {
  constexpr std::int64_t kOutputs = kVectors * kWidth;
  const auto* const rows = reinterpret_cast<const typename Products::Entry*>(packed);
  const std::int64_t end_output = std::min(end * kLinearColumns, args.num_outputs);
  for (std::int64_t output = begin * kLinearColumns; output < end_output; output += kOutputs)
    multiply_panel<kWidth, Products, format>(args, rows,
                                             {output, std::min(kOutputs, end_output - output), 0, 0});
}

// Calls body with the width and the kind of products.
template <typename Body>
void at_products(const LinearArgs& args, const Body& body) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
#ifdef __x86_64__
    if constexpr (width == 16) {
      if (args.dtype == DType::kBFloat16) return body(width, std::type_identity<PairProducts>());
    }
#endif
    body(width, std::type_identity<FloatProducts<width>>());
  });
}

}  // namespace

bool has_many_rows(const LinearArgs& args) {
  return args.num_rows >= kFewestRows && (args.dtype != DType::kBFloat16 || has_pair_products());
}

std::int64_t many_packed_size(const LinearArgs& args) {
  std::int64_t size = 0;
  at_products(args, [&]<typename Products>(auto, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    size = divide_up(args.num_rows, Products::kRows) * Products::kRows * entries_of_row<Products>(args);
  });
  return size;
}

void pack_many_rows(const LinearArgs& args, float* packed) {
  at_products(args, [&]<typename Products>(auto, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    auto* const entries = reinterpret_cast<typename Products::Entry*>(packed);
    for (std::int64_t row = 0; row < args.num_rows; row += Products::kRows) {
      at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
        pack_tile<Products, dtype>(args, row, entries + row * entries_of_row<Products>(args));
      });
    }
  });
}

void linear_many(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end) {
  at_products(args, [&]<typename Products>(auto width, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    if (args.format == WeightFormat::kInt8)
      return multiply_many<width, Products, WeightFormat::kInt8>(args, packed, begin, end);
    multiply_many<width, Products, WeightFormat::kInt4>(args, packed, begin, end);
  });
}

}  // namespace trimserve::cpu
