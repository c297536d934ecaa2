// Ops on rows between attentions: checks, allocation, threads. Kernels are in cpu/.

#include <algorithm>

#include "op_checks.h"
#include "ops.h"

namespace trimserve {

Tensor linear(const Tensor& x, const Tensor& weight) {
  check_linear(x, weight);
  const Tensor rows = with_contiguous_rows(x);
  Tensor output = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  const LinearArgs args{
      .x = rows.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .dtype = kernel_dtype(x.scalar_type()),
      .num_rows = x.size(0),
      .num_outputs = weight.size(0),
      .num_inputs = x.size(1),
      .x_stride = rows.stride(0),
  };
  if (args.num_rows == 0) return output;
  // A thread is worth some bytes of the weight, and fewer of them the more products they take part in.
  const std::int64_t block_bytes = kLinearColumns * args.num_inputs * element_bytes(x.scalar_type());
  const std::int64_t blocks_per_thread = kGrainBytes / (block_bytes * std::min<std::int64_t>(args.num_rows, 16) + 1) + 1;
  const std::int64_t num_blocks = (args.num_outputs + kLinearColumns - 1) / kLinearColumns;
  torch::stable::parallel_for(0, num_blocks, blocks_per_thread,
                              [&](std::int64_t begin, std::int64_t end) { cpu::linear(args, begin, end); });
  return output;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_rms_norm(x, weight, epsilon);
  const Tensor rows = with_contiguous_rows(x), factors = torch::stable::contiguous(weight);
  const bool has_heads = x.dim() == 3;
  Tensor output = has_heads ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)})
                            : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const RmsNormArgs args{
      .x = rows.const_data_ptr(),
      .weight = factors.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .dtype = kernel_dtype(x.scalar_type()),
      .num_heads = has_heads ? x.size(1) : 1,
      .size = weight.size(0),
      .x_stride = rows.stride(0),
      .epsilon = static_cast<float>(epsilon),
  };
  torch::stable::parallel_for(0, x.size(0), rows_per_thread(args.num_heads * args.size, x.scalar_type()),
                              [&](std::int64_t begin, std::int64_t end) { cpu::rms_norm(args, begin, end); });
  return output;
}

void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  check_rotate(heads, cosines, sines);
  const Tensor cos = torch::stable::contiguous(cosines), sin = torch::stable::contiguous(sines);
  const RotateArgs args{
      .heads = heads.mutable_data_ptr(),
      .cosines = static_cast<const float*>(cos.const_data_ptr()),
      .sines = static_cast<const float*>(sin.const_data_ptr()),
      .dtype = kernel_dtype(heads.scalar_type()),
      .num_heads = heads.size(1),
      .head_dim = heads.size(2),
      .row_stride = heads.stride(0),
  };
  torch::stable::parallel_for(0, heads.size(0), rows_per_thread(args.num_heads * args.head_dim, heads.scalar_type()),
                              [&](std::int64_t begin, std::int64_t end) { cpu::rotate(args, begin, end); });
}

}  // namespace trimserve
