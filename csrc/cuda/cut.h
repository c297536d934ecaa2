// The cut of one head through a segment's scores, found by one block with radix select.
//
// The k-th largest key is built from its top, 11, 11 and 10 bits at a time: a histogram of the next bits of the keys
// that agree so far, counted from its end, tells the digit. Scores are read once per digit, once more where only some
// of the ties are picked. Counts are sums of integers, so results repeat bit for bit whatever the order of the atomics.

#pragma once

#include "device.h"

namespace trimserve::cuda {

constexpr int kCutThreads = 1024;
constexpr int kLongDigit = 11, kLastDigit = 10;  // bits
constexpr int kMaxBins = 1 << kLongDigit;
static_assert(2 * kLongDigit + kLastDigit == 32);
static_assert(kMaxBins % kCutThreads == 0 && (1 << kLastDigit) % kCutThreads == 0);

// Shared memory of make_cut.
struct CutScratch {
  int counts[kMaxBins];
  int warps[kCutThreads / kWarp];
  std::uint32_t digit;
  int wanted;
  std::int32_t ties_end;
};

// counts[i]: how many keys that begin with `prefix`, `above` bits long, go on with the kBits bits i.
template <int kBits>
__device__ void count_digits(const float* scores, std::int32_t size, std::uint32_t prefix, int above,
                             int* counts) {
  constexpr std::uint32_t kMask = (1u << kBits) - 1;
  const int shift = 32 - above - kBits;
  for (int i = threadIdx.x; i <= static_cast<int>(kMask); i += kCutThreads) counts[i] = 0;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < size; i += kCutThreads) {
    const std::uint32_t key = ordered_key(scores[i]);
    if (static_cast<std::uint64_t>(key) >> (shift + kBits) == prefix)
      atomicAdd(&counts[key >> shift & kMask], 1);
  }
  __syncthreads();
}

// The digit of the wanted-th largest key, and in scratch.wanted how many keys with that digit are wanted.
template <int kBits>
__device__ std::uint32_t find_digit(CutScratch& scratch, int wanted) {
  constexpr int kBins = 1 << kBits, kPerThread = kBins / kCutThreads;
  const int last = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // from the largest digit down
  int count = 0, total;
  for (int i = 0; i < kPerThread; ++i) count += scratch.counts[last - i];
  int before = sum_before<kCutThreads>(count, scratch.warps, total);
  if (before < wanted && wanted <= before + count) {
    int digit = last;
    while (before + scratch.counts[digit] < wanted) before += scratch.counts[digit--];
    scratch.digit = static_cast<std::uint32_t>(digit);
    scratch.wanted = wanted - before;
  }
  __syncthreads();
  return scratch.digit;
}

// The cut below the k largest of `size` scores; 1 <= k <= size. Called by all kCutThreads threads of a block.
__device__ inline Cut make_cut(const float* scores, std::int32_t size, std::int32_t k, CutScratch& scratch) {
  count_digits<kLongDigit>(scores, size, 0, 0, scratch.counts);
  std::uint32_t key = find_digit<kLongDigit>(scratch, k);
  count_digits<kLongDigit>(scores, size, key, kLongDigit, scratch.counts);
  key = key << kLongDigit | find_digit<kLongDigit>(scratch, scratch.wanted);
  count_digits<kLastDigit>(scores, size, key, 2 * kLongDigit, scratch.counts);
  const std::uint32_t digit = find_digit<kLastDigit>(scratch, scratch.wanted);
  key = key << kLastDigit | digit;

  const int ties = scratch.wanted;
  if (ties == scratch.counts[digit]) return {key, size};
  int count = 0, total;
  for (std::int64_t first = 0; count < ties; first += kCutThreads) {  // lower indices first
    const std::int64_t i = first + threadIdx.x;
    const bool is_tie = i < size && ordered_key(scores[i]) == key;
    const int rank = rank_in_block<kCutThreads>(is_tie, scratch.warps, total);
    if (is_tie && count + rank + 1 == ties) scratch.ties_end = static_cast<std::int32_t>(i + 1);
    count += total;
  }
  __syncthreads();
  return {key, scratch.ties_end};
}

}  // namespace trimserve::cuda
