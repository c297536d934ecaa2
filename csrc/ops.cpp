// The ops of namespace `trimserve`: schemas, checks, allocation, dispatch. The only code that knows torch.
//
// Every check stands here, once for all devices. Tensors whose rows are strided (views of a fused projection) are
// read in place; any other layout is copied to a contiguous one first.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <new>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace trimserve {
namespace {

DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

std::int64_t element_bytes(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

constexpr std::int64_t kMaxFeatures = std::numeric_limits<std::int32_t>::max();  // kernels may count in int32

constexpr std::int64_t kGrainBytes = 256 * 1024;  // memory traffic that is worth a thread

// --- memory ---

Tensor with_contiguous_rows(const Tensor& tensor) {
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

// --- ops ---

void check_headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale) {
  constexpr const char* kOp = "headwise_scores";
  const ScalarType dtype = q.scalar_type();
  check(is_floating(dtype) && q.dim() == 3, kOp, ": q must be float32, bfloat16 or float16 [T, H, Dh], got ",
        describe(q));
  check(k.dim() == 3 && k.scalar_type() == dtype && k.size(2) == q.size(2), kOp, ": k must be ",
        name_of(dtype), " [N, Hkv, ", q.size(2), "] like q, got ", describe(k));
  check(q.size(1) >= 1 && k.size(1) >= 1 && q.size(1) % k.size(1) == 0, kOp,
        ": H must be a multiple of Hkv, both at least 1, got H=", q.size(1), ", Hkv=", k.size(1));
  check(q.size(2) >= 1, kOp, ": Dh must be at least 1, got 0");
  check(k.size(0) <= kMaxFeatures, kOp, ": N must be at most ", kMaxFeatures, ", got ", k.size(0));
  check_tensor(kOp, "visibility", visibility, ScalarType::Int, "[T, 2]",
               visibility.dim() == 2 && visibility.size(1) == 2);
  check(visibility.size(0) == q.size(0), kOp, ": visibility must have T=", q.size(0), " rows like q, got ",
        visibility.size(0));
  check(std::isfinite(scale), kOp, ": scale must be finite, got ", scale);
}

void check_ranges(const Tensor& visibility, std::int64_t num_features) {
  const auto* ranges = static_cast<const std::int32_t*>(visibility.const_data_ptr());
  for (std::int64_t t = 0; t < visibility.size(0); ++t) {
    const std::int32_t begin = ranges[2 * t], end = ranges[2 * t + 1];
    check(0 <= begin && begin <= end && end <= num_features, "headwise_scores: visibility[", t,
          "] must be a range within [0, ", num_features, "], got [", begin, ", ", end, "]");
  }
}

Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale) {
  check_headwise_scores(q, k, visibility, scale);
  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k);
  const Tensor ranges = torch::stable::contiguous(visibility);
  check_ranges(ranges, k.size(0));

  Tensor scores = torch::stable::new_empty(q, {q.size(1), k.size(0)}, ScalarType::Float);
  const HeadwiseScoresArgs args{
      .q = queries.const_data_ptr(),
      .k = keys.const_data_ptr(),
      .visibility = static_cast<const std::int32_t*>(ranges.const_data_ptr()),
      .scores = static_cast<float*>(scores.mutable_data_ptr()),
      .dtype = kernel_dtype(q.scalar_type()),
      .num_rows = q.size(0),
      .num_features = k.size(0),
      .num_heads = q.size(1),
      .num_kv_heads = k.size(1),
      .head_dim = q.size(2),
      .q_stride = queries.stride(0),
      .k_stride = keys.stride(0),
      .scale = static_cast<float>(scale),
  };
  torch::stable::parallel_for(0, args.num_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    cpu::headwise_scores(args, begin, end, workspace<float>(cpu::headwise_scores_workspace(args)).get());
  });
  return scores;
}

std::vector<Segment> make_segments(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& k,
                                   std::int64_t num_features) {
  constexpr const char* kOp = "headwise_topk";
  check(sizes.size() == k.size(), kOp, ": k must have one entry per segment, got ", k.size(), " for ",
        sizes.size(), " segments");
  std::vector<Segment> segments;
  std::int64_t begin = 0, picks_begin = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    check(sizes[i] >= 0, kOp, ": segments[", i, "] must be at least 0, got ", sizes[i]);
    check(sizes[i] <= num_features - begin, kOp, ": segments must sum to N=", num_features, ", got more");
    const std::int64_t least = std::min<std::int64_t>(sizes[i], 1);
    check(least <= k[i] && k[i] <= sizes[i], kOp, ": k[", i, "] must be in [", least, ", ", sizes[i],
          "] for a segment of ", sizes[i], " features, got ", k[i]);
    segments.push_back({begin, sizes[i], k[i], picks_begin});
    begin += sizes[i];
    picks_begin += k[i];
  }
  check(begin == num_features, kOp, ": segments must sum to N=", num_features, ", got ", begin);
  return segments;
}

Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k) {
  check_tensor("headwise_topk", "scores", scores, ScalarType::Float, "[H, N]", scores.dim() == 2);
  const std::int64_t num_heads = scores.size(0), num_features = scores.size(1);
  const std::vector<Segment> ranges = make_segments(segments, k, num_features);
  const std::int64_t num_picks = ranges.empty() ? 0 : ranges.back().picks_begin + ranges.back().k;
  const std::int64_t longest = segments.empty() ? 0 : *std::max_element(segments.begin(), segments.end());

  const Tensor rows = torch::stable::contiguous(scores);
  Tensor picks = torch::stable::new_empty(scores, {num_heads, num_picks}, ScalarType::Long);
  const HeadwiseTopkArgs args{
      .scores = static_cast<const float*>(rows.const_data_ptr()),
      .picks = static_cast<std::int64_t*>(picks.mutable_data_ptr()),
      .segments = ranges.data(),
      .num_segments = static_cast<std::int64_t>(ranges.size()),
      .num_features = num_features,
      .num_picks = num_picks,
  };
  constexpr std::int64_t kGrain = 16384;  // scores that are worth a thread
  const std::int64_t heads_per_thread = kGrain / std::max<std::int64_t>(num_features, 1) + 1;
  torch::stable::parallel_for(0, num_heads, heads_per_thread, [&](std::int64_t begin, std::int64_t end) {
    cpu::headwise_topk(args, begin, end, workspace<std::uint32_t>(longest).get());
  });
  return picks;
}

void check_indices(const char* op, const char* name, const Tensor& indices, std::int64_t num_features) {
  const auto* values = static_cast<const std::int64_t*>(indices.const_data_ptr());
  for (std::int64_t i = 0; i < indices.numel(); ++i) {
    check(0 <= values[i] && values[i] < num_features, op, ": ", name, " must be in [0, ", num_features,
          "), got ", values[i]);
  }
}

std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features) {
  constexpr const char* kOp = "union_indices";
  check_tensor(kOp, "picks", picks, ScalarType::Long, "[H, K]", picks.dim() == 2);
  check(0 <= num_features && num_features <= kMaxFeatures, kOp, ": num_features must be in [0, ",
        kMaxFeatures, "], got ", num_features);
  const Tensor flat = torch::stable::contiguous(picks);
  check_indices(kOp, "picks", flat, num_features);

  Tensor kept = torch::stable::new_empty(picks, {std::min(picks.numel(), num_features)});
  Tensor num_kept = torch::stable::new_empty(picks, {});
  *static_cast<std::int64_t*>(num_kept.mutable_data_ptr()) = cpu::union_indices(
      static_cast<const std::int64_t*>(flat.const_data_ptr()), flat.numel(), num_features,
      static_cast<std::int64_t*>(kept.mutable_data_ptr()), workspace<std::uint8_t>(num_features).get());
  return {kept, num_kept};
}

void check_gather_kv(const Tensor& features, const Tensor& keys, const Tensor& values, const Tensor& kept) {
  constexpr const char* kOp = "gather_kv";
  const ScalarType dtype = features.scalar_type();
  check(is_floating(dtype) && features.dim() == 2, kOp,
        ": features must be float32, bfloat16 or float16 [N, D], got ", describe(features));
  const auto check_kv = [&](const char* name, const Tensor& tensor) {
    check(tensor.scalar_type() == dtype && tensor.dim() == 3 && tensor.size(0) == features.size(0), kOp, ": ",
          name, " must be ", name_of(dtype), " [", features.size(0), ", Hkv, Dh] like features, got ",
          describe(tensor));
  };
  check_kv("keys", keys);
  check_kv("values", values);
  check(keys.size(1) == values.size(1) && keys.size(2) == values.size(2), kOp,
        ": values must have the shape of keys, got ", describe(values), " and ", describe(keys));
  check_tensor(kOp, "kept", kept, ScalarType::Long, "[M]", kept.dim() == 1);
}

// What to copy from the rows of `source` to those of `result`, which is contiguous and has the same row
// shape.
GatherRows rows_of(const Tensor& source, const Tensor& result) {
  std::int64_t row_bytes = element_bytes(source.scalar_type());
  const std::int64_t stride_bytes = source.stride(0) * row_bytes;
  for (std::int64_t i = 1; i < source.dim(); ++i) row_bytes *= source.size(i);
  return {static_cast<const std::byte*>(source.const_data_ptr()),
          static_cast<std::byte*>(result.mutable_data_ptr()), row_bytes, stride_bytes};
}

std::tuple<Tensor, Tensor, Tensor> gather_kv(const Tensor& features, const Tensor& keys, const Tensor& values,
                                             const Tensor& kept) {
  check_gather_kv(features, keys, values, kept);
  const Tensor indices = torch::stable::contiguous(kept);
  check_indices("gather_kv", "kept", indices, features.size(0));

  const std::int64_t num_kept = kept.size(0);
  const Tensor sources[] = {with_contiguous_rows(features), with_contiguous_rows(keys),
                            with_contiguous_rows(values)};
  const Tensor results[] = {torch::stable::new_empty(features, {num_kept, features.size(1)}),
                            torch::stable::new_empty(keys, {num_kept, keys.size(1), keys.size(2)}),
                            torch::stable::new_empty(values, {num_kept, values.size(1), values.size(2)})};
  const GatherRows rows[] = {rows_of(sources[0], results[0]), rows_of(sources[1], results[1]),
                             rows_of(sources[2], results[2])};
  const std::int64_t bytes_per_feature = rows[0].row_bytes + rows[1].row_bytes + rows[2].row_bytes;
  const std::int64_t rows_per_thread = kGrainBytes / std::max<std::int64_t>(bytes_per_feature, 1) + 1;
  torch::stable::parallel_for(0, num_kept, rows_per_thread, [&](std::int64_t begin, std::int64_t end) {
    cpu::gather_kv(rows, 3, static_cast<const std::int64_t*>(indices.const_data_ptr()), begin, end);
  });
  return {results[0], results[1], results[2]};
}

void check_pages(const char* op, const Tensor& pages, std::int64_t layer) {
  check(is_floating(pages.scalar_type()) && pages.dim() == 6 && pages.size(2) == 2 &&
            pages.size(4) == kPagePositions,
        op, ": pages must be float32, bfloat16 or float16 [P, G, 2, Hkv, ", kPagePositions, ", Dh], got ",
        describe(pages));
  check(pages.is_contiguous(), op, ": pages must be contiguous");
  check(0 <= layer && layer < pages.size(1), op, ": layer must be in [0, ", pages.size(1), "), got ", layer);
}

void check_write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                    const Tensor& slots) {
  constexpr const char* kOp = "write_kv";
  check_pages(kOp, pages, layer);
  check_tensor(kOp, "slots", slots, ScalarType::Long, "[R]", slots.dim() == 1);
  const auto check_rows = [&](const char* name, const Tensor& rows) {
    check(rows.scalar_type() == pages.scalar_type() && rows.dim() == 3 && rows.size(0) == slots.size(0) &&
              rows.size(1) == pages.size(3) && rows.size(2) == pages.size(5),
          kOp, ": ", name, " must be ", name_of(pages.scalar_type()), " [", slots.size(0), ", ",
          pages.size(3), ", ", pages.size(5), "] like slots and pages, got ", describe(rows));
  };
  check_rows("keys", keys);
  check_rows("values", values);
}

Tensor with_contiguous_heads(const Tensor& rows) {
  return rows.stride(2) == 1 || rows.size(2) == 1 ? rows : torch::stable::contiguous(rows);
}

void write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
              const Tensor& slots) {
  check_write_kv(pages, layer, keys, values, slots);
  const Tensor indices = torch::stable::contiguous(slots);
  check_indices("write_kv", "slots", indices, pages.size(0) * kPagePositions);

  const std::int64_t item_bytes = element_bytes(pages.scalar_type());
  const Tensor key_rows = with_contiguous_heads(keys), value_rows = with_contiguous_heads(values);
  const auto source_of = [&](const Tensor& rows) {
    return KvRows{static_cast<const std::byte*>(rows.const_data_ptr()), rows.stride(0) * item_bytes,
                  rows.stride(1) * item_bytes};
  };
  const std::int64_t layer_bytes = pages.stride(1) * item_bytes;
  const WriteKvArgs args{
      .keys = source_of(key_rows),
      .values = source_of(value_rows),
      .pages = static_cast<std::byte*>(pages.mutable_data_ptr()) + layer * layer_bytes,
      .slots = static_cast<const std::int64_t*>(indices.const_data_ptr()),
      .num_kv_heads = pages.size(3),
      .head_bytes = pages.size(5) * item_bytes,
      .page_stride_bytes = pages.size(1) * layer_bytes,
  };
  const std::int64_t row_bytes = 2 * args.num_kv_heads * args.head_bytes;
  const std::int64_t rows_per_thread = kGrainBytes / std::max<std::int64_t>(row_bytes, 1) + 1;
  torch::stable::parallel_for(0, slots.size(0), rows_per_thread,
                              [&](std::int64_t begin, std::int64_t end) { cpu::write_kv(args, begin, end); });
}

void check_paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                           const Tensor& lengths, double scale, const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "paged_attention";
  check_pages(kOp, pages, layer);
  check(q.scalar_type() == pages.scalar_type() && q.dim() == 3 && q.size(2) == pages.size(5), kOp,
        ": q must be ", name_of(pages.scalar_type()), " [B, H, ", pages.size(5), "] like pages, got ",
        describe(q));
  check(q.size(1) >= 1 && pages.size(3) >= 1 && q.size(1) % pages.size(3) == 0, kOp,
        ": H must be a multiple of Hkv, both at least 1, got H=", q.size(1), ", Hkv=", pages.size(3));
  check(q.size(2) >= 1, kOp, ": Dh must be at least 1, got 0");
  check_tensor(kOp, "tables", tables, ScalarType::Int, "[B, max_pages]", tables.dim() == 2);
  check(tables.size(0) == q.size(0), kOp, ": tables must have B=", q.size(0), " rows like q, got ",
        tables.size(0));
  check_tensor(kOp, "lengths", lengths, ScalarType::Int, "[B]", lengths.dim() == 1);
  check(lengths.size(0) == q.size(0), kOp, ": lengths must have B=", q.size(0), " entries like q, got ",
        lengths.size(0));
  check(std::isfinite(scale), kOp, ": scale must be finite, got ", scale);
  if (!bias) return;
  check_tensor(kOp, "bias", *bias, ScalarType::Float, "[B, max_pages * 16]", bias->dim() == 2);
  check(bias->size(0) == q.size(0) && bias->size(1) == tables.size(1) * kPagePositions, kOp, ": bias must be [B=",
        q.size(0), ", max_pages * 16=", tables.size(1) * kPagePositions, "], got ", describe(*bias));
}

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

Tensor paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                       const Tensor& lengths, double scale, std::optional<Tensor> bias) {
  check_paged_attention(q, pages, layer, tables, lengths, scale, bias);
  if (bias) bias = with_contiguous_rows(*bias);
  const Tensor queries = with_contiguous_rows(q), page_ids = with_contiguous_rows(tables);
  const Tensor num_positions = torch::stable::contiguous(lengths);
  Tensor attended = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const std::int64_t item_bytes = element_bytes(q.scalar_type());
  const PagedAttentionArgs args{
      .q = queries.const_data_ptr(),
      .pages = static_cast<const std::byte*>(pages.const_data_ptr()) + layer * pages.stride(1) * item_bytes,
      .tables = static_cast<const std::int32_t*>(page_ids.const_data_ptr()),
      .lengths = static_cast<const std::int32_t*>(num_positions.const_data_ptr()),
      .bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      .attended = attended.mutable_data_ptr(),
      .dtype = kernel_dtype(q.scalar_type()),
      .num_sequences = q.size(0),
      .num_heads = q.size(1),
      .num_kv_heads = pages.size(3),
      .head_dim = q.size(2),
      .q_stride = queries.stride(0),
      .table_stride = page_ids.stride(0),
      .page_stride = pages.size(1) * pages.stride(1),
      .bias_stride = bias ? bias->stride(0) : 0,
      .scale = static_cast<float>(scale),
  };
  check_page_tables(args, tables.size(1), pages.size(0));

  const cpu::PagedAttentionSizes sizes = cpu::paged_attention_sizes(args);
  const auto partials = workspace<float>(sizes.partials);
  const std::int64_t pages_per_thread = kGrainBytes / (2 * kPagePositions * args.head_dim * item_bytes) + 1;
  torch::stable::parallel_for(
      0, sizes.num_pages, pages_per_thread, [&](std::int64_t begin, std::int64_t end) {
        cpu::paged_attention(args, begin, end, partials.get(), workspace<float>(sizes.workspace).get());
      });
  cpu::merge_pieces(args, partials.get());
  return attended;
}

}  // namespace
}  // namespace trimserve

STABLE_TORCH_LIBRARY(trimserve, m) {
  m.def("headwise_scores(Tensor q, Tensor k, Tensor visibility, float scale) -> Tensor");
  m.def("headwise_topk(Tensor scores, int[] segments, int[] k) -> Tensor");
  m.def("union_indices(Tensor picks, int num_features) -> (Tensor kept, Tensor num_kept)");
  m.def(
      "gather_kv(Tensor features, Tensor keys, Tensor values, Tensor kept) -> "
      "(Tensor features, Tensor keys, Tensor values)");
  m.def("write_kv(Tensor(a!) pages, int layer, Tensor keys, Tensor values, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor pages, int layer, Tensor tables, Tensor lengths, float scale, "
      "Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(trimserve, CPU, m) {
  m.impl("headwise_scores", TORCH_BOX(&trimserve::headwise_scores));
  m.impl("headwise_topk", TORCH_BOX(&trimserve::headwise_topk));
  m.impl("union_indices", TORCH_BOX(&trimserve::union_indices));
  m.impl("gather_kv", TORCH_BOX(&trimserve::gather_kv));
  m.impl("write_kv", TORCH_BOX(&trimserve::write_kv));
  m.impl("paged_attention", TORCH_BOX(&trimserve::paged_attention));
}
