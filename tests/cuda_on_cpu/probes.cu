// Kernels that use what the package's do not yet, so that the tests can show that the emulator finds mistakes in it:
// copies to shared memory in the background, matrices loaded for tensor cores, votes, named in ../../csrc/ptx.cuh's way.
#include "cuda.cuh"
#include "index.h"
#include "ptx.cuh"

namespace {

constexpr int kTile = 64;  // rows of 16 values, of a and of out, that a block takes
constexpr int kRow = 24;   // values from row to row in shared memory: no two of 8 rows meet in a bank

// out (rows, 8) = a (rows, 16) b (16, 8), of bfloat16 values (b as 8 rows of 16), by blocks of one warp. The next 16 rows
// are on their way while the last are multiplied.
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* out, int rows) {
  uint16_t* shared = l2p::dynamic_shared<uint16_t>();  // twice 16 rows of a
  const int lane = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kTile;
  const auto fetch = [&](int part) {
    const int row = first + part * 16 + lane / 2;
    l2p::copy_async(shared + (part % 2 * 16 + lane / 2) * kRow + lane % 2 * 8, a + (row < rows ? row : 0) * 16 + lane % 2 * 8,
                    row < rows ? 16 : 0);
    l2p::commit_copies();
  };
  uint32_t right[2];
  for (int reg = 0; reg < 2; ++reg) memcpy(&right[reg], b + lane / 4 * 16 + lane % 4 * 2 + reg * 8, 4);
  fetch(0);
  for (int part = 0; part < kTile / 16; ++part) {
    if (part + 1 < kTile / 16) fetch(part + 1);
    l2p::wait_copies(part + 1 < kTile / 16 ? 1 : 0);
    __syncwarp();
    uint32_t left[4];
    l2p::load_matrices(left, shared + (part % 2 * 16 + lane % 16) * kRow + lane / 16 * 8);
    __syncwarp();
    float sums[4] = {};
    l2p::multiply(sums, left, right);
    for (int reg = 0; reg < 4; ++reg) {
      const int row = first + part * 16 + lane / 4 + reg / 2 * 8;
      if (row < rows) out[row * 8 + lane % 4 * 2 + reg % 2] = sums[reg];
    }
  }
}

// counts[w] = how many of values[32 w ...] are above zero, by one block.
__global__ void count_kernel(const float* values, int32_t* counts, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned votes = __ballot_sync(0xffffffffu, thread < count && values[thread] > 0);
  int sum = static_cast<int>(votes >> (thread % 32) & 1);
  for (unsigned by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
  if (thread % 32 == 0 && thread < count) counts[thread / 32] = sum;
}

// quotients[i], remainders[i] = values[i] by by[i], as kernels divide indices.
__global__ void divide_kernel(const int64_t* values, const int64_t* by, int64_t* quotients, int64_t* remainders, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= count) return;
  const l2p::Divided divided = l2p::divided(values[thread], by[thread]);
  quotients[thread] = divided.quotient, remainders[thread] = divided.remainder;
}

}  // namespace

extern "C" const char* probe_product(const uint16_t* a, const uint16_t* b, float* out, int rows) {
  return l2p::launch(product_kernel, l2p::blocks_for(rows, kTile), 32, 2 * 16 * kRow * 2, nullptr, a, b, out, rows);
}
extern "C" const char* probe_count(const float* values, int32_t* counts, int count) {
  const int threads = (count + 31) / 32 * 32;
  return l2p::launch(count_kernel, 1, threads, 0, nullptr, values, counts, count);
}
extern "C" const char* probe_divide(const int64_t* values, const int64_t* by, int64_t* quotients, int64_t* remainders,
                                    int count) {
  return l2p::launch(divide_kernel, 1, (count + 31) / 32 * 32, 0, nullptr, values, by, quotients, remainders, count);
}
extern "C" const char* probe_too_many(const int64_t* indices) { return l2p::too_many(*indices); }
