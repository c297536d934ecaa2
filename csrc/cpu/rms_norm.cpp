// rms_norm: each row over its root mean square, times a weight.
//   x [R, H, K], the heads of a row contiguous     weight [K]     output [R, H, K], contiguous
//   output = x / sqrt(mean(x^2) + epsilon) * weight over K, computed in float32. Two passes over each head; the second
//   reads it from the cache.

#include <cmath>
#include <cstring>

#include "simd.h"

namespace trimserve::cpu {
namespace {

// Calls body(k, count) for each register of [0, size): k is its first element, count how many it holds. Only the last
// register may be partly filled.
template <int kWidth, DType dtype, typename Body>
TRIMSERVE_INLINE void for_registers(std::int64_t size, const Body& body) {
  constexpr std::int64_t kSize = Packed<kWidth, dtype>::kVectors * kWidth;
  const std::int64_t whole = size / kSize * kSize;
  for (std::int64_t k = 0; k < whole; k += kSize) body(k, kSize);
  if (whole < size) body(whole, size - whole);
}

// Loads `count` elements, padded with zeros.
template <int kWidth, DType dtype>
TRIMSERVE_INLINE void load_some(typename Simd<kWidth>::Floats (&x)[Packed<kWidth, dtype>::kVectors],
                                const Element<dtype>* source, std::int64_t count) {
  constexpr std::int64_t kSize = Packed<kWidth, dtype>::kVectors * kWidth;
  if (count == kSize) return Packed<kWidth, dtype>::load(x, source);
  Element<dtype> padded[kSize] = {};
  std::memcpy(padded, source, count * sizeof *source);
  Packed<kWidth, dtype>::load(x, padded);
}

template <int kWidth, DType dtype>
TRIMSERVE_INLINE void normalize(const Element<dtype>* x, const Element<dtype>* weight, std::int64_t size,
                                float epsilon, Element<dtype>* output) {
  using Stored = Packed<kWidth, dtype>;
  using Floats = typename Simd<kWidth>::Floats;
  constexpr std::int64_t kSize = Stored::kVectors * kWidth;
  Floats squares{};
  for_registers<kWidth, dtype>(size, [&](std::int64_t k, std::int64_t count) TRIMSERVE_INLINE_LAMBDA {
    Floats values[Stored::kVectors];
    load_some<kWidth, dtype>(values, x + k, count);
    for (const Floats& value : values) squares += value * value;
  });
  float sum = 0.0f;
  for (int lane = 0; lane < kWidth; ++lane) sum += squares[lane];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
  for_registers<kWidth, dtype>(size, [&](std::int64_t k, std::int64_t count) TRIMSERVE_INLINE_LAMBDA {
    Floats values[Stored::kVectors], weights[Stored::kVectors];
    load_some<kWidth, dtype>(values, x + k, count);
    load_some<kWidth, dtype>(weights, weight + k, count);
    for (int i = 0; i < Stored::kVectors; ++i) values[i] *= factor * weights[i];
    if (count == kSize) return Stored::store(output + k, values);
    Element<dtype> padded[kSize];
    Stored::store(padded, values);
    std::memcpy(output + k, padded, count * sizeof *output);
  });
}

}  // namespace

void rms_norm(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto width) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      using Item = Element<dtype>;
      const auto* const weight = static_cast<const Item*>(args.weight);
      for (std::int64_t r = begin; r < end; ++r) {
        const Item* const x = static_cast<const Item*>(args.x) + r * args.x_stride;
        Item* const output = static_cast<Item*>(args.output) + r * args.num_heads * args.size;
        for (std::int64_t h = 0; h < args.num_heads; ++h) {
          normalize<width, dtype>(x + h * args.size, weight, args.size, args.epsilon, output + h * args.size);
        }
      }
    });
  });
}

}  // namespace trimserve::cpu
