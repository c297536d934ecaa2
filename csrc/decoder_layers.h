// The weights of a decoder's layers as decode_layers reads them: checked and described once, when a model is loaded.
//
// torch's stable ABI has no custom classes, so Python holds a description by an integer handle. A handle is never used
// twice. Descriptions share the memory of their tensors and may be made, used and dropped on any thread: a step keeps
// the description that it runs alive.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "checks.h"

namespace trimserve {

struct LinearWeight {
  Tensor weight;                 // [N, K] or what int4 makes of it, contiguous
  std::optional<Tensor> scales;  // of an int8 or int4 weight
  std::int64_t num_inputs;       // K
};

struct MlpWeights {
  Tensor norm;
  LinearWeight gate_up;
  LinearWeight down;
  double gate;  // factor of what the MLP adds
};

struct SelfLayer {
  Tensor norm;
  LinearWeight qkv;
  LinearWeight output;
  MlpWeights mlp;
};

struct CrossLayer {
  Tensor norm;
  LinearWeight query;
  Tensor query_norm;
  LinearWeight output;
  double gate;  // factor of what attention adds
  MlpWeights mlp;
};

struct DecoderLayers {
  std::vector<std::variant<SelfLayer, CrossLayer>> layers;
  std::int64_t num_self;
  std::int64_t num_cross;
  double epsilon;  // of all norms
  ScalarType dtype;
  std::int64_t hidden_size;  // D
  std::int64_t query_size;   // H * Dh
  std::int64_t kv_size;      // Hkv * Dh; 0 if no layer is self-attention
  std::int64_t head_dim;     // Dh; 0 if no layer is cross-attention
};

// Throws std::invalid_argument for a handle that was never given, or was dropped.
std::shared_ptr<const DecoderLayers> find_decoder_layers(const char* op, std::int64_t handle);

}  // namespace trimserve
