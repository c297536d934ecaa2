// rotate: rotary position embedding, in place.
//   heads [R, H, Dh], the heads of a row contiguous     cosines, sines [R, Dh / 2] float32
//   Rotates the pair of elements (d, d + Dh / 2) of each head in row r by angle (r, d). A thread turns a pair, in
//   float32; blocks take a part of a row. Bound by memory bandwidth.

#include "device.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_pairs(RotateArgs args, std::int64_t num_rows) {
  const int half = static_cast<int>(args.head_dim / 2), pairs = static_cast<int>(args.num_heads) * half;
  const int pair = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (pair >= pairs) return;
  const int head = pair / half, d = pair % half;
  for (std::int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    T* const left = static_cast<T*>(args.heads) + r * args.row_stride + head * args.head_dim + d;
    T* const right = left + half;
    const float x = to_float(*left), y = to_float(*right);
    const float cosine = args.cosines[r * half + d], sine = args.sines[r * half + d];
    *left = from_float<T>(x * cosine - y * sine);
    *right = from_float<T>(y * cosine + x * sine);
  }
}

}  // namespace

void rotate(const RotateArgs& args, std::int64_t num_rows, Stream stream) {
  const std::int64_t pairs = args.num_heads * (args.head_dim / 2);
  if (num_rows * pairs == 0) return;
  const dim3 grid(grid_of(num_rows, 1).x, static_cast<unsigned>(divide_up(pairs, kThreads)));
  at_dtype(args.dtype,
           [&]<typename T>(const T*) { launch(rotate_pairs<T>, grid, kThreads, stream, args, num_rows); });
}

}  // namespace trimserve::cuda
