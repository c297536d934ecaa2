// Kernel arguments from an op's tensors, which are checked and laid out by then. The same on every device.

#pragma once

#include <optional>

#include "op_checks.h"
#include "ops.h"

namespace trimserve {

inline Tensor with_contiguous_heads(const Tensor& rows) {
  return rows.stride(2) == 1 || rows.size(2) == 1 ? rows : torch::stable::contiguous(rows);
}

inline HeadwiseScoresArgs headwise_scores_args(const Tensor& q, const Tensor& k, const Tensor& visibility,
                                               const std::optional<Tensor>& log_sums, const Tensor& scores,
                                               double scale) {
  return {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .visibility = static_cast<const std::int32_t*>(visibility.const_data_ptr()),
      .log_sums = log_sums ? static_cast<const float*>(log_sums->const_data_ptr()) : nullptr,
      .scores = static_cast<float*>(scores.mutable_data_ptr()),
      .dtype = kernel_dtype(q.scalar_type()),
      .num_rows = q.size(0),
      .num_features = k.size(0),
      .num_heads = q.size(1),
      .num_kv_heads = k.size(1),
      .head_dim = q.size(2),
      .q_stride = q.stride(0),
      .k_stride = k.stride(0),
      .scale = static_cast<float>(scale),
  };
}

inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& visibility, const std::optional<Tensor>& bias,
                                    const Tensor& attended, const Tensor& log_sums, double scale) {
  return {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .visibility = static_cast<const std::int32_t*>(visibility.const_data_ptr()),
      .bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      .attended = attended.mutable_data_ptr(),
      .log_sums = static_cast<float*>(log_sums.mutable_data_ptr()),
      .dtype = kernel_dtype(q.scalar_type()),
      .num_rows = q.size(0),
      .num_keys = k.size(0),
      .num_heads = q.size(1),
      .num_kv_heads = k.size(1),
      .head_dim = q.size(2),
      .q_stride = q.stride(0),
      .k_stride = k.stride(0),
      .v_stride = v.stride(0),
      .scale = static_cast<float>(scale),
  };
}

// Points to the segments of `selection`.
inline HeadwiseTopkArgs headwise_topk_args(const Tensor& scores, const Selection& selection,
                                           const Tensor& picks) {
  return {
      .scores = static_cast<const float*>(scores.const_data_ptr()),
      .picks = static_cast<std::int64_t*>(picks.mutable_data_ptr()),
      .segments = selection.segments.data(),
      .num_segments = static_cast<std::int64_t>(selection.segments.size()),
      .num_features = scores.size(1),
      .num_picks = selection.num_picks,
  };
}

// kept: null for all rows.
inline WriteKvArgs write_kv_args(const Tensor& pages, std::int64_t layer, const Tensor& keys,
                                 const Tensor& values, const std::int64_t* kept, const Tensor& slots) {
  const std::int64_t page_item_bytes = element_bytes(pages.scalar_type()),
                     item_bytes = element_bytes(keys.scalar_type()),
                     layer_bytes = pages.stride(1) * page_item_bytes;
  const auto rows_of = [&](const Tensor& rows) {
    return KvRows{static_cast<const std::byte*>(rows.const_data_ptr()), rows.stride(0) * item_bytes,
                  rows.stride(1) * item_bytes};
  };
  return {
      .keys = rows_of(keys),
      .values = rows_of(values),
      .pages = static_cast<std::byte*>(pages.mutable_data_ptr()) + layer * layer_bytes,
      .kept = kept,
      .slots = static_cast<const std::int64_t*>(slots.const_data_ptr()),
      .num_kv_heads = pages.size(3),
      .head_bytes = pages.size(5) * page_item_bytes,
      .page_stride_bytes = pages.size(1) * layer_bytes,
      .head_dim = keys.size(2),
      .dtype = kernel_dtype(keys.scalar_type()),
      .is_int8 = pages.scalar_type() == ScalarType::Char,
      .is_streamed = false,
  };
}

inline PagedAttentionArgs paged_attention_args(const Tensor& q, const Tensor& pages, std::int64_t layer,
                                               const Tensor& tables, const Tensor& lengths,
                                               const std::optional<Tensor>& bias, const Tensor& attended,
                                               double scale) {
  const std::int64_t layer_bytes = pages.stride(1) * element_bytes(pages.scalar_type());
  return {
      .q = q.const_data_ptr(),
      .pages = static_cast<const std::byte*>(pages.const_data_ptr()) + layer * layer_bytes,
      .tables = static_cast<const std::int32_t*>(tables.const_data_ptr()),
      .lengths = static_cast<const std::int32_t*>(lengths.const_data_ptr()),
      .bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      .attended = attended.mutable_data_ptr(),
      .dtype = kernel_dtype(q.scalar_type()),
      .is_int8 = pages.scalar_type() == ScalarType::Char,
      .num_sequences = q.size(0),
      .num_heads = q.size(1),
      .num_kv_heads = pages.size(3),
      .head_dim = q.size(2),
      .q_stride = q.stride(0),
      .table_stride = tables.stride(0),
      .page_stride = pages.size(1) * pages.stride(1),
      .bias_stride = bias ? bias->stride(0) : 0,
      .scale = static_cast<float>(scale),
  };
}

inline SiluGateArgs silu_gate_args(const Tensor& gate_up, const std::optional<Tensor>& counts,
                                   const Tensor& output) {
  return {
      .gate_up = gate_up.const_data_ptr(),
      .counts = counts ? static_cast<const std::int32_t*>(counts->const_data_ptr()) : nullptr,
      .output = output.mutable_data_ptr(),
      .dtype = kernel_dtype(gate_up.scalar_type()),
      .size = output.size(1),
      .row_stride = gate_up.stride(0),
  };
}

inline RotateArgs rotate_args(const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  return {
      .heads = heads.mutable_data_ptr(),
      .cosines = static_cast<const float*>(cosines.const_data_ptr()),
      .sines = static_cast<const float*>(sines.const_data_ptr()),
      .dtype = kernel_dtype(heads.scalar_type()),
      .num_heads = heads.size(1),
      .head_dim = heads.size(2),
      .row_stride = heads.stride(0),
  };
}

}  // namespace trimserve
