// decode_layers: one new row of each sequence through all layers of the decoder, in one call.
//
// It is the ops of layers.cpp and paging.cpp in the order of trimserve/model/decoder_layers.py, which says the same op
// by op. One call matters where an op takes microseconds: Python would need as long between two of them, and every
// op that Python calls lets another of its threads in.

#include <algorithm>
#include <cmath>

#include "op_checks.h"
#include "ops.h"

namespace trimserve {
namespace {

namespace ts = torch::stable;

constexpr const char* kOp = "decode_layers";
constexpr std::size_t kWeightsOfSelf = 6, kWeightsOfCross = 7, kLinears = 4;

// Of the linear layers of one layer; null: their weights are floats.
struct Scales {
  const Tensor* of_layer;

  std::optional<Tensor> operator[](int linear) const {
    return of_layer ? std::optional(of_layer[linear]) : std::nullopt;
  }
};

// Pages of one group of layers, for a batch.
struct Paged {
  const Tensor& pages;
  const Tensor& tables;   // [B, max_pages]
  const Tensor& lengths;  // [B]

  Tensor attend(const Tensor& q, std::int64_t layer, const std::optional<Tensor>& bias) const {
    const Tensor attended = paged_attention(q, pages, layer % pages.size(1), tables, lengths,
                                            1.0 / std::sqrt(static_cast<double>(pages.size(5))), bias);
    return ts::view(attended, {attended.size(0), attended.size(1) * attended.size(2)});
  }
};

// rows += gate * mlp(rows); weights: norm, gate and up, down.
void add_mlp(const Tensor& rows, const Tensor* weights, const Scales& scales, double gate, double epsilon) {
  const Tensor gate_up = linear(rms_norm(rows, weights[0], epsilon), weights[1], scales[2]);
  add_linear(rows, silu_gate(gate_up), weights[2], gate, scales[3]);
}

// A view of `size` places from `start` on. By value: torch's narrow asks for a tensor that it could change.
Tensor part(Tensor tensor, std::int64_t dim, std::int64_t start, std::int64_t size) {
  return ts::narrow(tensor, dim, start, size);
}

Tensor heads_of(const Tensor& rows, std::int64_t head_dim) {
  return ts::view(rows, {rows.size(0), rows.size(1) / head_dim, head_dim});
}

// Checks what there is of each layer, and counts the layers.
std::int64_t count_layers(std::size_t num_weights, std::size_t num_scales,
                          const std::vector<std::int64_t>& cross_layers, std::size_t num_gates) {
  const std::size_t of_cross = kWeightsOfCross * cross_layers.size();
  check(num_weights >= of_cross && (num_weights - of_cross) % kWeightsOfSelf == 0, kOp,
        ": weights must be six of each self-attention layer and seven of each cross-attention layer, got ",
        num_weights);
  const std::size_t num_layers = (num_weights - of_cross) / kWeightsOfSelf + cross_layers.size();
  check(num_scales == 0 || num_scales == kLinears * num_layers, kOp, ": scales must be four of each of ",
        num_layers, " layers, or none, got ", num_scales);
  check(num_gates == 2 * cross_layers.size(), kOp, ": gates must be two of each of ", cross_layers.size(),
        " cross-attention layers, got ", num_gates);
  for (std::size_t i = 0; i < cross_layers.size(); ++i) {
    const std::int64_t least = i == 0 ? 0 : cross_layers[i - 1] + 1;
    check(least <= cross_layers[i] && cross_layers[i] < static_cast<std::int64_t>(num_layers), kOp,
          ": cross_layers must ascend within [0, ", num_layers, "), got ", cross_layers[i], " at ", i);
  }
  return static_cast<std::int64_t>(num_layers);
}

void check_groups(const char* name, const Tensor& tensor, std::int64_t dims, std::int64_t num_groups) {
  check(tensor.dim() == dims && tensor.size(0) >= num_groups, kOp, ": ", name, " must have ", dims,
        " dimensions, the first of ", num_groups, " groups of layers, got ", describe(tensor));
}

// Of each cross-attention layer there are tables, lengths and maybe a bias; or of none.
void check_features(std::size_t num_tables, const std::vector<Tensor>& lengths, std::size_t num_biases,
                    std::size_t num_cross, std::int64_t num_rows) {
  const auto check_count = [&](const char* name, std::size_t count) {
    check(count == 0 || count == num_cross, kOp, ": ", name, " must be one of each of ", num_cross,
          " cross-attention layers, or none, got ", count);
  };
  check_count("feature_lengths", lengths.size());
  check_count("biases", num_biases);
  check(num_tables == lengths.size(), kOp, ": feature_tables and feature_lengths must come together");
  for (const Tensor& of_layer : lengths) {
    check(of_layer.dim() == 1 && of_layer.size(0) <= num_rows, kOp,
          ": feature_lengths must be int32 [S] with S at most B=", num_rows, ", got ", describe(of_layer));
  }
}

}  // namespace

void decode_layers(const Tensor& hidden, const Tensor& pages, std::vector<Tensor> weights,
                   std::vector<Tensor> scales, std::vector<std::int64_t> cross_layers,
                   std::vector<double> gates, const Tensor& cosines, const Tensor& sines,
                   const Tensor& text_tables, const Tensor& text_lengths, const Tensor& slots,
                   std::vector<Tensor> feature_tables, std::vector<Tensor> feature_lengths,
                   std::vector<Tensor> biases, double epsilon) {
  const std::int64_t num_layers = count_layers(weights.size(), scales.size(), cross_layers, gates.size());
  check_pages(kOp, pages, 0);
  check(pages.size(5) >= 1, kOp, ": Dh must be at least 1, got 0");
  check(hidden.dim() == 2 && hidden.is_contiguous(), kOp, ": hidden must be contiguous [B, D], got ",
        describe(hidden));
  const auto groups_of = [&](std::int64_t layers) { return (layers + pages.size(1) - 1) / pages.size(1); };
  const std::int64_t text_groups = groups_of(num_layers - static_cast<std::int64_t>(cross_layers.size()));
  check_groups("text_tables", text_tables, 3, text_groups);
  check_groups("slots", slots, 2, text_groups);
  check_features(feature_tables.size(), feature_lengths, biases.size(), cross_layers.size(), hidden.size(0));
  const std::int64_t num_kv_heads = pages.size(3), head_dim = pages.size(5);

  const Tensor* of_layer = weights.data();
  std::int64_t num_self = 0, num_cross = 0;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    const Scales of_linears{scales.empty() ? nullptr : scales.data() + kLinears * layer};
    if (std::find(cross_layers.begin(), cross_layers.end(), layer) == cross_layers.end()) {
      const Tensor heads =
          heads_of(linear(rms_norm(hidden, of_layer[0], epsilon), of_layer[1], of_linears[0]), head_dim);
      const std::int64_t num_heads = heads.size(1) - 2 * num_kv_heads;
      check(num_heads > 0, kOp, ": a projection to queries, keys and values has too few outputs, ",
            heads.size(1), " heads");
      rotate(part(heads, 1, 0, num_heads + num_kv_heads), cosines, sines);
      write_kv(pages, num_self % pages.size(1), part(heads, 1, num_heads, num_kv_heads),
               part(heads, 1, num_heads + num_kv_heads, num_kv_heads),
               ts::select(slots, 0, num_self / pages.size(1)));
      const Paged text{pages, ts::select(text_tables, 0, num_self / pages.size(1)), text_lengths};
      const Tensor attended = text.attend(part(heads, 1, 0, num_heads), num_self, std::nullopt);
      add_linear(hidden, attended, of_layer[2], 1.0, of_linears[1]);
      add_mlp(hidden, of_layer + 3, of_linears, 1.0, epsilon);
      of_layer += kWeightsOfSelf;
      ++num_self;
    } else {
      const std::int64_t num_seeing = feature_lengths.empty() ? 0 : feature_lengths[num_cross].size(0);
      if (num_seeing) {
        const Tensor rows = part(hidden, 0, 0, num_seeing);
        const Tensor q = rms_norm(
            heads_of(linear(rms_norm(rows, of_layer[0], epsilon), of_layer[1], of_linears[0]), head_dim),
            of_layer[2], epsilon);
        const Paged features{pages, feature_tables[num_cross], feature_lengths[num_cross]};
        const Tensor attended =
            features.attend(q, num_cross, biases.empty() ? std::nullopt : std::optional(biases[num_cross]));
        add_linear(rows, attended, of_layer[3], gates[2 * num_cross], of_linears[1]);
        add_mlp(rows, of_layer + 4, of_linears, gates[2 * num_cross + 1], epsilon);
      }
      of_layer += kWeightsOfCross;
      ++num_cross;
    }
  }
}

}  // namespace trimserve
