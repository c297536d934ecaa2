// rotate, rotate_write_kv: rotary position embedding, in place; keys and values to their pages on the way.
//   heads [R, H, Dh], the heads of a row contiguous     cosines, sines [R, Dh / 2] float32
//   slots [R] int64     pages [P, G, 2, Hkv, 16, Dh], one layer
//   Rotates the pair of elements (d, d + Dh / 2) of each head in row r by angle (r, d). Heads of rotate_write_kv are
//   queries, keys and values; keys and values also go to page slots[r] / 16, offset slots[r] % 16. A thread takes 16
//   bytes of either half of a head, or an element where alignment does not allow it; in float32. Blocks take a part of
//   a row. Bound by memory bandwidth, in a decode step by its launch: what is one kernel here would be two.

#include "alignment.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kThreads = 256;

// What is written beside the heads: nothing where pages is null.
struct Places {
  std::byte* pages;  // of one layer: its slot in the first page
  const std::int64_t* slots;
  std::int64_t num_slots;  // of the pages
  std::int64_t page_stride_bytes;
  int num_kv_heads;
};

// num_heads: with values; args.num_heads of them are rotated.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    rotate_pairs(RotateArgs args, Places places, int num_heads, std::int64_t num_rows) {
  using Items = Pack<T, kSize>;
  using Angles = Pack<float, kSize>;
  const int half = static_cast<int>(args.head_dim / 2), units = half / kSize;
  const int unit = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (unit >= num_heads * units) return;
  const int head = unit / units, d = unit % units * kSize;
  const int block = head - (num_heads - 2 * places.num_kv_heads);  // in a page: of keys, then of values
  for (std::int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    T* const left = static_cast<T*>(args.heads) + r * args.row_stride + head * args.head_dim + d;
    Items x = *reinterpret_cast<const Items*>(left), y = *reinterpret_cast<const Items*>(left + half);
    if (head < args.num_heads) {
      const Angles cosines = *reinterpret_cast<const Angles*>(args.cosines + r * half + d),
                   sines = *reinterpret_cast<const Angles*>(args.sines + r * half + d);
      for (int i = 0; i < kSize; ++i) {
        const float a = to_float(x.elements[i]), b = to_float(y.elements[i]);
        const float cosine = cosines.elements[i], sine = sines.elements[i];
        x.elements[i] = from_float<T>(a * cosine - b * sine);
        y.elements[i] = from_float<T>(b * cosine + a * sine);
      }
      *reinterpret_cast<Items*>(left) = x;
      *reinterpret_cast<Items*>(left + half) = y;
    }
    if (!places.pages || block < 0) continue;
    const std::int64_t slot = places.slots[r];
    if (slot < 0 || slot >= places.num_slots) continue;
    std::byte* const page = places.pages + slot / kPagePositions * places.page_stride_bytes;
    const std::int64_t position = block * kPagePositions + slot % kPagePositions;
    T* const stored = reinterpret_cast<T*>(page) + position * args.head_dim + d;
    *reinterpret_cast<Items*>(stored) = x;
    *reinterpret_cast<Items*>(stored + half) = y;
  }
}

void launch_rotation(const RotateArgs& args, const Places& places, std::int64_t num_rows, Stream stream) {
  const std::int64_t num_heads = args.num_heads + places.num_kv_heads, half = args.head_dim / 2;
  if (num_rows * num_heads * half == 0) return;
  at_dtype(args.dtype, [&]<typename T>(const T*) {
    const auto rotate_by = [&]<int kSize>(const Pack<T, kSize>*) {
      const std::int64_t parts = divide_up(num_heads * (half / kSize), kThreads);
      launch(rotate_pairs<T, kSize>, dim3(grid_of(num_rows, 1).x, static_cast<unsigned>(parts)), kThreads,
             stream, args, places, static_cast<int>(num_heads), num_rows);
    };
    constexpr int kPack = 16 / static_cast<int>(sizeof(T));
    const auto steps = static_cast<std::uint64_t>(half | args.row_stride) * sizeof(T);
    if (is_multiple(bits_of(args.heads) | bits_of(places.pages) | steps, sizeof(uint4)) &&
        is_multiple(bits_of(args.cosines) | bits_of(args.sines), kPack * sizeof(float)))
      rotate_by(static_cast<const Pack<T, kPack>*>(nullptr));
    else
      rotate_by(static_cast<const Pack<T, 1>*>(nullptr));
  });
}

}  // namespace

void rotate(const RotateArgs& args, std::int64_t num_rows, Stream stream) {
  launch_rotation(args, {}, num_rows, stream);
}

void rotate_write_kv(const RotateArgs& args, const WriteKvArgs& store, std::int64_t num_rows,
                     std::int64_t num_slots, Stream stream) {
  const Places places{.pages = store.pages,
                      .slots = store.slots,
                      .num_slots = num_slots,
                      .page_stride_bytes = store.page_stride_bytes,
                      .num_kv_heads = static_cast<int>(store.num_kv_heads)};
  launch_rotation(args, places, num_rows, stream);
}

}  // namespace trimserve::cuda
