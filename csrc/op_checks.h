// Checks of an op's arguments that hold on every device: dtypes, shapes, counts. The values in tensors are not read.

#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace trimserve {

constexpr std::int64_t kMaxFeatures = std::numeric_limits<std::int32_t>::max();  // kernels may count in int32

void check_headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                           const std::optional<Tensor>& log_sums);

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visibility,
                     double scale, const std::optional<Tensor>& bias);

// Throws unless each row's range, [T, 2] contiguous on the CPU, lies within num_features.
void check_ranges(const char* op, const Tensor& visibility, std::int64_t num_features);

// Images and picks of an op that takes scores [H, N].
struct Selection {
  std::vector<Segment> segments;
  std::int64_t num_picks;  // of a head
  std::int64_t longest;    // features of the longest segment
};
Selection make_selection(const char* op, const Tensor& scores, const std::vector<std::int64_t>& sizes,
                         const std::vector<std::int64_t>& k);

void check_union_indices(const Tensor& picks, std::int64_t num_features);

// Pages of floats, or of int8 on the CPU.
void check_pages(const char* op, const Tensor& pages, std::int64_t layer);

// Dh of what lies in pages.
std::int64_t page_head_dim(const Tensor& pages);

void check_write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                    const Tensor& slots);

void check_gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                     const Tensor& kept, const Tensor& slots);

void check_paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                           const Tensor& lengths, double scale, const std::optional<Tensor>& bias);

// Columns of a weight that is stored so.
std::int64_t linear_columns(ScalarType stored, std::int64_t num_inputs);

// Inputs that share a scale of an int4 weight: 32, 64 or 128; 0 if none of them gives so many groups.
std::int64_t int4_group(std::int64_t num_inputs, std::int64_t num_groups);

// Throws unless scales fit a weight, which is int8 or int4; `name` is what they are called.
void check_linear_scales(const char* op, const std::string& name, const Tensor& scales, const Tensor& weight,
                         std::int64_t num_inputs);

void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales);

void check_rms_norm(const Tensor& x, const Tensor& weight, double epsilon);

void check_silu_gate(const Tensor& gate_up, const std::optional<Tensor>& counts);

void check_rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines);

void check_rotate_write_kv(const Tensor& heads, const Tensor& cosines, const Tensor& sines,
                           const Tensor& pages, std::int64_t layer, const Tensor& slots);

}  // namespace trimserve
