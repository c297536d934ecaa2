// The ops of namespace `trimserve` on CUDA tensors; ../ops.h has those for the CPU. Registered in cuda/ops.cpp.
//
// An op checks dtypes and shapes (op_checks.h), allocates, and queues kernels (launchers.h). It does not wait for the
// device, so values are not checked: launchers.h says what happens to indices out of range.

#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"

namespace trimserve::cuda {

// selection.cpp
Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                       std::optional<Tensor> log_sums);
Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k);
std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features);
std::tuple<Tensor, Tensor> select_features(const Tensor& scores, std::vector<std::int64_t> segments,
                                           std::vector<std::int64_t> k);

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
Tensor silu_gate(const Tensor& gate_up, std::optional<Tensor> counts);
void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines);

}  // namespace trimserve::cuda
