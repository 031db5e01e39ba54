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

// ldmatrix.x4: four 8 x 8 matrices of 16-bit values from shared memory. Lane l gives the address of row l % 8 of matrix
// l / 8, and gets of every matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// cp.async: 16 bytes to shared memory in the background, `count` of them copied, the rest zero. What was copied since the
// last commit is a group; a thread waits until all but the last `groups_left` of its groups, 0 or 1, have come.
__device__ inline void copy_async(void* to, const void* from, int count = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(count)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_copies(int groups_left) {
  if (groups_left == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
}

// One instruction each, exact to 22 bits or so; of 1 / x nothing is left where it is below 2^-126.
__device__ inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

}  // namespace l2p
