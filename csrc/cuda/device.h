// Shared by the kernels: launches, element types, packs of elements, counts and sums over the threads of a block.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace trimserve::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::int64_t kManyBlocks = 132 * 16;  // fill an H100; what is left is looped over

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t n, std::int64_t size) {
  return (n + size - 1) / size;
}

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("trimserve: CUDA refused a kernel: ") + cudaGetErrorString(error));
}

// Queues a kernel.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Blocks for `count` items at `per_block` each, where a kernel loops over what is left.
inline dim3 grid_of(std::int64_t count, std::int64_t per_block) {
  return dim3(static_cast<unsigned>(std::min(divide_up(count, per_block), kManyBlocks)));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// To nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Calls body with a null pointer of the element type.
template <typename Body>
void at_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<const float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<const __nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<const __half*>(nullptr));
  }
  throw std::invalid_argument("trimserve: no CUDA kernel for this dtype");
}

// kSize elements that are read in one access: the pointer must be a multiple of their bytes.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T elements[kSize];
};

// How many threads before this one have `flag`, in the order of threads; `total`: how many of the block.
// warp_counts: shared, kThreads / kWarp. All threads of the block must call it.
template <int kThreads>
__device__ int rank_in_block(bool flag, int* warp_counts, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  __syncthreads();  // until the counts of the call before are read
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp ? warp_counts[w] : 0;
    total += warp_counts[w];
  }
  return before + __popc(votes & ((1u << lane) - 1));
}

// Sum of `count` over the threads before this one; `total`: over the block. As rank_in_block.
template <int kThreads>
__device__ int sum_before(int count, int* warp_sums, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = count;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp ? warp_sums[w] : 0;
    total += warp_sums[w];
  }
  return before + sum - count;
}

}  // namespace trimserve::cuda
