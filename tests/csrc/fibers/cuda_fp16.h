// float16 as CUDA has it, for fibers.

#pragma once

#include "cpu/simd.h"

struct __half {
  trimserve::cpu::Element<trimserve::DType::kFloat16> element;
};
inline float __half2float(__half x) { return x.element.to_float(); }
inline __half __float2half_rn(float x) { return {decltype(__half::element)::from_float(x)}; }
