// linear for many rows, which is bound by the products and not by reading the weight.
//   Blocking as in GotoBLAS: a part of all rows, so many inputs long, stays in the second-level cache while panels of
//   the weight pass it (linear_panels.h), each in the first-level cache for all rows; sums of the parts so far lie in
//   memory. An output does not depend on the other rows, to the last bit.

#include <algorithm>
#include <cstring>
#include <memory>

#include "linear_panels.h"
#include "linear_quantized.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kFewestRows = 16;
constexpr std::int64_t kFewestFloatRows = 49;  // of a weight of floats: linear.cpp takes fewer
constexpr std::int64_t kPanelsAtOnce = 8;

std::int64_t divide_up(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }

// Packed rows: for each part of K, tiles of kRows rows whose entries lie together; what is missing of an entry is 0.
template <typename Products>
std::int64_t entries_of(std::int64_t num_inputs) {
  return divide_up(num_inputs, Products::kInputs);
}

template <typename Products>
std::int64_t packed_rows(const LinearArgs& args) {
  return divide_up(args.num_rows, Products::kRows) * Products::kRows;
}

template <typename Products>
constexpr std::int64_t kPartInputs = kPartEntries * Products::kInputs;

// What stands for missing rows of the last tile is not stored.
template <typename Products, DType dtype>
TRIMSERVE_INLINE void pack_tile(const LinearArgs& args, std::int64_t first_row, std::int64_t first_input,
                                std::int64_t num_inputs, typename Products::Entry* packed) {
  constexpr int kRows = Products::kRows, kInputs = Products::kInputs;
  using Stored = Element<dtype>;
  const Stored* rows[kRows];
  for (std::int64_t r = 0; r < kRows; ++r)
    rows[r] = static_cast<const Stored*>(args.x) +
              std::min(first_row + r, args.num_rows - 1) * args.x_stride + first_input;
  std::int64_t k = 0;
  if constexpr (kInputs * sizeof(Stored) == sizeof(typename Products::Entry)) {  // entries are what is stored
    constexpr std::int64_t kBlock = kRows * kInputs;
    for (; k + kBlock <= num_inputs; k += kBlock) {
      typename Simd<kRows>::Bits block[kRows];
      for (int r = 0; r < kRows; ++r) std::memcpy(&block[r], rows[r] + k, sizeof block[r]);
      transpose<kRows>(block);
      std::memcpy(packed + k / kInputs * kRows, block, sizeof block);
    }
  }
  for (; k < num_inputs; k += kInputs) {
    for (int r = 0; r < kRows; ++r)
      packed[k / kInputs * kRows + r] = Products::template entry<dtype>(rows[r] + k, num_inputs - k);
  }
}

template <typename Products, DType dtype>
TRIMSERVE_INLINE void pack_all(const LinearArgs& args, typename Products::Entry* packed) {
  for (std::int64_t k = 0; k < args.num_inputs; k += kPartInputs<Products>) {
    const std::int64_t num_inputs = std::min(kPartInputs<Products>, args.num_inputs - k);
    for (std::int64_t row = 0; row < args.num_rows; row += Products::kRows) {
      pack_tile<Products, dtype>(args, row, k, num_inputs, packed);
      packed += Products::kRows * entries_of<Products>(num_inputs);
    }
  }
}

// Fetches a share of a part's weights: what is for row `begin` to row `end` of all rows.
template <int kWidth, WeightFormat format>
TRIMSERVE_INLINE void prefetch(const LinearArgs& args, const PanelPart& part, std::int64_t begin,
                               std::int64_t end) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t num_bytes = stored_bytes<format>(args, part.num_inputs);
  const std::int64_t last = part.num_outputs * std::min(end, args.num_rows) / args.num_rows;
  for (std::int64_t output = part.num_outputs * begin / args.num_rows; output < last; ++output) {
    const std::byte* const stored = stored_at<format>(args, part.first_output + output, part.first_input);
    for (std::int64_t byte = 0; byte < num_bytes; byte += kLine) __builtin_prefetch(stored + byte);
  }
}

// totals [kRows, kPanelVectors] += the products of a tile of rows and a panel, by groups of so many entries.
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void add_tile(const typename Products::Entry* x, const typename Products::Register* panel,
                               std::int64_t num_entries, std::int64_t group_entries,
                               const typename Simd<kWidth>::Floats* scales,
                               typename Simd<kWidth>::Floats* totals) {
  constexpr int kRows = Products::kRows;
  for (std::int64_t begin = 0; begin < num_entries; begin += group_entries, scales += kPanelVectors) {
    const std::int64_t end = std::min(begin + group_entries, num_entries);
    typename Simd<kWidth>::Floats sums[kRows][kPanelVectors];
    unrolled<kRows * kPanelVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      sums[i / kPanelVectors][i % kPanelVectors] = typename Simd<kWidth>::Floats{};
    });
    for (std::int64_t entry = begin; entry < end; ++entry) {
      typename Products::Register w[kPanelVectors];
      unrolled<kPanelVectors>([&](auto v)
                                  TRIMSERVE_INLINE_LAMBDA { w[v] = panel[entry * kPanelVectors + v]; });
      unrolled<kRows>([&](auto r)
                          TRIMSERVE_INLINE_LAMBDA { Products::add(sums[r], w, x[entry * kRows + r]); });
    }
    unrolled<kRows * kPanelVectors>([&](auto i) TRIMSERVE_INLINE_LAMBDA {
      const auto& sum = sums[i / kPanelVectors][i % kPanelVectors];
      if constexpr (format == WeightFormat::kFloats) {
        totals[i] += sum;
      } else {
        totals[i] += sum * scales[i % kPanelVectors];
      }
    });
  }
}

// All rows and a panel, whose weights are taken from memory first; those of `next` are fetched meanwhile.
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void add_panel(const LinearArgs& args, const typename Products::Entry* packed,
                                const PanelPart& part, const PanelPart& next,
                                typename Simd<kWidth>::Floats* totals) {
  constexpr int kRows = Products::kRows;
  typename Products::Register panel[kPartEntries * kPanelVectors];
  typename Simd<kWidth>::Floats scales[kMostGroups * kPanelVectors];
  fill_panel<kWidth, Products, format>(args, part, panel);
  if constexpr (format != WeightFormat::kFloats)
    take_scales<kWidth, format>(args, part, reinterpret_cast<float*>(scales));
  const std::int64_t num_entries = entries_of<Products>(part.num_inputs);
  const std::int64_t group_inputs = format == WeightFormat::kInt4 ? args.group : kPartInputs<Products>;
  packed += entries_of<Products>(part.first_input) * packed_rows<Products>(args);
  for (std::int64_t row = 0; row < args.num_rows; row += kRows) {
    prefetch<kWidth, format>(args, next, row, row + kRows);
    add_tile<kWidth, Products, format>(packed + row * num_entries, panel, num_entries,
                                       group_inputs / Products::kInputs, scales,
                                       totals + row * kPanelVectors);
  }
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void store_rows(const LinearArgs& args, const PanelPart& part,
                                 const typename Simd<kWidth>::Floats* totals) {
  constexpr std::int64_t kOutputs = kPanelVectors * kWidth;
  for (std::int64_t row = 0; row < args.num_rows; ++row) {
    auto* const output =
        static_cast<Element<dtype>*>(args.output) + row * args.num_outputs + part.first_output;
    float products[kOutputs];
    std::memcpy(products, totals + row * kPanelVectors, sizeof products);
    for (float& product : products) product *= args.gate;
    if (part.num_outputs == kOutputs) {
      store<dtype>(products, std::integral_constant<std::int64_t, kOutputs>(), args.accumulates, output);
    } else {
      store<dtype>(products, part.num_outputs, args.accumulates, output);
    }
  }
}

// Outputs from `begin` to `end`, at most kPanelsAtOnce panels. totals: for each panel [rows, kPanelVectors].
template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void multiply_panels(const LinearArgs& args, const typename Products::Entry* packed,
                                      std::int64_t begin, std::int64_t end,
                                      typename Simd<kWidth>::Floats* totals) {
  constexpr std::int64_t kOutputs = kPanelVectors * kWidth;
  const std::int64_t num_panels = divide_up(end - begin, kOutputs),
                     size = packed_rows<Products>(args) * kPanelVectors;
  const std::int64_t num_parts = divide_up(args.num_inputs, kPartInputs<Products>);
  // All panels of the first part, then of the second and so on.
  const auto part_at = [&](std::int64_t place) TRIMSERVE_INLINE_LAMBDA {
    const std::int64_t output = begin + place % num_panels * kOutputs,
                       input = place / num_panels * kPartInputs<Products>;
    return PanelPart{output, std::min(kOutputs, end - output), input,
                     std::min(kPartInputs<Products>, args.num_inputs - input)};
  };
  std::fill_n(totals, num_panels * size, typename Simd<kWidth>::Floats{});
  for (std::int64_t place = 0; place < num_parts * num_panels; ++place) {
    const PanelPart next = place + 1 < num_parts * num_panels ? part_at(place + 1) : PanelPart{};
    add_panel<kWidth, Products, format>(args, packed, part_at(place), next,
                                        totals + place % num_panels * size);
  }
  for (std::int64_t panel = 0; panel < num_panels; ++panel) {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      store_rows<kWidth, dtype>(args, part_at(panel), totals + panel * size);
    });
  }
}

template <int kWidth, typename Products, WeightFormat format>
TRIMSERVE_INLINE void multiply_many(const LinearArgs& args, const float* packed, std::int64_t begin,
                                    std::int64_t end) {
  constexpr std::int64_t kOutputs = kPanelsAtOnce * kPanelVectors * kWidth;
  const auto* const rows = reinterpret_cast<const typename Products::Entry*>(packed);
  const std::int64_t end_output = std::min(end * kLinearColumns, args.num_outputs);
  std::int64_t output = begin * kLinearColumns;
  const std::int64_t num_totals = std::min(kOutputs, end_output - output) + kPanelVectors * kWidth;
  const std::unique_ptr<typename Simd<kWidth>::Floats[]> totals(
      new typename Simd<kWidth>::Floats[packed_rows<Products>(args) * num_totals / kWidth]);
  for (; output < end_output; output += kOutputs)
    multiply_panels<kWidth, Products, format>(args, rows, output, std::min(output + kOutputs, end_output),
                                              totals.get());
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
  const std::int64_t fewest = args.format == WeightFormat::kFloats ? kFewestFloatRows : kFewestRows;
  return args.num_rows >= fewest && (args.dtype != DType::kBFloat16 || has_pair_products());
}

std::int64_t many_packed_size(const LinearArgs& args) {
  std::int64_t size = 0;
  at_products(args, [&]<typename Products>(auto, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    size = packed_rows<Products>(args) * entries_of<Products>(args.num_inputs);
  });
  return size;
}

void pack_many_rows(const LinearArgs& args, float* packed) {
  at_products(args, [&]<typename Products>(auto, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      pack_all<Products, dtype>(args, reinterpret_cast<typename Products::Entry*>(packed));
    });
  });
}

void linear_many(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end) {
  at_products(args, [&]<typename Products>(auto width, std::type_identity<Products>) TRIMSERVE_INLINE_LAMBDA {
    if (args.format == WeightFormat::kInt8)
      return multiply_many<width, Products, WeightFormat::kInt8>(args, packed, begin, end);
    if (args.format == WeightFormat::kInt4)
      return multiply_many<width, Products, WeightFormat::kInt4>(args, packed, begin, end);
    multiply_many<width, Products, WeightFormat::kFloats>(args, packed, begin, end);
  });
}

}  // namespace trimserve::cpu
