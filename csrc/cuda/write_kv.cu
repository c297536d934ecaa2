// write_kv, gather_kv: store positions' keys and values in their pages.
//   keys, values [N, Hkv, Dh], each head contiguous   kept, slots [R] int64   pages [P, G, 2, Hkv, 16, Dh], one layer
//   Row kept[r], or r, goes to page slots[r] / 16, offset slots[r] % 16. A thread copies the same unit of each of its
//   rows, 16 bytes or what alignment allows, so it works out once where that lies; blocks take a part of a row. Bound
//   by memory bandwidth.

#include "alignment.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    write_rows(WriteKvArgs args, std::int64_t num_slots, KvBounds bounds) {
  const auto units = static_cast<unsigned>(args.head_bytes / sizeof(Unit)),
             heads = static_cast<unsigned>(args.num_kv_heads);
  const unsigned place = blockIdx.y * kThreads + threadIdx.x;
  if (place >= 2 * heads * units) return;
  const unsigned block = place / units,
                 head = block < heads ? block : block - heads;  // of keys, then of values
  const std::int64_t unit_bytes = place % units * sizeof(Unit);
  const KvRows& rows = block < heads ? args.keys : args.values;
  const std::byte* const source = rows.data + head * rows.head_stride_bytes + unit_bytes;
  const std::int64_t row_stride = rows.row_stride_bytes;
  std::byte* const target = args.pages + block * kPagePositions * args.head_bytes + unit_bytes;
  for (std::int64_t r = blockIdx.x; r < num_slots; r += gridDim.x) {
    const std::int64_t row = args.kept ? args.kept[r] : r, slot = args.slots[r];
    if (row < 0 || row >= bounds.num_rows || slot < 0 || slot >= bounds.num_slots) continue;
    const auto position = static_cast<std::uint64_t>(slot);  // of unsigned ones the remainder is a mask
    *reinterpret_cast<Unit*>(target + position / kPagePositions * args.page_stride_bytes +
                             position % kPagePositions * args.head_bytes) =
        *reinterpret_cast<const Unit*>(source + row * row_stride);
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
    const std::int64_t units = 2 * args.num_kv_heads * (args.head_bytes / sizeof(Unit));
    const dim3 grid(grid_of(num_slots, 1).x, static_cast<unsigned>(divide_up(units, kThreads)));
    launch(write_rows<Unit>, grid, kThreads, stream, args, num_slots, bounds);
  });
}

}  // namespace trimserve::cuda
