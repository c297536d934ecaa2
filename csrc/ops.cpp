// Schemas of the ops of namespace `trimserve`, and their registration for CPU tensors.

#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(trimserve, m) {
  m.def(
      "headwise_scores(Tensor q, Tensor k, Tensor visibility, float scale, Tensor? log_sums=None) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor visibility, float scale, Tensor? bias=None) -> "
      "(Tensor attended, Tensor log_sums)");
  m.def("headwise_topk(Tensor scores, int[] segments, int[] k) -> Tensor");
  m.def("union_indices(Tensor picks, int num_features) -> (Tensor kept, Tensor num_kept)");
  m.def("select_features(Tensor scores, int[] segments, int[] k) -> (Tensor kept, Tensor num_kept)");
  m.def("write_kv(Tensor(a!) pages, int layer, Tensor keys, Tensor values, Tensor slots) -> ()");
  m.def(
      "gather_kv(Tensor(a!) pages, int layer, Tensor keys, Tensor values, Tensor kept, Tensor slots) -> ()");
  m.def(
      "rotate_write_kv(Tensor(a!) heads, Tensor cosines, Tensor sines, Tensor(b!) pages, int layer, "
      "Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor pages, int layer, Tensor tables, Tensor lengths, float scale, "
      "Tensor? bias=None) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? scales=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  m.def("silu_gate(Tensor gate_up, Tensor? counts=None) -> Tensor");
  m.def("rotate(Tensor(a!) heads, Tensor cosines, Tensor sines) -> ()");
  m.def(
      "make_decoder_layers(Tensor[] weights, Tensor[] scales, int[] cross_layers, float[] gates, "
      "float epsilon) -> int");
  m.def("drop_decoder_layers(int layers) -> ()");
  // A tensor list stands for a struct, which schemas do not have: angles are cosines, sines; text is tables, lengths,
  // slots.
  m.def(
      "decode_layers(Tensor(a!) hidden, Tensor(b!) pages, int layers, Tensor[] angles, Tensor[] text, "
      "Tensor[] feature_tables, Tensor[] feature_lengths, Tensor[] biases) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimserve, CPU, m) {
  m.impl("headwise_scores", TORCH_BOX(&trimserve::headwise_scores));
  m.impl("attention", TORCH_BOX(&trimserve::attention));
  m.impl("headwise_topk", TORCH_BOX(&trimserve::headwise_topk));
  m.impl("union_indices", TORCH_BOX(&trimserve::union_indices));
  m.impl("select_features", TORCH_BOX(&trimserve::select_features));
  m.impl("write_kv", TORCH_BOX(&trimserve::write_kv));
  m.impl("gather_kv", TORCH_BOX(&trimserve::gather_kv));
  m.impl("rotate_write_kv", TORCH_BOX(&trimserve::rotate_write_kv));
  m.impl("paged_attention", TORCH_BOX(&trimserve::paged_attention));
  m.impl("linear", TORCH_BOX(&trimserve::linear));
  m.impl("rms_norm", TORCH_BOX(&trimserve::rms_norm));
  m.impl("silu_gate", TORCH_BOX(&trimserve::silu_gate));
  m.impl("rotate", TORCH_BOX(&trimserve::rotate));
  m.impl("decode_layers", TORCH_BOX(&trimserve::decode_layers));
}

// For every device, so that tensors elsewhere than on the CPU reach the checks.
STABLE_TORCH_LIBRARY_IMPL(trimserve, CompositeExplicitAutograd, m) {
  m.impl("make_decoder_layers", TORCH_BOX(&trimserve::make_decoder_layers));
  m.impl("drop_decoder_layers", TORCH_BOX(&trimserve::drop_decoder_layers));
}
