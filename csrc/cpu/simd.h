// Vectors of floats for CPU kernels, and the choice of their width at run time. GCC and Clang.
//
// A kernel is a template over the vector width, instantiated once inside a function of each TRIMSERVE_TARGET
// and called through widest_vector(). Whatever it calls must be TRIMSERVE_INLINE, or it would be compiled for
// the baseline. Vectors go by reference: by value their calling convention depends on the machine.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#define TRIMSERVE_INLINE [[gnu::always_inline]] inline
#ifdef __x86_64__
#define TRIMSERVE_TARGET_AVX2 [[gnu::target("arch=x86-64-v3")]]
#define TRIMSERVE_TARGET_AVX512 [[gnu::target("arch=x86-64-v4")]]
#else
#define TRIMSERVE_TARGET_AVX2
#define TRIMSERVE_TARGET_AVX512
#endif

namespace trimserve::cpu {

// Floats of the widest vector that this machine has: 16 (AVX-512), 8 (AVX2) or 4 (anything).
inline int widest_vector() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("x86-64-v4")) return 16;
  if (__builtin_cpu_supports("x86-64-v3")) return 8;
#endif
  return 4;
}

template <int kWidth>
struct Simd {
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef std::int32_t Ints __attribute__((vector_size(kWidth * sizeof(std::int32_t))));

  TRIMSERVE_INLINE static void load(Floats& x, const float* source) { std::memcpy(&x, source, sizeof x); }
  TRIMSERVE_INLINE static void store(float* destination, const Floats& x) {
    std::memcpy(destination, &x, sizeof x);
  }

  // x = exp(x) for x <= 0, relative error under 2e-7; 0 below -87 (float32 has no normal result there), NaN
  // stays.
  TRIMSERVE_INLINE static void exp_of_nonpositive(Floats& x) {
    constexpr float kLowest = -87.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Ints is_zero = x < kLowest;
    const Floats y = is_zero ? Floats{} + kLowest : x;
    const Floats shifted = y * 1.44269504f + kRound;
    const Floats n = shifted - kRound;
    const Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts (Cephes expf)
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent << 23) + 0x3f800000;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    x = is_zero ? Floats{} : p * power;
  }

  // Lane i of rows[0] becomes the sum of the lanes of rows[i]; the other rows are used up.
  TRIMSERVE_INLINE static void sum_lanes(Floats (&rows)[kWidth]) {
    fold_rows<kWidth / 2>(rows, std::make_integer_sequence<int, kWidth>());
  }

 private:
  // Halves the number of rows: rows i and i + kStride become one, whose lanes with bit kStride are the latter's. The
  // element lists compile to shuffles.
  template <int kStride, int... kLanes>
  TRIMSERVE_INLINE static void fold_rows(Floats (&rows)[kWidth],
                                         const std::integer_sequence<int, kLanes...>& lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kStride; ++i) {
      rows[i] = Floats{rows[kLanes & kStride ? i + kStride : i][kLanes]...} +
                Floats{rows[kLanes & kStride ? i + kStride : i][kLanes ^ kStride]...};
    }
    if constexpr (kStride > 1) fold_rows<kStride / 2>(rows, lanes);
  }
};

// Element types by their bits, so that conversions vectorise on every machine.
template <DType dtype>
struct Element;

template <>
struct Element<DType::kFloat32> {
  float value;
  TRIMSERVE_INLINE float to_float() const { return value; }
  TRIMSERVE_INLINE static Element from_float(float x) { return {x}; }
};

template <>
struct Element<DType::kBFloat16> {
  std::uint16_t bits;
  TRIMSERVE_INLINE float to_float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
  // To nearest, ties to even.
  TRIMSERVE_INLINE static Element from_float(float x) {
    const std::uint32_t wide = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (wide + 0x7fffu + (wide >> 16 & 1u)) >> 16;
    return {static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u)};
  }
};

template <>
struct Element<DType::kFloat16> {
  std::uint16_t bits;
  TRIMSERVE_INLINE float to_float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
    constexpr std::uint32_t kInfinity = 0x7c00u << 13;
    // The product moves the exponent from half's bias to float's and normalises half's subnormals.
    const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
    const std::uint32_t result =
        magnitude >= kInfinity ? magnitude | 0x7f800000u : std::bit_cast<std::uint32_t>(finite);
    return std::bit_cast<float>(result | sign);
  }
  // To nearest, ties to even; what is too large becomes infinite.
  TRIMSERVE_INLINE static Element from_float(float x) {
    const std::uint32_t wide = std::bit_cast<std::uint32_t>(x), sign = wide >> 16 & 0x8000u;
    const float magnitude = std::bit_cast<float>(wide & 0x7fffffffu);
    // 2^112 makes infinite what half cannot hold. Adding a power of two 13 bits above the exponent, or above that of
    // half's smallest normal number, rounds to half's mantissa, which is then in the low bits.
    const float saturated = magnitude * 0x1p112f * 0x1p-110f;
    const std::uint32_t exponent = std::max(wide << 1 & 0xff000000u, 0x71000000u);
    const std::uint32_t sum =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>((exponent >> 1) + 0x07800000u) + saturated);
    const std::uint32_t finite = (sum >> 13 & 0x7c00u) + (sum & 0xfffu);
    return {static_cast<std::uint16_t>(sign | (x == x ? finite : 0x7e00u))};
  }
};

}  // namespace trimserve::cpu
