// CPU ops on paged keys and values: checks, allocation, threads. Kernels are in cpu/.

#include <algorithm>

#include "op_args.h"
#include "op_checks.h"
#include "ops.h"

namespace trimserve {
namespace {

constexpr std::int64_t kCachedBytes = 4 << 20;  // writes larger than this bypass the caches

// Every length fits its row of the tables, and every page that a length needs exists.
void check_page_tables(const PagedAttentionArgs& args, std::int64_t max_pages, std::int64_t num_pages) {
  constexpr const char* kOp = "paged_attention";
  for (std::int64_t b = 0; b < args.num_sequences; ++b) {
    const std::int64_t length = args.lengths[b];
    check(0 <= length && length <= max_pages * kPagePositions, kOp, ": lengths[", b, "] must be in [0, ",
          max_pages * kPagePositions, "], got ", length);
    const std::int32_t* const table = args.tables + b * args.table_stride;
    for (std::int64_t i = 0; i * kPagePositions < length; ++i) {
      check(0 <= table[i] && table[i] < num_pages, kOp, ": tables[", b, ", ", i, "] must be in [0, ",
            num_pages, "), got ", table[i]);
    }
  }
}

// Writes row kept[r], or r where kept is null, to slots[r]; both were checked.
void write_rows(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                const std::int64_t* kept, const Tensor& slots) {
  const Tensor key_rows = with_contiguous_heads(keys), value_rows = with_contiguous_heads(values);
  WriteKvArgs args = write_kv_args(pages, layer, key_rows, value_rows, kept, slots);
  const std::int64_t row_bytes = 2 * args.num_kv_heads * args.head_bytes, num_rows = slots.size(0);
  args.is_streamed = !args.is_int8 && num_rows * row_bytes >= kCachedBytes &&
                     args.head_bytes % kStreamedBytes == 0 &&
                     reinterpret_cast<std::uintptr_t>(args.pages) % kStreamedBytes == 0;
  const std::int64_t rows_per_thread = kGrainBytes / std::max<std::int64_t>(row_bytes, 1) + 1;
  torch::stable::parallel_for(0, num_rows, rows_per_thread,
                              [&](std::int64_t begin, std::int64_t end) { cpu::write_kv(args, begin, end); });
}

}  // namespace

void write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
              const Tensor& slots) {
  check_write_kv(pages, layer, keys, values, slots);
  const Tensor places = torch::stable::contiguous(slots);
  check_indices("write_kv", "slots", places, pages.size(0) * kPagePositions);
  write_rows(pages, layer, keys, values, nullptr, places);
}

void gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
               const Tensor& kept, const Tensor& slots) {
  check_gather_kv(pages, layer, keys, values, kept, slots);
  const Tensor indices = torch::stable::contiguous(kept), places = torch::stable::contiguous(slots);
  check_indices("gather_kv", "kept", indices, keys.size(0));
  check_indices("gather_kv", "slots", places, pages.size(0) * kPagePositions);
  write_rows(pages, layer, keys, values, static_cast<const std::int64_t*>(indices.const_data_ptr()), places);
}

void rotate_write_kv(const Tensor& heads, const Tensor& cosines, const Tensor& sines, const Tensor& pages,
                     std::int64_t layer, const Tensor& slots) {
  check_rotate_write_kv(heads, cosines, sines, pages, layer, slots);
  const Tensor places = torch::stable::contiguous(slots);
  check_indices("rotate_write_kv", "slots", places, pages.size(0) * kPagePositions);
  const std::int64_t num_kv_heads = pages.size(3), first_value = heads.size(1) - num_kv_heads;
  const auto part = [](Tensor of, std::int64_t first,
                       std::int64_t size) {  // narrow takes a mutable reference
    return torch::stable::narrow(of, 1, first, size);
  };
  rotate(part(heads, 0, first_value), cosines, sines);
  write_rows(pages, layer, part(heads, first_value - num_kv_heads, num_kv_heads),
             part(heads, first_value, num_kv_heads), nullptr, places);
}

Tensor paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                       const Tensor& lengths, double scale, std::optional<Tensor> bias) {
  check_paged_attention(q, pages, layer, tables, lengths, scale, bias);
  if (bias) bias = with_contiguous_rows(*bias);
  const Tensor queries = with_contiguous_rows(q), page_ids = with_contiguous_rows(tables);
  const Tensor num_positions = torch::stable::contiguous(lengths);
  Tensor attended = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const PagedAttentionArgs args =
      paged_attention_args(queries, pages, layer, page_ids, num_positions, bias, attended, scale);
  check_page_tables(args, tables.size(1), pages.size(0));

  const cpu::PagedAttentionSizes sizes = cpu::paged_attention_sizes(args);
  const auto partials = workspace<float>(sizes.partials);
  const std::int64_t pages_per_thread = rows_per_thread(2 * kPagePositions * args.head_dim, q.scalar_type());
  torch::stable::parallel_for(
      0, sizes.num_pages, pages_per_thread, [&](std::int64_t begin, std::int64_t end) {
        cpu::paged_attention(args, begin, end, partials.get(), workspace<float>(sizes.workspace).get());
      });
  const std::int64_t heads_per_thread = rows_per_thread(args.head_dim, q.scalar_type());
  torch::stable::parallel_for(
      0, args.num_sequences * args.num_heads, heads_per_thread,
      [&](std::int64_t begin, std::int64_t end) { cpu::merge_pieces(args, begin, end, partials.get()); });
  return attended;
}

}  // namespace trimserve
