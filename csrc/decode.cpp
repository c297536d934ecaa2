// decode_layers: runs one new row of each sequence through all layers of the decoder in one call.
//
// It calls the ops of layers.cpp and paging.cpp in the order of reference.decode_layers. One call pays off where an op
// takes microseconds: going through Python between two ops would take as long, and each op that Python calls lets its
// other threads in (ADR-0006). The weights are checked when they are described (decoder_layers.h), the step's tensors
// here and in the ops.

#include <cmath>

#include "decoder_layers.h"
#include "op_checks.h"
#include "ops.h"

namespace trimserve {
namespace {

namespace ts = torch::stable;

constexpr const char* kOp = "decode_layers";

// Page tables of the self-attention layers, which hold the text.
struct SelfTables {
  const Tensor& tables;   // int32 [groups, B, max_pages]
  const Tensor& lengths;  // int32 [B]
  const Tensor& slots;    // int64 [groups, B]
};

// Page tables of the cross-attention layers, which hold the features. A list has an entry for each layer, or is empty.
struct CrossTables {
  const std::vector<Tensor>& tables;   // int32 [S, max_pages]
  const std::vector<Tensor>& lengths;  // int32 [S]
  const std::vector<Tensor>& biases;   // float32 [S, max_pages * kPagePositions]
};

struct Step {
  const DecoderLayers& layers;
  const Tensor& hidden;  // [B, D]
  const Tensor& pages;   // see check_pages
  const Tensor& cosines;
  const Tensor& sines;
  SelfTables text;
  CrossTables features;

  std::int64_t layers_per_page() const { return pages.size(1); }
  std::int64_t num_kv_heads() const { return pages.size(3); }
  std::int64_t head_dim() const { return page_head_dim(pages); }
};

void check_hidden_and_pages(const Step& step) {
  const DecoderLayers& layers = step.layers;
  check_pages(kOp, step.pages, 0);
  const std::int64_t head_dim = step.head_dim();
  check(head_dim >= 1, kOp, ": Dh must be at least 1, got 0");
  check(step.pages.scalar_type() == layers.dtype || step.pages.scalar_type() == ScalarType::Char, kOp,
        ": pages must be ", name_of(layers.dtype), " like the layers, or int8, got ", describe(step.pages));
  check((layers.num_self == 0 || step.num_kv_heads() * head_dim == layers.kv_size) &&
            (layers.num_cross == 0 || head_dim == layers.head_dim) && layers.query_size % head_dim == 0,
        kOp, ": pages must have the layers' heads, Hkv * Dh=", layers.kv_size,
        " and H * Dh=", layers.query_size, ", got Hkv=", step.num_kv_heads(), ", Dh=", head_dim);
  check(step.hidden.scalar_type() == layers.dtype && step.hidden.dim() == 2 &&
            step.hidden.size(1) == layers.hidden_size && step.hidden.is_contiguous(),
        kOp, ": hidden must be contiguous ", name_of(layers.dtype), " [B, ", layers.hidden_size, "], got ",
        describe(step.hidden));
}

void check_text(const Step& step) {
  const std::int64_t per_page = step.layers_per_page();
  const std::int64_t num_groups = (step.layers.num_self + per_page - 1) / per_page;
  const auto check_groups = [&](const char* name, const Tensor& tensor, std::int64_t dims) {
    check(tensor.dim() == dims && tensor.size(0) >= num_groups, kOp, ": text.", name, " must have ", dims,
          " dimensions, the first at least ", num_groups, " groups of layers, got ", describe(tensor));
  };
  check_groups("tables", step.text.tables, 3);
  check_groups("slots", step.text.slots, 2);
}

void check_features(const Step& step) {
  const auto& [tables, lengths, biases] = step.features;
  const auto check_count = [&](const char* name, std::size_t count) {
    check(count == 0 || count == static_cast<std::size_t>(step.layers.num_cross), kOp, ": features.", name,
          " must be one of each of ", step.layers.num_cross, " cross-attention layers, or none, got ", count);
  };
  check_count("lengths", lengths.size());
  check_count("biases", biases.size());
  check(tables.size() == lengths.size(), kOp,
        ": features.tables must be as many as features.lengths=", lengths.size(), ", got ", tables.size());
  for (const Tensor& of_layer : lengths) {
    check(of_layer.dim() == 1 && of_layer.size(0) <= step.hidden.size(0), kOp,
          ": features.lengths must be int32 [S] with S at most B=", step.hidden.size(0), ", got ",
          describe(of_layer));
  }
}

// A view of `size` places from `start` on. By value, because torch's narrow takes a mutable reference.
Tensor part(Tensor tensor, std::int64_t dim, std::int64_t start, std::int64_t size) {
  return ts::narrow(tensor, dim, start, size);
}

Tensor apply(const LinearWeight& linear_weight, const Tensor& rows) {
  return linear(rows, linear_weight.weight, linear_weight.scales);
}

// rows += gate * (x times the weight).
void add(const Tensor& rows, const Tensor& x, const LinearWeight& linear_weight, double gate) {
  add_linear(rows, x, linear_weight.weight, gate, linear_weight.scales);
}

void add_mlp(const Tensor& rows, const MlpWeights& mlp, double epsilon) {
  add(rows, silu_gate(apply(mlp.gate_up, rms_norm(rows, mlp.norm, epsilon))), mlp.down, mlp.gate);
}

Tensor heads_of(const Tensor& rows, std::int64_t head_dim) {
  return ts::view(rows, {rows.size(0), rows.size(1) / head_dim, head_dim});
}

// layer: counted among its own kind. Returns [B, H * Dh].
Tensor attend(const Step& step, const Tensor& q, std::int64_t layer, const Tensor& tables,
              const Tensor& lengths, const std::optional<Tensor>& bias) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(step.head_dim()));
  const Tensor attended =
      paged_attention(q, step.pages, layer % step.layers_per_page(), tables, lengths, scale, bias);
  return ts::view(attended, {attended.size(0), attended.size(1) * attended.size(2)});
}

// index: of the layer among self-attention layers.
void run_self(const Step& step, const SelfLayer& layer, std::int64_t index) {
  const std::int64_t num_heads = step.layers.query_size / step.head_dim();
  const std::int64_t group = index / step.layers_per_page();
  const double epsilon = step.layers.epsilon;
  const Tensor heads =
      heads_of(apply(layer.qkv, rms_norm(step.hidden, layer.norm, epsilon)), step.head_dim());
  rotate_write_kv(heads, step.cosines, step.sines, step.pages, index % step.layers_per_page(),
                  ts::select(step.text.slots, 0, group));
  const Tensor attended = attend(step, part(heads, 1, 0, num_heads), index,
                                 ts::select(step.text.tables, 0, group), step.text.lengths, std::nullopt);
  add(step.hidden, attended, layer.output, 1.0);
  add_mlp(step.hidden, layer.mlp, epsilon);
}

// index: of the layer among cross-attention layers. Only the first rows see features; the others pass unchanged.
void run_cross(const Step& step, const CrossLayer& layer, std::int64_t index) {
  const auto& [tables, lengths, biases] = step.features;
  const std::int64_t num_seeing = lengths.empty() ? 0 : lengths[index].size(0);
  if (num_seeing == 0) return;
  const double epsilon = step.layers.epsilon;
  const Tensor rows = part(step.hidden, 0, 0, num_seeing);
  const Tensor queries = heads_of(apply(layer.query, rms_norm(rows, layer.norm, epsilon)), step.head_dim());
  const Tensor attended =
      attend(step, rms_norm(queries, layer.query_norm, epsilon), index, tables[index], lengths[index],
             biases.empty() ? std::nullopt : std::optional(biases[index]));
  add(rows, attended, layer.output, layer.gate);
  add_mlp(rows, layer.mlp, epsilon);
}

}  // namespace

void decode_layers(const Tensor& hidden, const Tensor& pages, std::int64_t handle, std::vector<Tensor> angles,
                   std::vector<Tensor> text, std::vector<Tensor> feature_tables,
                   std::vector<Tensor> feature_lengths, std::vector<Tensor> biases) {
  const std::shared_ptr<const DecoderLayers> layers = find_decoder_layers(kOp, handle);
  check(angles.size() == 2, kOp, ": angles must be cosines and sines, got ", angles.size(), " tensors");
  check(text.size() == 3, kOp, ": text must be tables, lengths and slots, got ", text.size(), " tensors");
  const Step step{*layers,
                  hidden,
                  pages,
                  angles[0],
                  angles[1],
                  {text[0], text[1], text[2]},
                  {feature_tables, feature_lengths, biases}};
  check_hidden_and_pages(step);
  check_text(step);
  check_features(step);
  std::int64_t num_self = 0, num_cross = 0;
  for (const auto& layer : layers->layers) {
    if (const auto* const self = std::get_if<SelfLayer>(&layer)) {
      run_self(step, *self, num_self++);
    } else {
      run_cross(step, std::get<CrossLayer>(layer), num_cross++);
    }
  }
}

}  // namespace trimserve
