// write_kv, gather_kv: store positions' keys and values in their pages.
//   keys, values [N, Hkv, Dh], each head contiguous   kept, slots [R] int64   pages [P, G, 2, Hkv, 16, Dh], one layer
//   Row kept[r], or r, goes to page slots[r] / 16, offset slots[r] % 16. A block takes a row, a thread copies units of
//   16 bytes, or of what alignment allows. Bound by memory bandwidth.

#include "alignment.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    write_rows(WriteKvArgs args, std::int64_t num_slots, KvBounds bounds) {
  const std::int64_t block_bytes = kPagePositions * args.head_bytes;  // a page's positions of one head
  const int units = static_cast<int>(args.head_bytes / sizeof(Unit)),
            heads = static_cast<int>(args.num_kv_heads);
  for (std::int64_t r = blockIdx.x; r < num_slots; r += gridDim.x) {
    const std::int64_t row = args.kept ? args.kept[r] : r, slot = args.slots[r];
    if (row < 0 || row >= bounds.num_rows || slot < 0 || slot >= bounds.num_slots) continue;
    std::byte* const place =
        args.pages + slot / kPagePositions * args.page_stride_bytes + slot % kPagePositions * args.head_bytes;
    for (int i = threadIdx.x; i < 2 * heads * units; i += kThreads) {
      const int block = i / units, unit = i % units, head = block % heads;  // block: of keys, then of values
      const KvRows& rows = block < heads ? args.keys : args.values;
      const std::byte* const source = rows.data + row * rows.row_stride_bytes + head * rows.head_stride_bytes;
      reinterpret_cast<Unit*>(place + block * block_bytes)[unit] =
          reinterpret_cast<const Unit*>(source)[unit];
    }
  }
}

}  // namespace

void write_kv(const WriteKvArgs& args, std::int64_t num_slots, const KvBounds& bounds, Stream stream) {
  if (num_slots * args.num_kv_heads * args.head_bytes == 0) return;
  std::uint64_t bits =
      bits_of(args.pages) | static_cast<std::uint64_t>(args.head_bytes);  // page strides follow
  for (const KvRows& rows : {args.keys, args.values})
    bits |= bits_of(rows.data) | static_cast<std::uint64_t>(rows.row_stride_bytes | rows.head_stride_bytes);
  at_unit(bits, [&]<typename Unit>(const Unit*) {
    launch(write_rows<Unit>, grid_of(num_slots, 1), kThreads, stream, args, num_slots, bounds);
  });
}

}  // namespace trimserve::cuda
