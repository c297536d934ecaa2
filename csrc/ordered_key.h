// The order of scores, stated once for host and device: larger first, tie: lower index, NaN last.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TRIMSERVE_HOST_DEVICE __host__ __device__
#else
#define TRIMSERVE_HOST_DEVICE
#endif

namespace trimserve {

// A key whose unsigned order is the order of scores; equal keys are ties. NaN is 0, below the key of -inf; -0
// and +0 tie.
TRIMSERVE_HOST_DEVICE inline std::uint32_t ordered_key(float score) {
  constexpr std::uint32_t kSign = 0x80000000u;
  if (score != score) return 0;
  if (score == 0.0f) return kSign;
  std::uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return (bits & kSign) ? ~bits : bits | kSign;
}

// Where a head stops picking in a segment: it picks the keys above the threshold, and those equal to it
// of features before ties_end.
struct Cut {
  std::uint32_t threshold;
  std::int32_t ties_end;
};

// Whether a cut picks the key of feature n, counted from the segment's first.
[[gnu::always_inline]] TRIMSERVE_HOST_DEVICE inline bool is_picked(const Cut& cut, std::uint32_t key,
                                                                   std::int32_t n) {
  return key > cut.threshold || (key == cut.threshold && n < cut.ties_end);
}

}  // namespace trimserve
