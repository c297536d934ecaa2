// Registers the ops of namespace `trimserve` for CUDA tensors. Their schemas are in ../ops.cpp.

#include "ops.h"

#include <torch/csrc/stable/library.h>

#ifndef TRIMSERVE_CUDA_KEY  // tests run the same ops on the CPU
#define TRIMSERVE_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(trimserve, TRIMSERVE_CUDA_KEY, m) {
  m.impl("headwise_scores", TORCH_BOX(&trimserve::cuda::headwise_scores));
  m.impl("headwise_topk", TORCH_BOX(&trimserve::cuda::headwise_topk));
  m.impl("union_indices", TORCH_BOX(&trimserve::cuda::union_indices));
  m.impl("select_features", TORCH_BOX(&trimserve::cuda::select_features));
  m.impl("write_kv", TORCH_BOX(&trimserve::cuda::write_kv));
  m.impl("gather_kv", TORCH_BOX(&trimserve::cuda::gather_kv));
  m.impl("rotate_write_kv", TORCH_BOX(&trimserve::cuda::rotate_write_kv));
  m.impl("paged_attention", TORCH_BOX(&trimserve::cuda::paged_attention));
  m.impl("silu_gate", TORCH_BOX(&trimserve::cuda::silu_gate));
  m.impl("rotate", TORCH_BOX(&trimserve::cuda::rotate));
}
