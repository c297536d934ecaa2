// The ops of namespace `trimserve` on CPU tensors, and helpers that all ops share. Registered in ops.cpp.
//
// An op checks its arguments, allocates, and hands ranges to the kernels of kernels.h. The op layer, on the CPU and on
// CUDA, knows torch; kernels (cpu/, cuda/*.cu and the headers that they include) and module.cpp do not. Strided rows,
// such as views of a fused projection, are read in place where the kernel takes a stride. Other layouts are copied to a
// contiguous one first, or refused: weights of `linear`, pages, and what an op writes to.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace trimserve {

// selection.cpp
Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                       std::optional<Tensor> log_sums);
Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k);
std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features);
std::tuple<Tensor, Tensor> select_features(const Tensor& scores, std::vector<std::int64_t> segments,
                                           std::vector<std::int64_t> k);

// attention.cpp
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& visibility, double scale, std::optional<Tensor> bias);

// paging.cpp
void write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
              const Tensor& slots);
void gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
               const Tensor& kept, const Tensor& slots);
void rotate_write_kv(const Tensor& heads, const Tensor& cosines, const Tensor& sines, const Tensor& pages,
                     std::int64_t layer, const Tensor& slots);
Tensor paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                       const Tensor& lengths, double scale, std::optional<Tensor> bias);

// layers.cpp
Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> scales = std::nullopt);
void add_linear(const Tensor& output, const Tensor& x, const Tensor& weight, double gate,
                std::optional<Tensor> scales = std::nullopt);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon);
Tensor silu_gate(const Tensor& gate_up, std::optional<Tensor> counts = std::nullopt);
void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines);

// decoder_layers.cpp
std::int64_t make_decoder_layers(std::vector<Tensor> weights, std::vector<Tensor> scales,
                                 std::vector<std::int64_t> cross_layers, std::vector<double> gates,
                                 double epsilon);
void drop_decoder_layers(std::int64_t handle);

// decode.cpp
void decode_layers(const Tensor& hidden, const Tensor& pages, std::int64_t handle, std::vector<Tensor> angles,
                   std::vector<Tensor> text, std::vector<Tensor> feature_tables,
                   std::vector<Tensor> feature_lengths, std::vector<Tensor> biases);

// --- helpers ---

constexpr std::int64_t kGrainBytes = 256 * 1024;  // memory traffic that is worth a thread

inline DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline std::int64_t element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Float ? 4 : dtype == ScalarType::Char ? 1 : 2;
}

inline std::int64_t rows_per_thread(std::int64_t row_elements, ScalarType dtype) {
  return kGrainBytes / (row_elements * element_bytes(dtype) + 1) + 1;
}

inline Tensor with_contiguous_rows(const Tensor& tensor) {
  std::int64_t expected = 1;
  for (std::int64_t i = tensor.dim() - 1; i > 0; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(i);
  }
  return tensor;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory for a thread, aligned to a cache line and not initialised.
template <typename T>
std::unique_ptr<T[], Free> workspace(std::int64_t count) {
  constexpr std::size_t kCacheLine = 64;
  const std::size_t num_bytes = (count * sizeof(T) / kCacheLine + 1) * kCacheLine;
  void* memory = std::aligned_alloc(kCacheLine, num_bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

}  // namespace trimserve
