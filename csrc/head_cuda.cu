// Why: one level of the Detailer Head on tensor cores, a tile a block: everything but the instruction is head_tile.h's.
// Weights are read through the L1 cache, where all warps of a block meet; the sums stay in registers over all taps.
#include <cuda_runtime.h>

#include "head_tile.h"

namespace l2p {
namespace {

struct DeviceWarp {
  struct A {
    uint32_t regs[4];
  };
  struct B {
    uint32_t regs[2];
  };
  struct C {
    float regs[4];
  };

  template <typename Fragment>
  __device__ static auto* of(Fragment& fragment, int) {
    return fragment.regs;
  }
  template <typename Body>
  __device__ static void lanes(const Body& body) {
    body(static_cast<int>(threadIdx.x % 32));
  }
  __device__ static uint32_t read(const uint32_t* word) { return __ldg(word); }
  __device__ static void clear(C& c) { c.regs[0] = c.regs[1] = c.regs[2] = c.regs[3] = 0.0f; }
  __device__ static void multiply(C& c, const A& a, const B& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.regs[0]), "+f"(c.regs[1]), "+f"(c.regs[2]), "+f"(c.regs[3])
        : "r"(a.regs[0]), "r"(a.regs[1]), "r"(a.regs[2]), "r"(a.regs[3]), "r"(b.regs[0]), "r"(b.regs[1]));
  }
};

__global__ void __launch_bounds__(kMaxTileRows * 32) head_kernel(HeadLevel level, TileLayout layout) {
  extern __shared__ uint32_t shared[];
  const Tile tile = tile_at(level, layout.rows, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  load_tile(level, layout, tile, shared, thread, threads);
  __syncthreads();
  compute_rows<DeviceWarp>(level, layout, tile, shared, thread / 32);
  __syncthreads();
  store_tile(level, layout, tile, shared, thread, threads);
}

}  // namespace

const char* head_level_cuda(const HeadLevel& level, void* stream) {
  const int rows = tile_rows(level);
  if (rows == 0) return "the level has more channels than shared memory holds";
  const TileLayout layout = tile_layout(level, rows);
  const int bytes = layout.words * 4;
  // The most that any level takes, so that threads with different levels can't lower each other's limit.
  cudaError_t error = cudaFuncSetAttribute(head_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto tiles = static_cast<unsigned>(tile_count(level, rows));
  head_kernel<<<tiles, rows * 32, bytes, static_cast<cudaStream_t>(stream)>>>(level, layout);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace l2p
