// bfloat16 as CUDA has it, for fibers.

#pragma once

#include "cpu/simd.h"

struct __nv_bfloat16 {
  trimserve::cpu::Element<trimserve::DType::kBFloat16> element;
};
inline float __bfloat162float(__nv_bfloat16 x) { return x.element.to_float(); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {decltype(__nv_bfloat16::element)::from_float(x)};
}
