// make_decoder_layers, drop_decoder_layers: descriptions of layers and their handles. No kernels.

#include "decoder_layers.h"

#include <cmath>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "op_checks.h"
#include "ops.h"

namespace trimserve {
namespace {

constexpr const char* kOp = "DecoderLayers";  // the class of trimserve.ops that callers see
constexpr std::size_t kWeightsOfSelf = 6, kWeightsOfCross = 7, kLinears = 4, kGates = 2;
constexpr std::int64_t kAny = 0;  // a size that is not known yet

struct Size {
  std::int64_t value;
};

std::ostream& operator<<(std::ostream& text, Size size) {
  return size.value == kAny ? text << "any" : text << size.value;
}

bool fits(std::int64_t size, Size wanted) { return wanted.value == kAny ? size >= 1 : size == wanted.value; }

// Takes one layer's weights in their order and checks each of them.
class LayerReader {
 public:
  // scales: of this layer, or null.
  LayerReader(std::int64_t layer, ScalarType dtype, const Tensor* weights, const Tensor* scales)
      : layer_(layer), dtype_(dtype), weights_(weights), scales_(scales) {}

  Tensor norm(const char* name, std::int64_t size) {
    const Tensor& weight = *weights_++;
    check(weight.is_cpu() && weight.scalar_type() == dtype_ && weight.dim() == 1 &&
              fits(weight.size(0), {size}),
          kOp, ": ", name, " of layer ", layer_, " must be ", name_of(dtype_), " [", Size{size},
          "] on cpu, got ", describe(weight), " on ", Place{weight});
    return torch::stable::contiguous(weight);
  }

  LinearWeight linear(const char* name, std::int64_t num_outputs, std::int64_t num_inputs) {
    const Tensor& weight = *weights_++;
    const Tensor* const scales = scales_ && (scales_++)->numel() > 0 ? scales_ - 1 : nullptr;
    const bool is_int4 = scales && weight.scalar_type() == ScalarType::Byte;
    const ScalarType stored = is_int4 ? ScalarType::Byte : scales ? ScalarType::Char : dtype_;
    const Size columns{num_inputs == kAny ? kAny : linear_columns(stored, num_inputs)};
    check(weight.is_cpu() && weight.scalar_type() == stored && weight.dim() == 2 &&
              fits(weight.size(0), {num_outputs}) && fits(weight.size(1), columns),
          kOp, ": ", name, " of layer ", layer_, " must be ", name_of(stored), " [", Size{num_outputs}, ", ",
          columns, "] on cpu, got ", describe(weight), " on ", Place{weight});
    check(weight.is_contiguous(), kOp, ": ", name, " of layer ", layer_, " must be contiguous");
    if (num_inputs == kAny) num_inputs = weight.size(1) * (is_int4 ? kInt4Unit / kInt4UnitBytes : 1);
    if (!scales) return {weight, std::nullopt, num_inputs};
    const std::string named = std::string("scales of ") + name + " of layer " + std::to_string(layer_);
    check(scales->is_cpu(), kOp, ": ", named, " must be on cpu, got ", Place{*scales});
    check_linear_scales(kOp, named, *scales, weight, num_inputs);
    return {weight, torch::stable::contiguous(*scales), num_inputs};
  }

  MlpWeights mlp(std::int64_t hidden_size, double gate) {
    Tensor mlp_norm = norm("MLP norm", hidden_size);
    LinearWeight gate_up = linear("gate-up", kAny, hidden_size);
    const std::int64_t num_outputs = gate_up.weight.size(0);
    check(num_outputs % 2 == 0, kOp, ": gate-up of layer ", layer_,
          " must have an even number of outputs, got ", num_outputs);
    LinearWeight down = linear("down", hidden_size, num_outputs / 2);
    return {mlp_norm, gate_up, down, gate};
  }

 private:
  std::int64_t layer_;
  ScalarType dtype_;
  const Tensor* weights_;
  const Tensor* scales_;
};

SelfLayer read_self(LayerReader reader, std::int64_t layer, DecoderLayers& made) {
  Tensor norm = reader.norm("input norm", made.hidden_size);
  LinearWeight qkv = reader.linear("query-key-value", kAny, made.hidden_size);
  LinearWeight output = reader.linear("output", made.hidden_size, made.query_size);
  made.query_size = output.num_inputs;
  const std::int64_t of_both = qkv.weight.size(0) - made.query_size;
  check(of_both >= 2 && of_both % 2 == 0 && (made.num_self == 0 || of_both == 2 * made.kv_size), kOp,
        ": query-key-value of layer ", layer, " must have ", made.query_size,
        " outputs for queries and as many for keys as for values, the same in every layer, got ",
        qkv.weight.size(0));
  made.kv_size = of_both / 2;
  ++made.num_self;
  return {norm, qkv, output, reader.mlp(made.hidden_size, 1.0)};
}

CrossLayer read_cross(LayerReader reader, std::int64_t layer, const double* gates, DecoderLayers& made) {
  Tensor norm = reader.norm("input norm", made.hidden_size);
  LinearWeight query = reader.linear("query", made.query_size, made.hidden_size);
  made.query_size = query.weight.size(0);
  Tensor query_norm = reader.norm("query norm", made.head_dim);
  made.head_dim = query_norm.size(0);
  check(made.query_size % made.head_dim == 0, kOp, ": query of layer ", layer,
        " must have a multiple of Dh=", made.head_dim, " outputs, got ", made.query_size);
  LinearWeight output = reader.linear("output", made.hidden_size, made.query_size);
  ++made.num_cross;
  return {norm, query, query_norm, output, gates[0], reader.mlp(made.hidden_size, gates[1])};
}

// Checks that the lists have the right lengths, and counts the layers.
std::int64_t count_layers(std::size_t num_weights, std::size_t num_scales,
                          const std::vector<std::int64_t>& cross_layers, std::size_t num_gates) {
  const std::size_t of_cross = kWeightsOfCross * cross_layers.size();
  check(num_weights >= 1 && num_weights >= of_cross && (num_weights - of_cross) % kWeightsOfSelf == 0, kOp,
        ": weights must be six of each self-attention layer and seven of each cross-attention layer, got ",
        num_weights);
  const std::size_t num_layers = (num_weights - of_cross) / kWeightsOfSelf + cross_layers.size();
  check(num_scales == 0 || num_scales == kLinears * num_layers, kOp, ": scales must be four of each of ",
        num_layers, " layers, or none, got ", num_scales);
  check(num_gates == kGates * cross_layers.size(), kOp, ": gates must be two of each of ",
        cross_layers.size(), " cross-attention layers, got ", num_gates);
  for (std::size_t i = 0; i < cross_layers.size(); ++i) {
    const std::int64_t least = i == 0 ? 0 : cross_layers[i - 1] + 1;
    check(least <= cross_layers[i] && cross_layers[i] < static_cast<std::int64_t>(num_layers), kOp,
          ": cross_layers must ascend within [0, ", num_layers, "), got ", cross_layers[i], " at ", i);
  }
  return static_cast<std::int64_t>(num_layers);
}

class Registry {
 public:
  std::int64_t add(std::shared_ptr<const DecoderLayers> layers) {
    const std::lock_guard lock(mutex_);
    by_handle_.emplace(++last_handle_, std::move(layers));
    return last_handle_;
  }

  std::shared_ptr<const DecoderLayers> find(const char* op, std::int64_t handle) {
    const std::lock_guard lock(mutex_);
    return locate(op, handle)->second;
  }

  // The caller frees what it gets, when the lock is released.
  std::shared_ptr<const DecoderLayers> take(const char* op, std::int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto found = locate(op, handle);
    std::shared_ptr<const DecoderLayers> layers = std::move(found->second);
    by_handle_.erase(found);
    return layers;
  }

 private:
  using ByHandle = std::unordered_map<std::int64_t, std::shared_ptr<const DecoderLayers>>;

  ByHandle::iterator locate(const char* op, std::int64_t handle) {
    const auto found = by_handle_.find(handle);
    check(found != by_handle_.end(), op, ": layers must be a handle of DecoderLayers that still exists, got ",
          handle);
    return found;
  }

  std::mutex mutex_;
  ByHandle by_handle_;
  std::int64_t last_handle_ = 0;
};

Registry& registry() {
  static Registry* const made =
      new Registry;  // never destroyed: torch may be gone before this library's statics
  return *made;
}

}  // namespace

std::shared_ptr<const DecoderLayers> find_decoder_layers(const char* op, std::int64_t handle) {
  return registry().find(op, handle);
}

std::int64_t make_decoder_layers(std::vector<Tensor> weights, std::vector<Tensor> scales,
                                 std::vector<std::int64_t> cross_layers, std::vector<double> gates,
                                 double epsilon) {
  const std::int64_t num_layers = count_layers(weights.size(), scales.size(), cross_layers, gates.size());
  check(epsilon >= 0 && std::isfinite(epsilon), kOp, ": epsilon must be finite and at least 0, got ",
        epsilon);
  const Tensor& first = weights.front();
  check(is_floating(first.scalar_type()) && first.dim() == 1 && first.size(0) >= 1, kOp,
        ": input norm of layer 0 must be float32, bfloat16 or float16 [D], got ", describe(first));
  auto made = std::make_shared<DecoderLayers>();
  made->epsilon = epsilon;
  made->dtype = first.scalar_type();
  made->hidden_size = first.size(0);
  const Tensor* of_layer = weights.data();
  auto next_cross = cross_layers.begin();
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    const Tensor* const of_linears = scales.empty() ? nullptr : scales.data() + kLinears * layer;
    const LayerReader reader(layer, made->dtype, of_layer, of_linears);
    if (next_cross != cross_layers.end() && *next_cross == layer) {
      made->layers.emplace_back(read_cross(reader, layer, gates.data() + kGates * made->num_cross, *made));
      of_layer += kWeightsOfCross;
      ++next_cross;
    } else {
      made->layers.emplace_back(read_self(reader, layer, *made));
      of_layer += kWeightsOfSelf;
    }
  }
  return registry().add(std::move(made));
}

void drop_decoder_layers(std::int64_t handle) { registry().take("drop_decoder_layers", handle); }

}  // namespace trimserve
