// linear with int8 or int4 weights (linear_quantized.cpp, linear_many.cpp), as linear.cpp calls it; see kernels.h.

#pragma once

#include "kernels.h"

namespace trimserve::cpu {

// Floats of the packed rows.
std::int64_t quantized_packed_size(const LinearArgs& args);

// Serial.
void pack_quantized_rows(const LinearArgs& args, float* packed);

// Range over blocks of kLinearColumns outputs.
void linear_quantized(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end);

// The same of linear_many.cpp, which takes all formats, for so many rows that the products take longer than reading the
// weight.
bool has_many_rows(const LinearArgs& args);
std::int64_t many_packed_size(const LinearArgs& args);
void pack_many_rows(const LinearArgs& args, float* packed);
void linear_many(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end);

}  // namespace trimserve::cpu
