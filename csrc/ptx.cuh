// The PTX instructions that CUDA C++ has no function for, one function each. tests/cuda_on_cpu, where no PTX runs,
// has functions of the same names.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace l2p {

#if defined(__CUDACC__)
// mma.m16n8k16: c += a b, of bfloat16 pairs, each fragment laid out over the lanes as PTX says.
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace l2p
