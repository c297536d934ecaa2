// CPU ops that choose which visual features later layers keep: checks, allocation, threads. Kernels are in cpu/.

#include <algorithm>

#include "op_args.h"
#include "op_checks.h"
#include "ops.h"

namespace trimserve {
namespace {

constexpr std::int64_t kGrainScores = 16384;  // scores that are worth a thread

// Calls body with ranges of the heads of scores [H, N].
template <typename Body>
void for_heads(const Tensor& scores, const Body& body) {
  const std::int64_t heads_per_thread = kGrainScores / std::max<std::int64_t>(scores.size(1), 1) + 1;
  torch::stable::parallel_for(0, scores.size(0), heads_per_thread, body);
}

std::tuple<Tensor, Tensor> list_kept(const Tensor& like, const std::uint8_t* is_kept,
                                     std::int64_t num_features, std::int64_t size) {
  Tensor kept = torch::stable::new_empty(like, {size}, ScalarType::Long);
  Tensor num_kept = torch::stable::new_empty(like, {}, ScalarType::Long);
  *static_cast<std::int64_t*>(num_kept.mutable_data_ptr()) =
      cpu::list_kept(is_kept, num_features, static_cast<std::int64_t*>(kept.mutable_data_ptr()), size);
  return {kept, num_kept};
}

}  // namespace

Tensor headwise_scores(const Tensor& q, const Tensor& k, const Tensor& visibility, double scale,
                       std::optional<Tensor> log_sums) {
  check_headwise_scores(q, k, visibility, scale, log_sums);
  if (log_sums) log_sums = torch::stable::contiguous(*log_sums);
  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k);
  const Tensor ranges = torch::stable::contiguous(visibility);
  check_ranges("headwise_scores", ranges, k.size(0));

  Tensor scores = torch::stable::new_empty(q, {q.size(1), k.size(0)}, ScalarType::Float);
  const HeadwiseScoresArgs args = headwise_scores_args(queries, keys, ranges, log_sums, scores, scale);
  torch::stable::parallel_for(0, args.num_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    cpu::headwise_scores(args, begin, end, workspace<float>(cpu::headwise_scores_workspace(args)).get());
  });
  return scores;
}

Tensor headwise_topk(const Tensor& scores, std::vector<std::int64_t> segments, std::vector<std::int64_t> k) {
  const Selection selection = make_selection("headwise_topk", scores, segments, k);

  const Tensor rows = torch::stable::contiguous(scores);
  Tensor picks = torch::stable::new_empty(scores, {scores.size(0), selection.num_picks}, ScalarType::Long);
  const HeadwiseTopkArgs args = headwise_topk_args(rows, selection, picks);
  for_heads(scores, [&](std::int64_t begin, std::int64_t end) {
    cpu::headwise_topk(args, begin, end, workspace<std::uint32_t>(selection.longest).get());
  });
  return picks;
}

std::tuple<Tensor, Tensor> union_indices(const Tensor& picks, std::int64_t num_features) {
  check_union_indices(picks, num_features);
  const Tensor flat = torch::stable::contiguous(picks);
  check_indices("union_indices", "picks", flat, num_features);

  const auto is_kept = workspace<std::uint8_t>(num_features);
  cpu::mark_picks(static_cast<const std::int64_t*>(flat.const_data_ptr()), flat.numel(), num_features,
                  is_kept.get());
  return list_kept(picks, is_kept.get(), num_features, std::min(picks.numel(), num_features));
}

std::tuple<Tensor, Tensor> select_features(const Tensor& scores, std::vector<std::int64_t> segments,
                                           std::vector<std::int64_t> k) {
  const Selection selection = make_selection("select_features", scores, segments, k);
  const std::int64_t num_heads = scores.size(0), num_features = scores.size(1);

  const Tensor rows = torch::stable::contiguous(scores);
  const auto num_segments = static_cast<std::int64_t>(selection.segments.size());
  const auto cuts = workspace<Cut>(num_heads * num_segments);
  const auto is_kept = workspace<std::uint8_t>(num_features);
  const SelectFeaturesArgs args{
      .scores = static_cast<const float*>(rows.const_data_ptr()),
      .cuts = cuts.get(),
      .is_kept = is_kept.get(),
      .segments = selection.segments.data(),
      .num_segments = num_segments,
      .num_heads = num_heads,
      .num_features = num_features,
  };
  for_heads(scores, [&](std::int64_t begin, std::int64_t end) {
    cpu::make_cuts(args, begin, end, workspace<std::uint32_t>(selection.longest).get());
  });
  const std::int64_t features_per_thread = kGrainScores / std::max<std::int64_t>(num_heads, 1) + 1;
  torch::stable::parallel_for(
      0, num_features, features_per_thread,
      [&](std::int64_t begin, std::int64_t end) { cpu::mark_kept(args, begin, end); });
  return list_kept(scores, is_kept.get(), num_features,
                   std::min(num_heads * selection.num_picks, num_features));
}

}  // namespace trimserve
