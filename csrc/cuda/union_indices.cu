// union_indices: merges every head's picks into one ascending list, through a bitmap of the features.
//   picks [H * K] int64, any order, repeats allowed     kept [min(H * K, N)] int64, ascending, unused tail -1
//   Picks set bits; then one block counts the bits of each word, sums the counts of the words before it, and writes
//   each bit's index to its place. num_kept stays on the device. One block is enough: N = 6404 is 201 words.

#include "device.h"
#include "launchers.h"

namespace trimserve::cuda {
namespace {

constexpr int kMarkThreads = 256;
constexpr int kListThreads = 1024;
static_assert(kListThreads % kWarp == 0);

__global__ void __launch_bounds__(kMarkThreads) set_bits(const std::int64_t* picks, std::int64_t num_picks,
                                                         std::int64_t num_features, std::uint32_t* bitmap) {
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kMarkThreads + threadIdx.x;
  for (; i < num_picks; i += static_cast<std::int64_t>(gridDim.x) * kMarkThreads) {
    const std::int64_t pick = picks[i];
    if (0 <= pick && pick < num_features) atomicOr(&bitmap[pick / 32], 1u << (pick % 32));
  }
}

__global__ void __launch_bounds__(kListThreads)
    list_bits(const std::uint32_t* bitmap, std::int64_t words, std::int64_t* kept, std::int64_t size,
              std::int64_t* num_kept) {
  __shared__ int warps[kListThreads / kWarp];
  std::int64_t count = 0;
  for (std::int64_t first = 0; first < words; first += kListThreads) {
    const std::int64_t w = first + threadIdx.x;
    std::uint32_t word = w < words ? bitmap[w] : 0;
    int total;
    std::int64_t place = count + sum_before<kListThreads>(__popc(word), warps, total);
    for (; word != 0 && place < size; word &= word - 1)
      kept[place++] = w * 32 + __ffs(static_cast<int>(word)) - 1;
    count += total;
  }
  for (std::int64_t i = count + threadIdx.x; i < size; i += kListThreads) kept[i] = -1;
  if (threadIdx.x == 0) *num_kept = count;
}

}  // namespace

void mark_picks(const std::int64_t* picks, std::int64_t num_picks, std::int64_t num_features,
                std::uint32_t* bitmap, Stream stream) {
  check_cuda(cudaMemsetAsync(bitmap, 0, num_words(num_features) * sizeof *bitmap, stream));
  if (num_picks == 0) return;
  launch(set_bits, grid_of(num_picks, kMarkThreads), kMarkThreads, stream, picks, num_picks, num_features,
         bitmap);
}

void list_kept(const std::uint32_t* bitmap, std::int64_t num_features, std::int64_t* kept, std::int64_t size,
               std::int64_t* num_kept, Stream stream) {
  launch(list_bits, dim3(1), kListThreads, stream, bitmap, num_words(num_features), kept, size, num_kept);
}

}  // namespace trimserve::cuda
