// write_kv, gather_kv: store positions' keys and values in their pages.
//   keys, values [N, Hkv, Dh], each head contiguous   kept, slots [R] int64   pages [P, G, 2, Hkv, 16, Dh], one layer
//   Row kept[r], or r where kept is null, goes to page slots[r] / 16, offset slots[r] % 16. One copy per head; bound by
//   memory bandwidth. The next row is prefetched during each copy, because gaps between kept rows defeat the hardware
//   prefetcher. Many rows bypass the caches (is_streamed), which saves reading a line before it is overwritten.

#include <algorithm>
#include <cstring>
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

// The heads of one row. next: a row that is copied soon.
TRIMSERVE_INLINE void write_heads(const WriteKvArgs& args, const KvRows& rows, std::int64_t row,
                                  std::int64_t next, std::byte* destination) {
  const std::byte* source = rows.data + row * rows.row_stride_bytes;
  const std::byte* ahead = rows.data + next * rows.row_stride_bytes;
  for (std::int64_t head = 0; head < args.num_kv_heads; ++head) {
    for (std::int64_t i = 0; i < args.head_bytes; i += kCacheLine) __builtin_prefetch(ahead + i);
    if (args.is_streamed)
      stream(destination, source, args.head_bytes);
    else
      std::memcpy(destination, source, static_cast<std::size_t>(args.head_bytes));
    source += rows.head_stride_bytes;
    ahead += rows.head_stride_bytes;
    destination += kPagePositions * args.head_bytes;
  }
}

}  // namespace

void write_kv(const WriteKvArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.head_bytes == 0) return;  // no memory behind the pointers
  const auto row_at = [&](std::int64_t r) { return args.kept ? args.kept[r] : r; };
  const std::int64_t half_bytes = args.num_kv_heads * kPagePositions * args.head_bytes;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t row = row_at(r), next = row_at(std::min(r + 1, end - 1));
    std::byte* const keys = args.pages + args.slots[r] / kPagePositions * args.page_stride_bytes +
                            args.slots[r] % kPagePositions * args.head_bytes;
    write_heads(args, args.keys, row, next, keys);
    write_heads(args, args.values, row, next, keys + half_bytes);
  }
#ifdef __x86_64__
  if (args.is_streamed) _mm_sfence();  // other threads read the pages next
#endif
}

}  // namespace trimserve::cpu
