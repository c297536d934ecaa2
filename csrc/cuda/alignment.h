// The widest access that alignment allows, for kernels that read or copy up to 16 bytes at a time.

#pragma once

#include "device.h"

namespace trimserve::cuda {

// bits: pointers, strides and sizes, all ored together.
inline bool is_multiple(std::uint64_t bits, std::size_t bytes) { return bits % bytes == 0; }

inline std::uint64_t bits_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Calls body with a null pointer of the widest unit that divides `bits`, which is even: every element has 2 bytes or 4.
template <typename Body>
void at_unit(std::uint64_t bits, const Body& body) {
  if (is_multiple(bits, sizeof(uint4))) return body(static_cast<const uint4*>(nullptr));
  if (is_multiple(bits, sizeof(std::uint32_t))) return body(static_cast<const std::uint32_t*>(nullptr));
  body(static_cast<const std::uint16_t*>(nullptr));
}

}  // namespace trimserve::cuda
