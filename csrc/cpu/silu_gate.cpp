// silu_gate: the gated activation of an MLP (SwiGLU).
//   gate_up [R, 2 I], each row its I gates and then its I ups     output [R, I] = gate * sigmoid(gate) * up
//   counts [R] int32, or null: rows with 0 become 0.
//   One pass, computed in float32.

#include <cstring>

#include "simd.h"

namespace trimserve::cpu {
namespace {

// gate becomes gate * sigmoid(gate) * up.
template <int kWidth>
TRIMSERVE_INLINE void pass(typename Simd<kWidth>::Floats& gate, const typename Simd<kWidth>::Floats& up) {
  using Floats = typename Simd<kWidth>::Floats;
  Floats power = gate < 0.0f ? gate : -gate;
  Simd<kWidth>::exp_of_nonpositive(power);
  gate *= (gate < 0.0f ? power : Floats{} + 1.0f) / (power + 1.0f) * up;
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void pass_row(const Element<dtype>* gate, const Element<dtype>* up, std::int64_t size,
                               Element<dtype>* output) {
  using Stored = Packed<kWidth, dtype>;
  constexpr std::int64_t kSize = Stored::kVectors * kWidth;
  const auto pass_some = [](const Element<dtype>* gates, const Element<dtype>* ups, Element<dtype>* to)
                             TRIMSERVE_INLINE_LAMBDA {
                               typename Stored::Floats x[Stored::kVectors], y[Stored::kVectors];
                               Stored::load(x, gates);
                               Stored::load(y, ups);
                               for (int i = 0; i < Stored::kVectors; ++i) pass<kWidth>(x[i], y[i]);
                               Stored::store(to, x);
                             };
  std::int64_t d = 0;
  for (; d + kSize <= size; d += kSize) pass_some(gate + d, up + d, output + d);
  if (d < size) {
    Element<dtype> gates[kSize] = {}, ups[kSize] = {};
    std::memcpy(gates, gate + d, (size - d) * sizeof *gate);
    std::memcpy(ups, up + d, (size - d) * sizeof *up);
    pass_some(gates, ups, gates);
    std::memcpy(output + d, gates, (size - d) * sizeof *output);
  }
}

}  // namespace

void silu_gate(const SiluGateArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      for (std::int64_t r = begin; r < end; ++r) {
        const auto* const gates = static_cast<const Element<dtype>*>(args.gate_up) + r * args.row_stride;
        auto* const output = static_cast<Element<dtype>*>(args.output) + r * args.size;
        if (args.counts && args.counts[r] == 0)
          std::memset(output, 0, args.size * sizeof *output);
        else
          pass_row<width, dtype>(gates, gates + args.size, args.size, output);
      }
    });
  });
}

}  // namespace trimserve::cpu
