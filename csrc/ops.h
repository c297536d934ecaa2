// The ops of namespace `trimserve` as functions of tensors, and what they have in common. Registered in ops.cpp.
//
// An op checks its arguments, allocates, and hands ranges to the kernels of kernels.h; together with checks.h these
// are the only files that know torch. Tensors whose rows are strided (views of a fused projection) are read in place;
// any other layout is copied to a contiguous one first.

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
Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale);
Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k);
std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features);
std::tuple<Tensor, Tensor> select_features(const Tensor& scores, std::vector<std::int64_t> segments,
                                           std::vector<std::int64_t> k);

// paging.cpp
void write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
              const Tensor& slots);
void gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
               const Tensor& kept, const Tensor& slots);
Tensor paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                       const Tensor& lengths, double scale, std::optional<Tensor> bias);

// layers.cpp
Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> scales = std::nullopt);
void add_linear(const Tensor& output, const Tensor& x, const Tensor& weight, double gate,
                std::optional<Tensor> scales = std::nullopt);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon);
Tensor silu_gate(const Tensor& gate_up);
void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines);

// decode.cpp
void decode_layers(const Tensor& hidden, const Tensor& pages, std::vector<Tensor> weights,
                   std::vector<Tensor> scales, std::vector<std::int64_t> cross_layers,
                   std::vector<double> gates, const Tensor& cosines, const Tensor& sines,
                   const Tensor& text_tables, const Tensor& text_lengths, const Tensor& slots,
                   std::vector<Tensor> feature_tables, std::vector<Tensor> feature_lengths,
                   std::vector<Tensor> biases, double epsilon);

// --- what they have in common ---

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

inline std::int64_t element_bytes(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

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

// Workspace of one thread, on a cache line.
template <typename T>
std::unique_ptr<T[], Free> workspace(std::int64_t count) {
  constexpr std::size_t kCacheLine = 64;
  const std::size_t num_bytes = (count * sizeof(T) / kCacheLine + 1) * kCacheLine;
  void* memory = std::aligned_alloc(kCacheLine, num_bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

}  // namespace trimserve
