// union_indices: merges every head's picks into one ascending list.
//   picks [H * K] int64, any order, repeats allowed     kept [min(H * K, N)] int64, ascending, unused tail -1
//   Marks one byte per feature, then reads the marks in order: each pick and each feature is touched once,
//   where sorting the picks would be H * K * log(H * K).

#include <algorithm>

#include "kernels.h"

namespace trimserve::cpu {

void mark_picks(const std::int64_t* picks, std::int64_t num_picks, std::int64_t num_features,
                std::uint8_t* is_kept) {
  std::fill_n(is_kept, num_features, std::uint8_t{0});
  for (std::int64_t i = 0; i < num_picks; ++i) is_kept[picks[i]] = 1;
}

std::int64_t list_kept(const std::uint8_t* is_kept, std::int64_t num_features, std::int64_t* kept,
                       std::int64_t size) {
  std::int64_t num_kept = 0;
  for (std::int64_t n = 0; n < num_features && num_kept < size; ++n) {
    kept[num_kept] = n;  // overwritten unless it counts
    num_kept += is_kept[n];
  }
  std::fill(kept + num_kept, kept + size, std::int64_t{-1});
  return num_kept;
}

}  // namespace trimserve::cpu
