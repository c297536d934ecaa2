// Products of bfloat16 rows with int4 weights as bytes, where has_byte_products(): weights are never widened.

#pragma once

#ifdef __x86_64__

#include <cstring>

#include "quantized_units.h"

namespace trimserve::cpu {

// Four scales, each in the lanes that its inputs are added up in, or one in all.
class SpreadByQuarter {
 public:
  TRIMSERVE_INLINE explicit SpreadByQuarter(std::int64_t num_scales)
      : places_(Places{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3} >> (num_scales == 1 ? 2 : 0)) {}
  TRIMSERVE_INLINE void operator()(Simd<16>::Floats& lanes, const float* scales) const {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    asm("vbroadcastf32x4 %1, %0\n\tvpermilps %2, %0, %0"
        : "=&v"(lanes)
        : "m"(*reinterpret_cast<const Four*>(scales)), "v"(places_));
  }

 private:
  using Places = Simd<16>::Ints;
  Places places_;
};

// The integers x of WordMath as 256 * high + low, two signed bytes, so that products with unsigned bytes are exact. The
// scale keeps x below 32640, whose high byte would be 128. Four products are added up in a lane, of one quarter of a
// register of weights, so that a lane is of one group even where a register has several.
struct ByteMath {
  using Element = std::int16_t;
  using First = Simd<16>::Ints;
  struct Inputs {
    Simd<16>::Bits high, low;
  };
  using Register = Simd<16>::Bits;
  struct Sums {
    Simd<16>::Ints high, low;
  };
  using Spread = SpreadByQuarter;
  static constexpr int kInputs = 64;
  static constexpr bool kHasScales = true;
  static constexpr bool kIsBytes = true;

  TRIMSERVE_INLINE static void pack(std::byte* packed, const Element (&x)[kInputs]) {
    std::int8_t bytes[2][kInputs];
    for (int i = 0; i < kInputs; ++i) {
      bytes[1][i] = static_cast<std::int8_t>(x[i]);
      bytes[0][i] = static_cast<std::int8_t>((x[i] - bytes[1][i]) >> 8);
    }
    std::memcpy(packed, bytes, sizeof bytes);
  }
  TRIMSERVE_INLINE static void load(Inputs& x, const std::byte* packed) {
    std::memcpy(&x.high, packed, sizeof x.high);
    std::memcpy(&x.low, packed + sizeof x.high, sizeof x.low);
  }
  template <int kOffset>
  TRIMSERVE_INLINE static void count(First& first, const Element (&x)[kInputs]) {
    std::int32_t sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3];
    Simd<16>::Ints lanes;
    std::memcpy(&lanes, sums, sizeof lanes);
    first -= lanes * kOffset;
  }
  TRIMSERVE_INLINE static void begin(Sums& sums, const First& first) {
    sums.high = First{};
    sums.low = first;
  }
  TRIMSERVE_INLINE static void add(Sums& sums, const Inputs& x, const Register& w) {
    Simd<16>::Ints high = sums.high, low = sums.low;
    asm("vpdpbusd %2, %1, %0" : "+v"(high) : "v"(w), "vm"(x.high));
    asm("vpdpbusd %2, %1, %0" : "+v"(low) : "v"(w), "vm"(x.low));
    sums.high = high;
    sums.low = low;
  }
  TRIMSERVE_INLINE static void to_floats(Simd<16>::Floats& floats, const Sums& sums) {
    floats = __builtin_convertvector((sums.high << 8) + sums.low, Simd<16>::Floats);
  }
};

// As in quantized_units.h. Groups of the weights may be shorter than kGroup.
struct Int4Bytes {
  using Opened = ByteMath::Register;
  static constexpr bool kIsInt4 = true;
  static constexpr int kOffset = 8;
  static constexpr std::int64_t kGroup = 128;
  static constexpr std::int64_t kInputs = 128, kBytes = kInputs / 2;

  static constexpr std::int64_t bytes(std::int64_t num_inputs) { return int4_bytes(num_inputs); }
  static constexpr int input(int r, int i) { return i / 16 * 32 + r * 16 + i % 16; }
  static constexpr float factor(int) { return 1.0f; }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    std::memcpy(&unit, source, sizeof unit);
  }

  template <int kRegister>
  TRIMSERVE_INLINE static void take(ByteMath::Register& w, const Opened& unit) {
    w = unit >> 4 * kRegister & 0x0f0f0f0fu;
  }
};

// Four groups of 64 inputs at once. A group fills two neighbouring quarters: one goes to `left`, the other to the same
// place of `right`, so that all its products are added up in the same lanes.
struct Int4Bytes64 {
  struct Opened {
    ByteMath::Register left, right;
  };
  static constexpr bool kIsInt4 = true;
  static constexpr int kOffset = 8;
  static constexpr std::int64_t kGroup = 256;
  static constexpr std::int64_t kInputs = 256, kBytes = kInputs / 2;

  static constexpr std::int64_t bytes(std::int64_t num_inputs) { return int4_bytes(num_inputs); }
  static constexpr int input(int r, int i) { return (i / 16 * 2 + r / 2) * 32 + r % 2 * 16 + i % 16; }
  static constexpr float factor(int) { return 1.0f; }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    ByteMath::Register first, second;
    std::memcpy(&first, source, sizeof first);
    std::memcpy(&second, source + sizeof first, sizeof second);
    unit.left =
        __builtin_shufflevector(first, second, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    unit.right =
        __builtin_shufflevector(first, second, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }

  template <int kRegister>
  TRIMSERVE_INLINE static void take(ByteMath::Register& w, const Opened& unit) {
    w = (kRegister / 2 ? unit.right : unit.left) >> 4 * (kRegister % 2) & 0x0f0f0f0fu;
  }
};

}  // namespace trimserve::cpu

#endif
