// CUDA ops of a layer outside attention: checks, allocation, launches.

#include "../op_args.h"
#include "../op_checks.h"
#include "on_device.h"
#include "ops.h"

namespace trimserve::cuda {

Tensor silu_gate(const Tensor& gate_up, std::optional<Tensor> counts) {
  check_silu_gate(gate_up, counts);
  const OnDevice device = on_device(gate_up);
  if (counts) counts = torch::stable::contiguous(*counts);
  const Tensor rows = with_contiguous_rows(gate_up);
  Tensor output = torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  silu_gate(silu_gate_args(rows, counts, output), rows.size(0), device.stream);
  return output;
}

void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  check_rotate(heads, cosines, sines);
  const OnDevice device = on_device(heads);
  const Tensor cos = torch::stable::contiguous(cosines), sin = torch::stable::contiguous(sines);
  rotate(rotate_args(heads, cos, sin), heads.size(0), device.stream);
}

}  // namespace trimserve::cuda
