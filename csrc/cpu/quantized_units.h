// Quantized weights as registers of floats. A unit is kUnit inputs of one output.

#pragma once

#include <cstring>

#include "simd.h"

namespace trimserve::cpu {

constexpr int kUnit = kInt4Unit;

// int8 to floats, as many as a vector has lanes.
template <int kWidth>
TRIMSERVE_INLINE void widen(typename Simd<kWidth>::Floats& floats, const std::int8_t* source) {
  typedef std::int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
  typename Simd<kWidth>::Ints wide;
#ifdef __x86_64__
  if constexpr (kWidth >= 8) {  // in one instruction, which GCC 12 does not find by itself
    asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bytes*>(source)));
    floats = __builtin_convertvector(wide, typename Simd<kWidth>::Floats);
    return;
  }
#endif
  Bytes bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  wide = __builtin_convertvector(bytes, typename Simd<kWidth>::Ints);
  floats = __builtin_convertvector(wide, typename Simd<kWidth>::Floats);
}

// The same 16 bytes in each 128 bits.
template <int kWidth>
TRIMSERVE_INLINE void repeat(typename Simd<kWidth>::Bits& bits, const std::byte* source) {
  typedef std::uint32_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
  const Bytes& bytes = *reinterpret_cast<const Bytes*>(source);
#ifdef __x86_64__
  // In one instruction, which GCC 12 does not find by itself.
  if constexpr (kWidth == 16) asm("vbroadcasti32x4 %1, %0" : "=v"(bits) : "m"(bytes));
  if constexpr (kWidth == 8) asm("vbroadcasti128 %1, %0" : "=x"(bits) : "m"(bytes));
  if constexpr (kWidth > 4) return;
#endif
  for (int i = 0; i < kWidth; i += 4)
    std::memcpy(reinterpret_cast<char*>(&bits) + i * 4, &bytes, sizeof bytes);
}

// Units of weights have registers 0, 1, ... kUnit / kWidth - 1. In lane l of register r is the weight of input(r, l),
// to be multiplied with that input times factor(r).
template <int kWidth>
struct Int8Unit {
  static constexpr bool kHasGroups = false;
  static constexpr std::int64_t kBytes = kUnit;
  using Opened = const std::int8_t*;

  static constexpr int input(int r, int lane) { return r * kWidth + lane; }
  static constexpr float factor(int) { return 1.0f; }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    unit = reinterpret_cast<const std::int8_t*>(source);
  }
  template <int kRegister>
  TRIMSERVE_INLINE static void take(typename Simd<kWidth>::Floats& w, const Opened& unit) {
    widen<kWidth>(w, unit + kRegister * kWidth);
  }
};

// Registers hold integers from 0 to 15, whose 8 too many are subtracted with the inputs' sum. Each 128 bits of an
// opened unit have all its 16 bytes, shifted so that other halves of bytes lie under the same masks; what a mask leaves
// is 1, 2^8, 2^16 or 2^24 times too large, which the inputs make up for.
template <int kWidth>
struct Int4Unit {
  static constexpr bool kHasGroups = true;
  static constexpr std::int64_t kBytes = kInt4UnitBytes;
  using Opened = typename Simd<kWidth>::Bits;

  static constexpr int input(int r, int lane) {
    const int quarter = lane / 4, half = quarter % 2 + r / 4;
    return 16 * half + 4 * (lane % 4) + 2 * (quarter / 2) + r % 4;
  }
  static constexpr float factor(int r) { return 1.0f / static_cast<float>(1 << 8 * (r % 4)); }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    repeat<kWidth>(unit, source);
    if constexpr (kWidth == 8) unit >>= Opened{0, 0, 0, 0, 4, 4, 4, 4};
    if constexpr (kWidth == 16) unit >>= Opened{0, 0, 0, 0, 4, 4, 4, 4, 16, 16, 16, 16, 20, 20, 20, 20};
  }
  template <int kRegister>
  TRIMSERVE_INLINE static void take(typename Simd<kWidth>::Floats& w, const Opened& unit) {
    const Opened masked = unit >> 4 * (kRegister / 4) & 15u << 8 * (kRegister % 4);
    typename Simd<kWidth>::Ints integers;
    std::memcpy(&integers, &masked, sizeof integers);
    w = __builtin_convertvector(integers, typename Simd<kWidth>::Floats);
  }
};

}  // namespace trimserve::cpu
