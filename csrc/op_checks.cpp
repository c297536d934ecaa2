#include "op_checks.h"

#include <algorithm>
#include <cmath>

namespace trimserve {

namespace {

// Queries, keys and what each row sees of the keys.
void check_seeing_rows(const char* op, const Tensor& q, const Tensor& k, const Tensor& visibility,
                       double scale) {
  const ScalarType dtype = q.scalar_type();
  check(is_floating(dtype) && q.dim() == 3, op, ": q must be float32, bfloat16 or float16 [T, H, Dh], got ",
        describe(q));
  check(k.dim() == 3 && k.scalar_type() == dtype && k.size(2) == q.size(2), op, ": k must be ",
        name_of(dtype), " [N, Hkv, ", q.size(2), "] like q, got ", describe(k));
  check(q.size(1) >= 1 && k.size(1) >= 1 && q.size(1) % k.size(1) == 0, op,
        ": H must be a multiple of Hkv, both at least 1, got H=", q.size(1), ", Hkv=", k.size(1));
  check(q.size(2) >= 1, op, ": Dh must be at least 1, got 0");
  check(k.size(0) <= kMaxFeatures, op, ": N must be at most ", kMaxFeatures, ", got ", k.size(0));
  check_tensor(op, "visibility", visibility, ScalarType::Int, "[T, 2]",
               visibility.dim() == 2 && visibility.size(1) == 2);
  check(visibility.size(0) == q.size(0), op, ": visibility must have T=", q.size(0), " rows like q, got ",
        visibility.size(0));
  check(std::isfinite(scale), op, ": scale must be finite, got ", scale);
}

}  // namespace

void check_headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                           const std::optional<Tensor>& log_sums) {
  constexpr const char* kOp = "headwise_scores";
  check_devices(kOp, {"q", q}, {{"k", k}, {"visibility", visibility}});
  check_seeing_rows(kOp, q, k, visibility, scale);
  if (!log_sums) return;
  check_devices(kOp, {"q", q}, {{"log_sums", *log_sums}});
  check_tensor(kOp, "log_sums", *log_sums, ScalarType::Float, "[H, T] like q",
               log_sums->dim() == 2 && log_sums->size(0) == q.size(1) && log_sums->size(1) == q.size(0));
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& visibility,
                     double scale, const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "attention";
  check_devices(kOp, {"q", q}, {{"k", k}, {"v", v}, {"visibility", visibility}});
  check_seeing_rows(kOp, q, k, visibility, scale);
  check_tensor(kOp, "v", v, q.scalar_type(), "[N, Hkv, Dh] like k",
               v.dim() == 3 && v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2));
  if (!bias) return;
  check_devices(kOp, {"q", q}, {{"bias", *bias}});
  check_tensor(kOp, "bias", *bias, ScalarType::Float, "[N] like k",
               bias->dim() == 1 && bias->size(0) == k.size(0));
}

void check_ranges(const char* op, const Tensor& visibility, std::int64_t num_features) {
  const auto* ranges = static_cast<const std::int32_t*>(visibility.const_data_ptr());
  for (std::int64_t t = 0; t < visibility.size(0); ++t) {
    const std::int32_t begin = ranges[2 * t], end = ranges[2 * t + 1];
    check(0 <= begin && begin <= end && end <= num_features, op, ": visibility[", t,
          "] must be a range within [0, ", num_features, "], got [", begin, ", ", end, "]");
  }
}

namespace {

std::vector<Segment> make_segments(const char* op, const std::vector<std::int64_t>& sizes,
                                   const std::vector<std::int64_t>& k, std::int64_t num_features) {
  check(num_features <= kMaxFeatures, op, ": N must be at most ", kMaxFeatures, ", got ", num_features);
  check(sizes.size() == k.size(), op, ": k must have one entry per segment, got ", k.size(), " for ",
        sizes.size(), " segments");
  std::vector<Segment> segments;
  std::int64_t begin = 0, picks_begin = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    check(sizes[i] >= 0, op, ": segments[", i, "] must be at least 0, got ", sizes[i]);
    check(sizes[i] <= num_features - begin, op, ": segments must sum to N=", num_features, ", got more");
    const std::int64_t least = std::min<std::int64_t>(sizes[i], 1);
    check(least <= k[i] && k[i] <= sizes[i], op, ": k[", i, "] must be in [", least, ", ", sizes[i],
          "] for a segment of ", sizes[i], " features, got ", k[i]);
    segments.push_back({begin, sizes[i], k[i], picks_begin});
    begin += sizes[i];
    picks_begin += k[i];
  }
  check(begin == num_features, op, ": segments must sum to N=", num_features, ", got ", begin);
  return segments;
}

}  // namespace

Selection make_selection(const char* op, const Tensor& scores, const std::vector<std::int64_t>& sizes,
                         const std::vector<std::int64_t>& k) {
  check_tensor(op, "scores", scores, ScalarType::Float, "[H, N]", scores.dim() == 2);
  Selection selection{make_segments(op, sizes, k, scores.size(1)), 0, 0};
  for (const Segment& segment : selection.segments) {
    selection.num_picks += segment.k;
    selection.longest = std::max(selection.longest, segment.size);
  }
  return selection;
}

void check_union_indices(const Tensor& picks, std::int64_t num_features) {
  constexpr const char* kOp = "union_indices";
  check_tensor(kOp, "picks", picks, ScalarType::Long, "[H, K]", picks.dim() == 2);
  check(0 <= num_features && num_features <= kMaxFeatures, kOp, ": num_features must be in [0, ",
        kMaxFeatures, "], got ", num_features);
}

void check_pages(const char* op, const Tensor& pages, std::int64_t layer) {
  const bool is_int8 = pages.scalar_type() == ScalarType::Char && pages.is_cpu();
  check((is_floating(pages.scalar_type()) || is_int8) && pages.dim() == 6 && pages.size(2) == 2 &&
            pages.size(4) == kPagePositions,
        op, ": pages must be float32, bfloat16 or float16 [P, G, 2, Hkv, ", kPagePositions,
        ", Dh], or int8 [P, G, 2, Hkv, ", kPagePositions, ", Dh + ", kScaleBytes, "] on a CPU, got ",
        describe(pages));
  check(!is_int8 || pages.size(5) >= kScaleBytes, op, ": pages of int8 must have rows of at least ",
        kScaleBytes, ", got ", pages.size(5));
  check(pages.is_contiguous(), op, ": pages must be contiguous");
  check(0 <= layer && layer < pages.size(1), op, ": layer must be in [0, ", pages.size(1), "), got ", layer);
}

std::int64_t page_head_dim(const Tensor& pages) {
  return pages.size(5) - (pages.scalar_type() == ScalarType::Char ? kScaleBytes : 0);
}

namespace {

// What is written to pages or compared with them has their dtype; int8 pages take any floats.
bool fits_pages(ScalarType dtype, const Tensor& pages) {
  return pages.scalar_type() == ScalarType::Char ? is_floating(dtype) : dtype == pages.scalar_type();
}

const char* fitting_name(const Tensor& pages) {
  return pages.scalar_type() == ScalarType::Char ? "float32, bfloat16 or float16"
                                                 : name_of(pages.scalar_type());
}

// Keys or values that go to pages; `like` names what their shape comes from.
void check_kv_rows(const char* op, const char* name, const Tensor& rows, std::int64_t num_rows,
                   const Tensor& pages, const char* like) {
  check(fits_pages(rows.scalar_type(), pages) && rows.dim() == 3 && rows.size(0) == num_rows &&
            rows.size(1) == pages.size(3) && rows.size(2) == page_head_dim(pages),
        op, ": ", name, " must be ", fitting_name(pages), " [", num_rows, ", ", pages.size(3), ", ",
        page_head_dim(pages), "] like ", like, ", got ", describe(rows));
}

void check_same_dtype(const char* op, const Tensor& keys, const Tensor& values) {
  check(keys.scalar_type() == values.scalar_type(), op, ": values must be ", name_of(keys.scalar_type()),
        " like keys, got ", name_of(values.scalar_type()));
}

}  // namespace

void check_write_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                    const Tensor& slots) {
  constexpr const char* kOp = "write_kv";
  check_devices(kOp, {"pages", pages}, {{"keys", keys}, {"values", values}, {"slots", slots}});
  check_pages(kOp, pages, layer);
  check_tensor(kOp, "slots", slots, ScalarType::Long, "[R]", slots.dim() == 1);
  check_kv_rows(kOp, "keys", keys, slots.size(0), pages, "slots and pages");
  check_kv_rows(kOp, "values", values, slots.size(0), pages, "slots and pages");
  check_same_dtype(kOp, keys, values);
}

void check_gather_kv(const Tensor& pages, std::int64_t layer, const Tensor& keys, const Tensor& values,
                     const Tensor& kept, const Tensor& slots) {
  constexpr const char* kOp = "gather_kv";
  check_devices(kOp, {"pages", pages},
                {{"keys", keys}, {"values", values}, {"kept", kept}, {"slots", slots}});
  check_pages(kOp, pages, layer);
  check(keys.dim() == 3, kOp, ": keys must be [N, Hkv, Dh], got ", describe(keys));
  check_kv_rows(kOp, "keys", keys, keys.size(0), pages, "pages");
  check_kv_rows(kOp, "values", values, keys.size(0), pages, "keys and pages");
  check_same_dtype(kOp, keys, values);
  check_tensor(kOp, "kept", kept, ScalarType::Long, "[M]", kept.dim() == 1);
  check_tensor(kOp, "slots", slots, ScalarType::Long, "[M]", slots.dim() == 1);
  check(slots.size(0) == kept.size(0), kOp, ": slots must have M=", kept.size(0), " entries like kept, got ",
        slots.size(0));
}

void check_paged_attention(const Tensor& q, const Tensor& pages, std::int64_t layer, const Tensor& tables,
                           const Tensor& lengths, double scale, const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "paged_attention";
  check_devices(kOp, {"q", q}, {{"pages", pages}, {"tables", tables}, {"lengths", lengths}});
  check_pages(kOp, pages, layer);
  check(fits_pages(q.scalar_type(), pages) && q.dim() == 3 && q.size(2) == page_head_dim(pages), kOp,
        ": q must be ", fitting_name(pages), " [B, H, ", page_head_dim(pages), "] like pages, got ",
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
  check_devices(kOp, {"q", q}, {{"bias", *bias}});
  check_tensor(kOp, "bias", *bias, ScalarType::Float, "[B, max_pages * 16]", bias->dim() == 2);
  check(bias->size(0) == q.size(0) && bias->size(1) == tables.size(1) * kPagePositions, kOp,
        ": bias must be [B=", q.size(0), ", max_pages * 16=", tables.size(1) * kPagePositions, "], got ",
        describe(*bias));
}

namespace {

constexpr std::int64_t kInt4Groups[] = {32, 64, 128};

std::int64_t ceil_of(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }

}  // namespace

std::int64_t int4_group(std::int64_t num_inputs, std::int64_t num_groups) {
  for (const std::int64_t group : kInt4Groups) {
    if (ceil_of(num_inputs, group) == num_groups) return group;
  }
  return 0;
}

std::int64_t linear_columns(ScalarType stored, std::int64_t num_inputs) {
  return stored == ScalarType::Byte ? ceil_of(num_inputs, kInt4Unit) * kInt4UnitBytes : num_inputs;
}

void check_linear_scales(const char* op, const std::string& name, const Tensor& scales, const Tensor& weight,
                         std::int64_t num_inputs) {
  const std::int64_t num_outputs = weight.size(0);
  if (weight.scalar_type() == ScalarType::Byte) {
    check(is_floating(scales.scalar_type()) && scales.dim() == 2 && scales.size(0) == num_outputs &&
              int4_group(num_inputs, scales.size(1)) > 0,
          op, ": ", name, " must be float32, bfloat16 or float16 [", num_outputs,
          ", groups] of an int4 weight, one for each 32, 64 or 128 of ", num_inputs, " inputs, got ",
          describe(scales));
  } else {
    check(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == num_outputs, op,
          ": ", name, " must be float32 [", num_outputs, "] of an int8 weight, got ", describe(scales));
  }
}

void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales) {
  constexpr const char* kOp = "linear";
  check_devices(kOp, {"x", x}, {{"weight", weight}});
  check(is_floating(x.scalar_type()) && x.dim() == 2, kOp,
        ": x must be float32, bfloat16 or float16 [R, K], got ", describe(x));
  const std::int64_t num_inputs = x.size(1);
  const bool is_int4 = scales && weight.scalar_type() == ScalarType::Byte;
  const ScalarType stored = is_int4 ? ScalarType::Byte : scales ? ScalarType::Char : x.scalar_type();
  check_tensor(kOp, "weight", weight, stored, is_int4 ? "[N, 16 * ceil(K / 32)] like x" : "[N, K] like x",
               weight.dim() == 2 && weight.size(1) == linear_columns(stored, num_inputs));
  check(weight.is_contiguous(), kOp, ": weight must be contiguous");
  if (!scales) return;
  check_devices(kOp, {"x", x}, {{"scales", *scales}});
  check_linear_scales(kOp, "scales", *scales, weight, num_inputs);
}

void check_rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  constexpr const char* kOp = "rms_norm";
  check_devices(kOp, {"x", x}, {{"weight", weight}});
  check(is_floating(x.scalar_type()) && (x.dim() == 2 || x.dim() == 3), kOp,
        ": x must be float32, bfloat16 or float16 [R, K] or [R, H, K], got ", describe(x));
  check_tensor(kOp, "weight", weight, x.scalar_type(), "[K] like x",
               weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1));
  check(epsilon >= 0 && std::isfinite(epsilon), kOp, ": epsilon must be finite and at least 0, got ",
        epsilon);
}

void check_silu_gate(const Tensor& gate_up, const std::optional<Tensor>& counts) {
  constexpr const char* kOp = "silu_gate";
  check(is_floating(gate_up.scalar_type()) && gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, kOp,
        ": gate_up must be float32, bfloat16 or float16 [R, 2 I], got ", describe(gate_up));
  if (!counts) return;
  check_devices(kOp, {"gate_up", gate_up}, {{"counts", *counts}});
  check(counts->scalar_type() == ScalarType::Int && counts->dim() == 1 && counts->size(0) == gate_up.size(0),
        kOp, ": counts must be int32 [", gate_up.size(0), "] like gate_up, got ", describe(*counts));
}

namespace {

void check_heads_and_angles(const char* op, const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  check(is_floating(heads.scalar_type()) && heads.dim() == 3 && heads.size(2) % 2 == 0, op,
        ": heads must be float32, bfloat16 or float16 [R, H, Dh] with Dh even, got ", describe(heads));
  check(heads.numel() == 0 ||
            (heads.stride(2) == 1 && (heads.size(1) == 1 || heads.stride(1) == heads.size(2))),
        op, ": heads must be contiguous within a row");
  const auto check_angles = [&](const char* name, const Tensor& angles) {
    check(angles.scalar_type() == ScalarType::Float && angles.dim() == 2 && angles.size(0) == heads.size(0) &&
              angles.size(1) == heads.size(2) / 2,
          op, ": ", name, " must be float32 [", heads.size(0), ", ", heads.size(2) / 2, "] like heads, got ",
          describe(angles));
  };
  check_angles("cosines", cosines);
  check_angles("sines", sines);
}

}  // namespace

void check_rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  constexpr const char* kOp = "rotate";
  check_devices(kOp, {"heads", heads}, {{"cosines", cosines}, {"sines", sines}});
  check_heads_and_angles(kOp, heads, cosines, sines);
}

void check_rotate_write_kv(const Tensor& heads, const Tensor& cosines, const Tensor& sines,
                           const Tensor& pages, std::int64_t layer, const Tensor& slots) {
  constexpr const char* kOp = "rotate_write_kv";
  check_devices(kOp, {"heads", heads},
                {{"cosines", cosines}, {"sines", sines}, {"pages", pages}, {"slots", slots}});
  check_heads_and_angles(kOp, heads, cosines, sines);
  check_pages(kOp, pages, layer);
  check(fits_pages(heads.scalar_type(), pages) && heads.size(2) == page_head_dim(pages), kOp,
        ": heads must be ", fitting_name(pages), " [R, H + 2 Hkv, ", page_head_dim(pages),
        "] like pages, got ", describe(heads));
  check(heads.size(1) >= 2 * pages.size(3), kOp, ": heads must have at least 2 Hkv=", 2 * pages.size(3),
        " heads, keys and values of pages, got ", heads.size(1));
  check_tensor(kOp, "slots", slots, ScalarType::Long, "[R]", slots.dim() == 1);
  check(slots.size(0) == heads.size(0), kOp, ": slots must have R=", heads.size(0),
        " entries like heads, got ", slots.size(0));
}

}  // namespace trimserve
