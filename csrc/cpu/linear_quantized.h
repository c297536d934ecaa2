// linear with int8 or int4 weights (linear_quantized.cpp), as linear.cpp calls it; see kernels.h.

#pragma once

#include "kernels.h"

namespace trimserve::cpu {

// Floats of the packed rows.
std::int64_t quantized_packed_size(const LinearArgs& args);

// Serial.
void pack_quantized_rows(const LinearArgs& args, float* packed);

// Range over blocks of kLinearColumns outputs.
void linear_quantized(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end);

}  // namespace trimserve::cpu
