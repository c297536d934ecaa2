// Instructions that CUDA C++ has no name for.

#pragma once

#ifndef __CUDACC__

#include "cuda_ptx.h"  // what stands for them where kernels run on the CPU: tests/csrc/fibers

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace trimserve::cuda {

// Adds to d [16, 8] the product of a [16, 16] and b [16, 8], on tensor cores; all lanes of the warp take part. Each
// register of a and b has two elements. Lane 4 g + c holds, of
//   a: rows g and g + 8 of the left half, then of the right half, at columns 2 c and 2 c + 1 of the half
//   b: column g, at rows 2 c and 2 c + 1 of the upper half, of the lower half
//   d: row g at columns 2 c and 2 c + 1, row g + 8 at the same
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <typename T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2 to the power of x, off by 2^-22 of it; 0 below 2^-126. One instruction where exp2f takes four.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace trimserve::cuda

#endif
