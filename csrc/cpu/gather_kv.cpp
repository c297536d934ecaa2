// gather_kv: copies the kept rows of features, keys and values.
//   source [N, row], rows stride_bytes apart     destination [M, row], contiguous     kept [M] int64
//   One pass: reads and writes M rows of each tensor, nothing else. Bound by memory bandwidth.

#include <cstring>

#include "kernels.h"

namespace trimserve::cpu {

void gather_kv(const GatherRows* tensors, std::int64_t num_tensors, const std::int64_t* kept,
               std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = 0; i < num_tensors; ++i) {
    const GatherRows& rows = tensors[i];
    if (rows.row_bytes == 0) continue;  // no memory behind the pointers
    for (std::int64_t m = begin; m < end; ++m) {
      std::memcpy(rows.destination + m * rows.row_bytes, rows.source + kept[m] * rows.stride_bytes,
                  static_cast<std::size_t>(rows.row_bytes));
    }
  }
}

}  // namespace trimserve::cpu
