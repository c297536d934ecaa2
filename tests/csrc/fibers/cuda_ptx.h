// csrc/cuda/ptx.h for fibers: what its instructions compute.

#pragma once

#include <cmath>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace trimserve::cuda {

namespace on_fibers {

inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float as_float(__half x) { return __half2float(x); }

// Tensor cores cut sums off where float32 rounds to nearest (Fasi et al., doi 10.7717/peerj-cs.330).
inline float cut_off(double sum) {
  const auto nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::abs(nearest) > std::abs(sum) ? std::nextafter(nearest, 0.0f)
                                                                     : nearest;
}

// The two elements of a register.
template <typename T>
void unpack(std::uint32_t bits, float* elements) {
  T pair[2];
  std::memcpy(pair, &bits, sizeof bits);
  elements[0] = as_float(pair[0]);
  elements[1] = as_float(pair[1]);
}

}  // namespace on_fibers

template <typename T>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  constexpr unsigned kDepth = 16;
  const unsigned lane = threadIdx.x % fibers::kWarp, g = lane / 4, c = lane % 4;
  float rows[2][kDepth], columns[2][kDepth];  // of the lane's elements of d
  for (unsigned i = 0; i < 4; ++i) {
    const std::uint32_t* const of_lanes = fibers::exchange(a[i]);
    for (unsigned other = 0; other < 4; ++other)
      on_fibers::unpack<T>(of_lanes[4 * g + other], &rows[i % 2][i / 2 * 8 + 2 * other]);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const std::uint32_t* const of_lanes = fibers::exchange(b[i]);
    for (unsigned column = 0; column < 2; ++column) {
      for (unsigned other = 0; other < 4; ++other)
        on_fibers::unpack<T>(of_lanes[4 * (2 * c + column) + other], &columns[column][i * 8 + 2 * other]);
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned k = 0; k < kDepth; ++k) sum += static_cast<double>(rows[i / 2][k]) * columns[i % 2][k];
    d[i] = on_fibers::cut_off(sum);
  }
}

inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace trimserve::cuda
