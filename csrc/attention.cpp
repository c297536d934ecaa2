// CPU op of attention over many rows: checks, allocation, threads. The kernel is in cpu/.

#include "op_args.h"
#include "op_checks.h"
#include "ops.h"

namespace trimserve {

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& visibility, double scale, std::optional<Tensor> bias) {
  check_attention(q, k, v, visibility, scale, bias);
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k),
               values = with_contiguous_rows(v), ranges = torch::stable::contiguous(visibility);
  check_ranges("attention", ranges, k.size(0));
  Tensor attended = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor log_sums = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  const AttentionArgs args = attention_args(queries, keys, values, ranges, bias, attended, log_sums, scale);
  const cpu::AttentionSizes sizes = cpu::attention_sizes(args);
  torch::stable::parallel_for(0, sizes.num_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    cpu::attention(args, begin, end, workspace<float>(sizes.workspace).get());
  });
  return {attended, log_sums};
}

}  // namespace trimserve
