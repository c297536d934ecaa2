// write_kv, gather_kv: store positions' keys and values in their pages.
//   keys, values [N, Hkv, Dh], each head contiguous   kept, slots [R] int64   pages [P, G, 2, Hkv, 16, Dh], one layer,
//     or int8 [P, G, 2, Hkv, 16, Dh + 2]: 16 times Dh integers x / scale, rounded to the nearest, then 16 scales, the
//     float16 next to the largest |x| / 127
//   Row kept[r], or r where kept is null, goes to page slots[r] / 16, offset slots[r] % 16. One copy per head; bound by
//   memory bandwidth. The next row is prefetched during each copy, because gaps between kept rows defeat the hardware
//   prefetcher. Many rows bypass the caches (is_streamed), which saves reading a line before it is overwritten.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {
namespace {

constexpr std::int64_t kCacheLine = 64;

TRIMSERVE_INLINE void stream(std::byte* destination, const std::byte* source, std::int64_t num_bytes) {
#ifdef __x86_64__
  for (std::int64_t i = 0; i < num_bytes; i += kStreamedBytes) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(destination + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  }
#else
  std::memcpy(destination, source, static_cast<std::size_t>(num_bytes));
#endif
}

// Dh integers and their scale, of a place in its block. Without a finite scale, as NaN or infinity among the elements
// gives, it is NaN.
template <DType dtype>
TRIMSERVE_INLINE void quantize(std::byte* block, std::int64_t place, const std::byte* source,
                               std::int64_t head_dim) {
  using Half = Element<DType::kFloat16>;
  const auto* const elements = reinterpret_cast<const Element<dtype>*>(source);
  auto* const integers = reinterpret_cast<std::int8_t*>(block) + place * head_dim;
  float largest = 0.0f, none = 0.0f;  // 0 times a finite element
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const float x = elements[d].to_float();
    largest = std::max(largest, std::abs(x));
    none += x * 0.0f;
  }
  Half scale = Half::from_float(largest / 127.0f + none);
  const float divisor = scale.to_float();
  const bool is_finite = divisor < std::numeric_limits<float>::infinity();
  if (!is_finite) scale = Half::from_float(std::numeric_limits<float>::quiet_NaN());
  const float factor = is_finite && divisor > 0.0f ? divisor : std::numeric_limits<float>::infinity();
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const float x = is_finite ? elements[d].to_float() : 0.0f;
    integers[d] = static_cast<std::int8_t>(std::nearbyint(std::clamp(x / factor, -127.0f, 127.0f)));
  }
  std::memcpy(block + kPagePositions * head_dim + place * kScaleBytes, &scale, sizeof scale);
}

TRIMSERVE_INLINE void write_head(const WriteKvArgs& args, std::byte* block, std::int64_t place,
                                 const std::byte* source) {
  std::byte* const destination = block + place * args.head_bytes;
  if (args.is_int8) {
    at_dtype(args.dtype, [&](auto dtype) TRIMSERVE_INLINE_LAMBDA {
      quantize<dtype>(block, place, source, args.head_dim);
    });
  } else if (args.is_streamed) {
    stream(destination, source, args.head_bytes);
  } else {
    std::memcpy(destination, source, static_cast<std::size_t>(args.head_bytes));
  }
}

// The heads of one row, whose blocks begin at `block`. next: a row that is copied soon.
TRIMSERVE_INLINE void write_heads(const WriteKvArgs& args, const KvRows& rows, std::int64_t row,
                                  std::int64_t next, std::byte* block, std::int64_t place) {
  const std::byte* source = rows.data + row * rows.row_stride_bytes;
  const std::byte* ahead = rows.data + next * rows.row_stride_bytes;
  for (std::int64_t head = 0; head < args.num_kv_heads; ++head) {
    for (std::int64_t i = 0; i < args.head_bytes; i += kCacheLine) __builtin_prefetch(ahead + i);
    write_head(args, block, place, source);
    source += rows.head_stride_bytes;
    ahead += rows.head_stride_bytes;
    block += kPagePositions * args.head_bytes;
  }
}

TRIMSERVE_INLINE void write_rows(const WriteKvArgs& args, std::int64_t begin, std::int64_t end) {
  const auto row_at = [&](std::int64_t r) { return args.kept ? args.kept[r] : r; };
  const std::int64_t half_bytes = args.num_kv_heads * kPagePositions * args.head_bytes;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t row = row_at(r), next = row_at(std::min(r + 1, end - 1));
    const std::int64_t place = args.slots[r] % kPagePositions;
    std::byte* const keys = args.pages + args.slots[r] / kPagePositions * args.page_stride_bytes;
    write_heads(args, args.keys, row, next, keys, place);
    write_heads(args, args.values, row, next, keys + half_bytes, place);
  }
}

}  // namespace

void write_kv(const WriteKvArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.head_bytes == 0) return;  // no memory behind the pointers
  at_width(widest_vector(), [&](auto) TRIMSERVE_INLINE_LAMBDA { write_rows(args, begin, end); });
#ifdef __x86_64__
  if (args.is_streamed) _mm_sfence();  // other threads read the pages next
#endif
}

}  // namespace trimserve::cpu
