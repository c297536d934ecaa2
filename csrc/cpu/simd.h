// Vectors of floats for CPU kernels, and the choice of their width at run time. GCC and Clang.
//
// A kernel is a template over the vector width, called through at_width, which compiles it once for each kind of
// machine. Whatever it calls must be TRIMSERVE_INLINE, or it would be compiled for the baseline. Vectors go by
// reference: by value their calling convention depends on the machine.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define TRIMSERVE_INLINE [[gnu::always_inline]] inline
#define TRIMSERVE_INLINE_LAMBDA __attribute__((always_inline))
#ifdef __x86_64__
#define TRIMSERVE_TARGET_AVX2 [[gnu::target("arch=x86-64-v3")]]
#define TRIMSERVE_TARGET_AVX512 [[gnu::target("arch=x86-64-v4")]]
#else
#define TRIMSERVE_TARGET_AVX2
#define TRIMSERVE_TARGET_AVX512
#endif

namespace trimserve::cpu {

// Where prefetches go, as __builtin_prefetch counts: the first-level cache has fewer places for misses.
constexpr int kFirstLevel = 3, kSecondLevel = 2;

// What ATEN_CPU_CAPABILITY, torch's own switch, allows: "default", "avx2", "avx512" (which is without AVX512_BF16 and
// AVX512_VNNI), or empty for whatever the machine has.
inline std::string_view capability_limit() {
  const char* const limit = std::getenv("ATEN_CPU_CAPABILITY");
  return limit ? limit : "";
}

// Floats of the widest vector that may be used: 16 (AVX-512), 8 (AVX2) or 4 (anything).
inline int widest_vector() {
#ifdef __x86_64__
  static const int width = [] {
    const std::string_view limit = capability_limit();
    if (limit == "default") return 4;
    return limit != "avx2" && __builtin_cpu_supports("x86-64-v4") ? 16
           : __builtin_cpu_supports("x86-64-v3")                  ? 8
                                                                  : 4;
  }();
  return width;
#else
  return 4;
#endif
}

// Whether AVX512_BF16 may be used, which multiplies pairs of bfloat16.
inline bool has_pair_products() {
#ifdef __x86_64__
  static const bool has =
      capability_limit().empty() && widest_vector() == 16 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// Whether AVX512_VNNI may be used, which multiplies bytes and adds up four products.
inline bool has_byte_products() {
#ifdef __x86_64__
  static const bool has =
      capability_limit().empty() && widest_vector() == 16 && __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

template <typename Body>
TRIMSERVE_TARGET_AVX512 void with_avx512(const Body& body) {
  body(std::integral_constant<int, 16>());
}

template <typename Body>
TRIMSERVE_TARGET_AVX2 void with_avx2(const Body& body) {
  body(std::integral_constant<int, 8>());
}

// Calls body, a TRIMSERVE_INLINE_LAMBDA of the width as a constant, compiled for machines that have such vectors.
template <typename Body>
void at_width(int width, const Body& body) {
  if (width == 16) return with_avx512(body);
  if (width == 8) return with_avx2(body);
  body(std::integral_constant<int, 4>());
}

// Calls body with the dtype as a constant.
template <typename Body>
TRIMSERVE_INLINE void at_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(std::integral_constant<DType, DType::kFloat32>());
    case DType::kBFloat16:
      return body(std::integral_constant<DType, DType::kBFloat16>());
    case DType::kFloat16:
      return body(std::integral_constant<DType, DType::kFloat16>());
  }
}

// Calls body with 0, 1, ... kCount - 1 as constants: unlike a loop that the compiler unrolls, this leaves arrays of
// vectors in registers.
template <int kCount, typename Body>
TRIMSERVE_INLINE void unrolled(const Body& body) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) TRIMSERVE_INLINE_LAMBDA {
    (body(std::integral_constant<int, kIndices>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

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

template <int kWidth>
struct Simd {
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef std::int32_t Ints __attribute__((vector_size(kWidth * sizeof(std::int32_t))));
  typedef std::uint32_t Bits __attribute__((vector_size(kWidth * sizeof(std::uint32_t))));

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
    Bits exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent << 23) + 0x3f800000u;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    x = is_zero ? Floats{} : p * power;
  }

  // Every lane becomes what `combine` makes of all lanes, two at a time.
  template <int kStride = kWidth / 2, typename Combine>
  TRIMSERVE_INLINE static void combine_lanes(Floats& x, const Combine& combine) {
    [&]<int... kLanes>(std::integer_sequence<int, kLanes...>) TRIMSERVE_INLINE_LAMBDA {
      const Floats others = __builtin_shufflevector(x, x, (kLanes ^ kStride)...);
      combine(x, others);
    }(std::make_integer_sequence<int, kWidth>());
    if constexpr (kStride > 1) combine_lanes<kStride / 2>(x, combine);
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

// Lane j of rows[i] becomes lane i of rows[j]. Rows are vectors of kWidth lanes.
template <int kWidth, int kStride = kWidth / 2, typename Row>
TRIMSERVE_INLINE void transpose(Row (&rows)[kWidth]) {
  [&]<int... kLanes>(std::integer_sequence<int, kLanes...>) TRIMSERVE_INLINE_LAMBDA {
    unrolled<kWidth / 2>([&](auto pair) TRIMSERVE_INLINE_LAMBDA {
      constexpr int kLow = pair / kStride * 2 * kStride + pair % kStride, kHigh = kLow + kStride;
      const Row low = rows[kLow], high = rows[kHigh];
      rows[kLow] =
          __builtin_shufflevector(low, high, (kLanes & kStride ? kWidth + (kLanes ^ kStride) : kLanes)...);
      rows[kHigh] =
          __builtin_shufflevector(low, high, (kLanes & kStride ? kWidth + kLanes : kLanes ^ kStride)...);
    });
  }(std::make_integer_sequence<int, kWidth>());
  if constexpr (kStride > 1) transpose<kWidth, kStride / 2>(rows);
}

#ifdef __x86_64__
// sums += the products of 16 pairs of bfloat16, where has_pair_products(): exact, added up in float32.
TRIMSERVE_INLINE void add_pairs(Simd<16>::Floats& sums, const Simd<16>::Bits& x, const Simd<16>::Bits& y) {
  Simd<16>::Floats sum = sums;  // an operand of the caller's array would keep it in memory
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  sums = sum;
}
#endif

// A register of stored elements, loaded as vectors of floats. Which element lands in which lane depends on the dtype;
// store puts elements back in order after arithmetic lane by lane.
template <int kWidth, DType dtype>
struct Packed;

template <int kWidth>
struct Packed<kWidth, DType::kFloat32> {
  static constexpr int kVectors = 1;
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;

  TRIMSERVE_INLINE static void load(Floats (&x)[1], const Element<DType::kFloat32>* source) {
    std::memcpy(&x[0], source, sizeof x[0]);
  }
  TRIMSERVE_INLINE static void store(Element<DType::kFloat32>* destination, const Floats (&x)[1]) {
    std::memcpy(destination, &x[0], sizeof x[0]);
  }
};

template <int kWidth>
struct Packed<kWidth, DType::kBFloat16> {
  static constexpr int kVectors = 2;  // even and odd elements: one instruction each
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;
  using Bits = typename Vectors::Bits;

  TRIMSERVE_INLINE static void load(Floats (&x)[2], const Element<DType::kBFloat16>* source) {
    Bits pairs;
    std::memcpy(&pairs, source, sizeof pairs);
    const Bits even = pairs << 16, odd = pairs & 0xffff0000u;
    std::memcpy(&x[0], &even, sizeof even);
    std::memcpy(&x[1], &odd, sizeof odd);
  }
  TRIMSERVE_INLINE static void store(Element<DType::kBFloat16>* destination, const Floats (&x)[2]) {
    Bits even, odd;
    round(even, x[0]);
    round(odd, x[1]);
    const Bits pairs = even >> 16 | (odd & 0xffff0000u);
    std::memcpy(destination, &pairs, sizeof pairs);
  }

 private:
  // To nearest, ties to even, in the upper half of the bits.
  TRIMSERVE_INLINE static void round(Bits& bits, const Floats& x) {
    std::memcpy(&bits, &x, sizeof bits);
    bits += 0x7fffu + (bits >> 16 & 1u);
    bits = x == x ? bits : Bits{} + 0x7fc00000u;
  }
};

template <int kWidth>
struct Packed<kWidth, DType::kFloat16> {
  static constexpr int kVectors = 2;
  using Vectors = Simd<kWidth>;
  using Floats = typename Vectors::Floats;
  typedef std::uint16_t Halves __attribute__((vector_size(kWidth * sizeof(std::uint16_t))));
  using Half = Element<DType::kFloat16>;

  TRIMSERVE_INLINE static void load(Floats (&x)[2], const Half* source) {
    for (int i = 0; i < 2; ++i) load_vector(x[i], source + i * kWidth);
  }
  TRIMSERVE_INLINE static void store(Half* destination, const Floats (&x)[2]) {
    for (int i = 0; i < 2; ++i) store_vector(destination + i * kWidth, x[i]);
  }

 private:
#ifdef __x86_64__
  static constexpr bool kConverts = kWidth >= 8;  // AVX2's companion F16C
#else
  static constexpr bool kConverts = false;
#endif

  TRIMSERVE_INLINE static void load_vector(Floats& x, const Half* source) {
    if constexpr (kConverts) {
      Halves halves;
      std::memcpy(&halves, source, sizeof halves);
      // The intrinsic cannot be in a function that is compiled for the baseline until it is inlined.
      asm("vcvtph2ps %1, %0" : "=v"(x) : "v"(halves));
    } else {
      float floats[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) floats[lane] = source[lane].to_float();
      std::memcpy(&x, floats, sizeof x);
    }
  }
  TRIMSERVE_INLINE static void store_vector(Half* destination, const Floats& x) {
    if constexpr (kConverts) {
      Halves halves;
      asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(x));  // to nearest, ties to even
      std::memcpy(destination, &halves, sizeof halves);
    } else {
      for (int lane = 0; lane < kWidth; ++lane) destination[lane] = Half::from_float(x[lane]);
    }
  }
};

}  // namespace trimserve::cpu
