// write_kv: stores new positions' keys and values in their pages.
//   keys, values [R, Hkv, Dh], each head contiguous     slots [R] int64     pages [P, G, 2, Hkv, 16, Dh], one layer
//   Row r goes to page slots[r] / 16, offset slots[r] % 16. One copy of each head; bound by memory bandwidth.

#include <cstring>

#include "kernels.h"

namespace trimserve::cpu {

void write_kv(const WriteKvArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t block_bytes = kPagePositions * args.head_bytes;  // a page's positions of one head
  const auto write_heads = [&](const KvRows& rows, std::int64_t r, std::byte* destination) {
    const std::byte* const source = rows.data + r * rows.row_stride_bytes;
    for (std::int64_t head = 0; head < args.num_kv_heads; ++head) {
      std::memcpy(destination + head * block_bytes, source + head * rows.head_stride_bytes,
                  static_cast<std::size_t>(args.head_bytes));
    }
  };
  if (args.head_bytes == 0) return;  // no memory behind the pointers
  for (std::int64_t r = begin; r < end; ++r) {
    std::byte* const keys = args.pages + args.slots[r] / kPagePositions * args.page_stride_bytes +
                            args.slots[r] % kPagePositions * args.head_bytes;
    write_heads(args.keys, r, keys);
    write_heads(args.values, r, keys + args.num_kv_heads * block_bytes);
  }
}

}  // namespace trimserve::cpu
