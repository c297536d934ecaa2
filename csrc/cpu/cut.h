// The cut of one head through a segment's scores: the head picks what lies above.
//
// The k-th largest key is built bit by bit from the top, each time counting the keys that are at least as large. The 32
// passes read keys that stay in the first-level cache and have no branch on data, so the compiler vectorises them.
// Partitioning would take fewer steps, but mispredict in each.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {

// The cut below the k largest of `size` scores; 1 <= k <= size. keys [size] receives their ordered keys.
TRIMSERVE_INLINE Cut make_cut(const float* scores, std::int32_t size, std::int32_t k, std::uint32_t* keys) {
  for (std::int32_t i = 0; i < size; ++i) keys[i] = ordered_key(scores[i]);
  std::uint32_t threshold = 0;
  for (std::uint32_t bit = 1u << 31; bit; bit >>= 1) {
    std::int32_t count = 0;
    for (std::int32_t i = 0; i < size; ++i) count += keys[i] >= (threshold | bit);
    if (count >= k) threshold |= bit;
  }
  std::int32_t above = 0, ties = 0;
  for (std::int32_t i = 0; i < size; ++i) {
    above += keys[i] > threshold;
    ties += keys[i] == threshold;
  }
  std::int32_t ties_end = size;
  while (above + ties > k) ties -= keys[--ties_end] == threshold;  // lower indices first
  return {threshold, ties_end};
}

}  // namespace trimserve::cpu
