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

}  // namespace trimserve
