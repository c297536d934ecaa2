// CUDA ops on paged keys and values: checks, allocation, launches.

#include "../op_args.h"
#include "../op_checks.h"
#include "on_device.h"
#include "ops.h"

namespace trimserve::cuda {
namespace {

// Writes row kept[r], or r where kept is null, to slots[r].
void write_rows(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                const std::int64_t* kept, const Tensor& slots, Stream stream) {
  const Tensor key_rows = with_contiguous_heads(keys), value_rows = with_contiguous_heads(values);
  const WriteKvArgs args = write_kv_args(pages, layer, key_rows, value_rows, kept, slots);
  write_kv(args, slots.size(0), {keys.size(0), pages.size(0) * kPagePositions}, stream);
}

}  // namespace

void write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
              const Tensor& slots) {
  check_write_kv(pages, layer, keys, values, slots);
  const OnDevice device = on_device(pages);
  write_rows(pages, layer, keys, values, nullptr, torch::stable::contiguous(slots), device.stream);
}

void gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
               const Tensor& kept, const Tensor& slots) {
  check_gather_kv(pages, layer, keys, values, kept, slots);
  const OnDevice device = on_device(pages);
  const Tensor indices = torch::stable::contiguous(kept);
  write_rows(pages, layer, keys, values, static_cast<const std::int64_t*>(indices.const_data_ptr()),
             torch::stable::contiguous(slots), device.stream);
}

void rotate_write_kv(const Tensor& heads, const Tensor& cosines, const Tensor& sines, const Tensor& pages,
                     std::int64_t layer, const Tensor& slots) {
  check_rotate_write_kv(heads, cosines, sines, pages, layer, slots);
  const OnDevice device = on_device(heads);
  const Tensor cos = torch::stable::contiguous(cosines), sin = torch::stable::contiguous(sines);
  const Tensor places = torch::stable::contiguous(slots);
  RotateArgs args = rotate_args(heads, cos, sin);
  args.num_heads -= pages.size(3);
  const WriteKvArgs store = write_kv_args(pages, layer, heads, heads, nullptr, places);
  rotate_write_kv(args, store, heads.size(0), pages.size(0) * kPagePositions, device.stream);
}

Tensor paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                       const Tensor& lengths, double scale, std::optional<Tensor> bias) {
  check_paged_attention(q, pages, layer, tables, lengths, scale, bias);
  const OnDevice device = on_device(q);
  if (bias) bias = with_contiguous_rows(*bias);
  const Tensor queries = with_contiguous_rows(q), page_ids = with_contiguous_rows(tables);
  const Tensor num_positions = torch::stable::contiguous(lengths);
  Tensor attended = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const PagedAttentionArgs args =
      paged_attention_args(queries, pages, layer, page_ids, num_positions, bias, attended, scale);
  const std::int64_t max_pages = tables.size(1);
  Tensor workspace =
      torch::stable::new_empty(q, {paged_attention_workspace(args, max_pages)}, ScalarType::Float);
  paged_attention(args, max_pages, pages.size(0), static_cast<float*>(workspace.mutable_data_ptr()),
                  device.stream);
  return attended;
}

}  // namespace trimserve::cuda
