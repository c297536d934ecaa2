// silu_gate: the gated activation of an MLP (SwiGLU).
//   gate_up [R, 2 I], each row its I gates and then its I ups     output [R, I] = gate * sigmoid(gate) * up
//   counts [R] int32, or null: rows with 0 become 0.
//   A thread takes 16 bytes of gates and of ups, or one of each where alignment does not allow it; computed in float32.
//   Bound by memory bandwidth.

#include "alignment.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gate_rows(SiluGateArgs args, std::int64_t num_rows) {
  using Items = Pack<T, kSize>;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kSize;
  if (first >= args.size) return;
  for (std::int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    const T* const gates = static_cast<const T*>(args.gate_up) + r * args.row_stride + first;
    Items gate = *reinterpret_cast<const Items*>(gates);
    const Items up = *reinterpret_cast<const Items*>(gates + args.size);
    const bool is_empty = args.counts && args.counts[r] == 0;
    for (int i = 0; i < kSize; ++i) {
      const float x = to_float(gate.elements[i]);
      const float gated = x / (1.0f + expf(-x)) * to_float(up.elements[i]);
      gate.elements[i] = from_float<T>(is_empty ? 0.0f : gated);
    }
    *reinterpret_cast<Items*>(static_cast<T*>(args.output) + r * args.size + first) = gate;
  }
}

}  // namespace

void silu_gate(const SiluGateArgs& args, std::int64_t num_rows, Stream stream) {
  if (num_rows * args.size == 0) return;
  at_dtype(args.dtype, [&]<typename T>(const T*) {
    const auto pass = [&]<int kSize>(const Pack<T, kSize>*) {
      const dim3 grid(grid_of(num_rows, 1).x, static_cast<unsigned>(divide_up(args.size, kThreads * kSize)));
      launch(gate_rows<T, kSize>, grid, kThreads, stream, args, num_rows);
    };
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
    const auto row_bytes = static_cast<std::uint64_t>(args.size | args.row_stride) * sizeof(T);
    if (is_multiple(bits_of(args.gate_up) | bits_of(args.output) | row_bytes, sizeof(uint4)))
      pass(static_cast<const Pack<T, kPack>*>(nullptr));
    else
      pass(static_cast<const Pack<T, 1>*>(nullptr));
  });
}

}  // namespace trimserve::cuda
