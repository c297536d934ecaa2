// CUDA's words for a C++ compiler, so that tests run the kernels of csrc/cuda on a machine without GPU and without
// nvcc.
//
// Blocks run one after another. fibers.cpp has the threads of a block as fibers: one runs until it meets a barrier or a
// warp's exchange, then the next of its warp; a warp runs as far ahead of the others as barriers let it, and which one
// does changes from block to block, so that a missing barrier shows. ../threads/threads.cpp has them as threads, for
// ThreadSanitizer. Shared memory is static. What the kernels do not use is not here. For one host thread.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#ifdef TRIMSERVE_REAL_THREADS
inline thread_local dim3 threadIdx;
#else
inline dim3 threadIdx;
#endif
inline dim3 blockIdx, blockDim, gridDim;

// --- threads; fibers.cpp or ../threads/threads.cpp ---

namespace fibers {

constexpr unsigned kWarp = 32;

inline std::uint64_t num_launches = 0;  // kernels and memsets until now

// Runs body in `threads` fibers until all are done; throws if some wait for others that do not come.
void run_block(unsigned threads, const std::function<void()>& body);

// The values of all lanes of the warp, once all have given theirs.
const std::uint32_t* exchange(std::uint32_t value);

template <typename T>
const std::uint32_t* exchange_bits(T value) {
  std::uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  std::memcpy(&bits, &value, sizeof bits);
  return exchange(bits);
}

template <typename T>
T from_bits(std::uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fibers

void __syncthreads();

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const unsigned lane = threadIdx.x % fibers::kWarp;
  return fibers::from_bits<T>(fibers::exchange_bits(value)[lane ^ static_cast<unsigned>(offset)]);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % fibers::kWarp;
  return fibers::from_bits<T>(fibers::exchange_bits(value)[lane >= offset ? lane - offset : lane]);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return fibers::from_bits<T>(fibers::exchange_bits(value)[lane]);
}

inline unsigned __ballot_sync(unsigned, bool flag) {
  const std::uint32_t* const flags = fibers::exchange(flag);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < fibers::kWarp; ++lane) votes |= flags[lane] << lane;
  return votes;
}

// --- arithmetic ---

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
T atomicAdd(T* place, T value) {
  return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* place, T value) {
  return __atomic_fetch_or(place, value, __ATOMIC_RELAXED);
}

// --- the host's side ---

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t count, cudaStream_t) {
  ++fibers::num_launches;
  if (count > 0) std::memset(memory, value, count);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  ++fibers::num_launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        fibers::run_block(blockDim.x, [&] { kernel(static_cast<Parameters>(arguments)...); });
      }
    }
  }
  return cudaSuccess;
}
