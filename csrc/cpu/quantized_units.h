// Products of rows with quantized weights, in registers.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace trimserve::cpu {

constexpr std::int64_t kMostAdded = 256;  // inputs whose products are added up before they are scaled
constexpr std::int64_t kMostScales = 4;   // of those

// A scale in all lanes.
template <int kWidth>
struct Broadcast {
  TRIMSERVE_INLINE explicit Broadcast(std::int64_t) {}
  TRIMSERVE_INLINE void operator()(typename Simd<kWidth>::Floats& lanes, const float* scale) const {
    lanes = typename Simd<kWidth>::Floats{} + *scale;
  }
};

// Elements of a row as they lie in the registers that they are multiplied in.
template <typename Stored, typename Lanes>
struct AsRegisters {
  using Element = Stored;
  using Inputs = Lanes;    // a register of a row
  using Register = Lanes;  // of weights
  static constexpr int kInputs = sizeof(Lanes) / sizeof(Stored);

  TRIMSERVE_INLINE static void pack(std::byte* packed, const Element (&x)[kInputs]) {
    std::memcpy(packed, x, sizeof x);
  }
  TRIMSERVE_INLINE static void load(Inputs& x, const std::byte* packed) { std::memcpy(&x, packed, sizeof x); }
};

// How float32 and float16 rows are multiplied.
template <int kWidth>
struct FloatMath : AsRegisters<float, typename Simd<kWidth>::Floats> {
  using Base = AsRegisters<float, typename Simd<kWidth>::Floats>;
  using Base::kInputs;
  using typename Base::Element, typename Base::Inputs, typename Base::Register;
  using First = float;
  using Sums = typename Simd<kWidth>::Floats;
  using Spread = Broadcast<kWidth>;
  static constexpr bool kHasScales = false;  // of the rows' groups
  static constexpr bool kIsBytes = false;

  // What the sums of weights that are stored plus kOffset begin with: -kOffset times the inputs' sum, shared out. In a
  // single lane it would be added up along all of K before it cancels, and cost the accuracy of inputs whose mean is
  // not 0.
  template <int kOffset>
  TRIMSERVE_INLINE static void count(First& first, const Element (&x)[kInputs]) {
    Element sum = 0;
    for (const Element each : x) sum += each;
    first -= sum * kOffset / kWidth;
  }
  TRIMSERVE_INLINE static void begin(Sums& sums, const First& first) {
    const Sums all = Sums{} + first;
    sums = all;
  }
  TRIMSERVE_INLINE static void add(Sums& sums, const Inputs& x, const Register& w) { sums += x * w; }
  TRIMSERVE_INLINE static void to_floats(typename Simd<kWidth>::Floats& floats, const Sums& sums) {
    floats = sums;
  }
};

// How bfloat16 rows are: as int16 times a scale for each group of inputs, a power of two. What is within 2^-7 of the
// group's largest is exact, the rest is off by 2^-15 of the largest at most, whose own last bit is worth 2^-8. Twice
// the inputs fit in a register, and sums of a group are exact. Where bytes can be multiplied ByteMath takes its place
// for int4 weights (quantized_bytes.h).
template <int kWidth>
struct WordMath : AsRegisters<std::int16_t, typename Simd<kWidth>::Bits> {
  using Base = AsRegisters<std::int16_t, typename Simd<kWidth>::Bits>;
  using Base::kInputs;
  using typename Base::Element, typename Base::Inputs, typename Base::Register;
  using First = std::int32_t;
  using Sums = typename Simd<kWidth>::Ints;
  using Spread = Broadcast<kWidth>;
  static constexpr bool kHasScales = true;
  static constexpr bool kIsBytes = false;

  // As of FloatMath, to whole numbers: in every other one of 16 lanes.
  template <int kOffset>
  TRIMSERVE_INLINE static void count(First& first, const Element (&x)[kInputs]) {
    First sum = 0;
    for (const Element each : x) sum += each;
    first -= sum * (kOffset / std::min(kWidth, 8));
  }
  TRIMSERVE_INLINE static void begin(Sums& sums, const First& first) {
    const Sums all = Sums{} + first;
    if constexpr (kWidth == 16) {
      const Sums every_other = {-1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0};
      sums = all & every_other;
    } else {
      sums = all;
    }
  }
  TRIMSERVE_INLINE static void add(Sums& sums, const Inputs& x, const Register& w) {
#ifdef __x86_64__
    // Both instructions in one asm: of additions that it sees, GCC 12 makes trees of more sums than registers hold.
    Sums sum = sums;
    Inputs products = x;
    if constexpr (kWidth == 4) {
      asm("pmaddwd %2, %1\n\tpaddd %1, %0" : "+x"(sum), "+x"(products) : "x"(w));
    } else {
      asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(products) : "v"(w), "vm"(x));
    }
    sums = sum;
#else
    Sums left, right;
    std::memcpy(&left, &x, sizeof x);
    std::memcpy(&right, &w, sizeof w);
    sums += (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
  }
  TRIMSERVE_INLINE static void to_floats(typename Simd<kWidth>::Floats& floats, const Sums& sums) {
    floats = __builtin_convertvector(sums, typename Simd<kWidth>::Floats);
  }
};

template <int kWidth>
using Words __attribute__((vector_size(kWidth * sizeof(float)))) = std::int16_t;

// Units of kInputs weights of an output make groups of kGroup, whose products are added up before they are scaled, and
// fill registers 0, 1, ... kInputs / Math::kInputs - 1. In place i of register r is the weight of input(r, i), to be
// multiplied with that input times factor(r). So many inputs lie in bytes(num_inputs).
template <int kWidth, typename Math>
struct Int8Unit {
  using Opened = const std::int8_t*;
  static constexpr bool kIsInt4 = false;
  static constexpr int kOffset = 0;
  static constexpr std::int64_t kGroup = 128;
  static constexpr std::int64_t kInputs = 32, kBytes = kInputs;

  static constexpr std::int64_t bytes(std::int64_t num_inputs) { return num_inputs; }
  static constexpr int input(int r, int i) { return r * Math::kInputs + i; }
  static constexpr float factor(int) { return 1.0f; }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    unit = reinterpret_cast<const std::int8_t*>(source);
  }

  template <int kRegister>
  TRIMSERVE_INLINE static void take(typename Math::Register& w, const Opened& unit) {
    typedef std::int8_t Bytes __attribute__((vector_size(Math::kInputs), aligned(1), may_alias));
    const std::int8_t* const source = unit + kRegister * Math::kInputs;
    using Widened = std::conditional_t<Math::kHasScales, Words<kWidth>, typename Simd<kWidth>::Ints>;
    Widened wide;
#ifdef __x86_64__
    // In one instruction, which GCC 12 does not find by itself.
    if constexpr (kWidth >= 8 && Math::kHasScales)
      asm("vpmovsxbw %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bytes*>(source)));
    if constexpr (kWidth >= 8 && !Math::kHasScales)
      asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Bytes*>(source)));
    constexpr bool kIsWidened = kWidth >= 8;
#else
    constexpr bool kIsWidened = false;
#endif
    if constexpr (!kIsWidened) {
      Bytes bytes;
      std::memcpy(&bytes, source, sizeof bytes);
      wide = __builtin_convertvector(bytes, Widened);
    }
    if constexpr (Math::kHasScales) {
      std::memcpy(&w, &wide, sizeof w);
    } else {
      w = __builtin_convertvector(wide, typename Simd<kWidth>::Floats);
    }
  }
};

constexpr std::int64_t int4_bytes(std::int64_t num_inputs) {
  return (num_inputs + kInt4Unit - 1) / kInt4Unit * kInt4UnitBytes;
}

// The same 16 bytes in each 128 bits.
template <int kWidth>
TRIMSERVE_INLINE void repeat(typename Simd<kWidth>::Bits& bits, const std::byte* source) {
  typedef std::uint32_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
  const Bytes& bytes = *reinterpret_cast<const Bytes*>(source);
#ifdef __x86_64__
  if constexpr (kWidth == 16) asm("vbroadcasti32x4 %1, %0" : "=v"(bits) : "m"(bytes));
  if constexpr (kWidth == 8) asm("vbroadcasti128 %1, %0" : "=x"(bits) : "m"(bytes));
  if constexpr (kWidth > 4) return;
#endif
  for (int i = 0; i < kWidth; i += 4)
    std::memcpy(reinterpret_cast<char*>(&bits) + i * 4, &bytes, sizeof bytes);
}

// Registers hold integers from 0 to 15, whose 8 too many are subtracted with the inputs' sum. Each quarter, 128 bits,
// of an opened unit has all its 16 bytes, shifted so that other halves of bytes lie under the same masks.
template <int kWidth, typename Math, int kInputsOfGroup>
struct Int4Unit {
  static constexpr std::int64_t kGroup = kInputsOfGroup;
  using Opened = typename Simd<kWidth>::Bits;
  static constexpr bool kIsInt4 = true;
  static constexpr int kOffset = 8;
  static constexpr std::int64_t kInputs = kInt4Unit, kBytes = kInt4UnitBytes;
  static constexpr int kQuarters = kWidth / 4;

  static constexpr std::int64_t bytes(std::int64_t num_inputs) { return int4_bytes(num_inputs); }

  // As floats, a register has the half of one byte of each 32 bits; what a mask leaves is 2^8, 2^16 or 2^24 times too
  // large, which the inputs make up for. As words it has that of one byte of each 16 bits.
  static constexpr int input(int r, int i) {
    constexpr int kBytesOfPlace = Math::kHasScales ? 2 : 4, kOfQuarter = Math::kInputs / kQuarters;
    const int shifted = i / kOfQuarter + (Math::kHasScales ? r * kQuarters : r / 4);
    const int byte = Math::kHasScales ? shifted / 2 : 2 * (shifted / 2) + r % 4;
    return 16 * (shifted % 2) + kBytesOfPlace * (i % kOfQuarter) + byte;
  }
  static constexpr float factor(int r) {
    return Math::kHasScales ? 1.0f : 1.0f / static_cast<float>(1 << 8 * (r % 4));
  }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) {
    repeat<kWidth>(unit, source);
    if constexpr (kWidth == 8) unit >>= Opened{0, 0, 0, 0, 4, 4, 4, 4};
    if constexpr (kWidth == 16 && Math::kHasScales)
      unit >>= Opened{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    if constexpr (kWidth == 16 && !Math::kHasScales)
      unit >>= Opened{0, 0, 0, 0, 4, 4, 4, 4, 16, 16, 16, 16, 20, 20, 20, 20};
  }

  template <int kRegister>
  TRIMSERVE_INLINE static void take(typename Math::Register& w, const Opened& unit) {
    if constexpr (Math::kHasScales) {
      w = unit >> 4 * kQuarters * kRegister & 0x000f000fu;
    } else {
      const Opened masked = unit >> 4 * (kRegister / 4) & 15u << 8 * (kRegister % 4);
      typename Simd<kWidth>::Ints integers;
      std::memcpy(&integers, &masked, sizeof integers);
      w = __builtin_convertvector(integers, typename Simd<kWidth>::Floats);
    }
  }
};

// As words for WordMath: bytes become words, whose lower halves are one register and whose upper ones the next.
template <int kWidth, int kInputsOfGroup>
struct Int4Words {
  using Opened = const std::byte*;
  static constexpr bool kIsInt4 = true;
  static constexpr int kOffset = 8;
  static constexpr std::int64_t kGroup = kInputsOfGroup;
  static constexpr int kWords = 2 * kWidth;  // of a register, and bytes behind two
  static constexpr std::int64_t kInputs = kWidth == 16 ? 64 : 32, kBytes = kInputs / 2;
  static_assert(kGroup % kInputs == 0);

  static constexpr std::int64_t bytes(std::int64_t num_inputs) { return int4_bytes(num_inputs); }
  static constexpr int input(int r, int i) {
    const int byte = r / 2 * kWords + i;
    return byte / 16 * 32 + r % 2 * 16 + byte % 16;
  }
  static constexpr float factor(int) { return 1.0f; }

  TRIMSERVE_INLINE static void open(Opened& unit, const std::byte* source) { unit = source; }

  template <int kRegister>
  TRIMSERVE_INLINE static void take(typename Simd<kWidth>::Bits& w, const Opened& unit) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kWords), aligned(1), may_alias));
    typedef std::uint16_t Halves __attribute__((vector_size(2 * kWords)));
    const Bytes& bytes = *reinterpret_cast<const Bytes*>(unit + kRegister / 2 * kWords);
    Halves words;
#ifdef __x86_64__
    if constexpr (kWidth >= 8) asm("vpmovzxbw %1, %0" : "=v"(words) : "m"(bytes));
    constexpr bool kIsWidened = kWidth >= 8;
#else
    constexpr bool kIsWidened = false;
#endif
    if constexpr (!kIsWidened) {
      std::uint8_t source[kWords];
      std::uint16_t widened[kWords];
      std::memcpy(source, &bytes, sizeof source);
      std::copy_n(source, kWords, widened);
      std::memcpy(&words, widened, sizeof words);
    }
    words = kRegister % 2 ? words >> 4 : words & 15;
    std::memcpy(&w, &words, sizeof w);
  }
};

template <int kWidth, typename Math, int kInputsOfGroup>
using Int4Of = std::conditional_t<Math::kHasScales, Int4Words<kWidth, kInputsOfGroup>,
                                  Int4Unit<kWidth, Math, kInputsOfGroup>>;

}  // namespace trimserve::cpu
