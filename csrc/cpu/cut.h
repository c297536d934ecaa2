// The cut that a head makes through a segment's scores: what it picks lies above.
//
// Found without sorting: the k-th largest key is built bit by bit from the top, each time counting the keys that are as
// large. That is 32 passes over keys that stay in the first-level cache, without a branch on data, so the compiler
// makes vectors of them; partitioning takes fewer steps, but each of them guesses.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace trimserve::cpu {

// The cut below the k largest of `size` scores; 1 <= k <= size. keys: workspace of that size.
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
