// Kernels that race, each in a way that ThreadSanitizer must see: `racy NAME`. `racy sound` runs them all with the
// barriers that they lack.

#include <cstdio>
#include <cstring>

#include "cuda/device.h"

namespace {

using namespace trimserve::cuda;

constexpr int kThreads = 64;

// What another thread wrote, read without a barrier.
__global__ void read_too_early(int* result, bool has_barrier) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (has_barrier) __syncthreads();
  result[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Written again before all have read it.
__global__ void write_too_early(int* result, bool has_barrier) {
  __shared__ int value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = i;
    __syncthreads();
    result[threadIdx.x] = value;
    if (has_barrier) __syncthreads();
  }
}

// A warp's exchange orders no memory, not even that of its own lanes.
__global__ void trust_an_exchange(int* result, bool has_barrier) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  const unsigned votes = __ballot_sync(kAllLanes, true);
  if (has_barrier) __syncthreads();
  result[threadIdx.x] = values[threadIdx.x ^ 1] + __popc(votes);
}

struct Named {
  const char* name;
  void (*kernel)(int*, bool);
};
constexpr Named kKernels[] = {{"read_too_early", read_too_early},
                              {"write_too_early", write_too_early},
                              {"trust_an_exchange", trust_an_exchange}};

}  // namespace

int main(int, char** arguments) {
  static int result[kThreads];
  const bool is_sound = std::strcmp(arguments[1], "sound") == 0;
  for (const Named& each : kKernels) {
    if (is_sound || std::strcmp(arguments[1], each.name) == 0)
      launch(each.kernel, dim3(1), kThreads, nullptr, static_cast<int*>(result), is_sound);
  }
  std::printf("%d\n", result[0]);
}
