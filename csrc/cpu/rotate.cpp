// rotate: rotary position embedding, in place.
//   heads [R, H, Dh], the heads of a row contiguous     cosines, sines [R, Dh / 2] float32
//   Rotates the pair of elements (d, d + Dh / 2) of each head in row r by angle (r, d). One pass, computed in float32.

#include "simd.h"

namespace trimserve::cpu {

void rotate(const RotateArgs& args, std::int64_t begin, std::int64_t end) {
  at_width(widest_vector(), [&](auto) TRIMSERVE_INLINE_LAMBDA {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      using Item = Element<dtype>;
      const std::int64_t half = args.head_dim / 2;
      for (std::int64_t r = begin; r < end; ++r) {
        const float *const cosines = args.cosines + r * half, *const sines = args.sines + r * half;
        for (std::int64_t h = 0; h < args.num_heads; ++h) {
          Item* const left = static_cast<Item*>(args.heads) + r * args.row_stride + h * args.head_dim;
          Item* const right = left + half;
#pragma GCC ivdep
          for (std::int64_t d = 0; d < half; ++d) {
            const float x = left[d].to_float(), y = right[d].to_float();
            left[d] = Item::from_float(x * cosines[d] - y * sines[d]);
            right[d] = Item::from_float(y * cosines[d] + x * sines[d]);
          }
        }
      }
    });
  });
}

}  // namespace trimserve::cpu
