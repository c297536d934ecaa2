// CUDA ops that choose which visual features later layers keep: checks, allocation, launches.

#include "../op_args.h"
#include "../op_checks.h"
#include "on_device.h"
#include "ops.h"

namespace trimserve::cuda {
namespace {

// kept and num_kept of what `mark` sets in a bitmap of the features.
template <typename Mark>
std::tuple<Tensor, Tensor> list(const Tensor& like, std::int64_t num_features, std::int64_t size,
                                Stream stream, const Mark& mark) {
  Tensor bitmap = torch::stable::new_empty(like, {num_words(num_features)}, ScalarType::Int);
  auto* const words = static_cast<std::uint32_t*>(bitmap.mutable_data_ptr());
  mark(words);
  Tensor kept = torch::stable::new_empty(like, {size}, ScalarType::Long);
  Tensor num_kept = torch::stable::new_empty(like, {}, ScalarType::Long);
  list_kept(words, num_features, static_cast<std::int64_t*>(kept.mutable_data_ptr()), size,
            static_cast<std::int64_t*>(num_kept.mutable_data_ptr()), stream);
  return {kept, num_kept};
}

}  // namespace

Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                       std::optional<Tensor> log_sums) {
  check_headwise_scores(q, k, visibility, scale, log_sums);
  const OnDevice device = on_device(q);
  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k);
  const Tensor ranges = torch::stable::contiguous(visibility);
  Tensor scores = torch::stable::new_empty(q, {q.size(1), k.size(0)}, ScalarType::Float);
  const HeadwiseScoresArgs args = headwise_scores_args(queries, keys, ranges, std::nullopt, scores, scale);
  Tensor workspace = torch::stable::new_empty(q, {headwise_scores_workspace(args)}, ScalarType::Float);
  headwise_scores(args, static_cast<float*>(workspace.mutable_data_ptr()), device.stream);
  return scores;
}

Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k) {
  const Selection selection = make_selection("headwise_topk", scores, segments, k);
  const OnDevice device = on_device(scores);
  const Tensor rows = torch::stable::contiguous(scores);
  Tensor picks = torch::stable::new_empty(scores, {scores.size(0), selection.num_picks}, ScalarType::Long);
  headwise_topk(headwise_topk_args(rows, selection, picks), scores.size(0), device.stream);
  return picks;
}

std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features) {
  check_union_indices(picks, num_features);
  const OnDevice device = on_device(picks);
  const Tensor flat = torch::stable::contiguous(picks);
  const std::int64_t num_picks = flat.numel();
  return list(picks, num_features, std::min(num_picks, num_features), device.stream,
              [&](std::uint32_t* bitmap) {
                mark_picks(static_cast<const std::int64_t*>(flat.const_data_ptr()), num_picks, num_features,
                           bitmap, device.stream);
              });
}

std::tuple<Tensor, Tensor> select_features(const Tensor& scores, std::vector<std::int64_t> segments,
                                           std::vector<std::int64_t> k) {
  const Selection selection = make_selection("select_features", scores, segments, k);
  const std::int64_t num_heads = scores.size(0), num_features = scores.size(1);
  const OnDevice device = on_device(scores);
  const Tensor rows = torch::stable::contiguous(scores);
  const auto num_segments = static_cast<std::int64_t>(selection.segments.size());
  Tensor cuts = torch::stable::new_empty(scores, {num_heads, num_segments}, ScalarType::Long);
  static_assert(sizeof(Cut) == sizeof(std::int64_t));
  const SelectFeaturesArgs args{
      .scores = static_cast<const float*>(rows.const_data_ptr()),
      .cuts = static_cast<Cut*>(cuts.mutable_data_ptr()),
      .is_kept = nullptr,
      .segments = selection.segments.data(),
      .num_segments = num_segments,
      .num_heads = num_heads,
      .num_features = num_features,
  };
  const std::int64_t size = std::min(num_heads * selection.num_picks, num_features);
  return list(scores, num_features, size, device.stream,
              [&](std::uint32_t* bitmap) { mark_kept(args, bitmap, device.stream); });
}

}  // namespace trimserve::cuda
