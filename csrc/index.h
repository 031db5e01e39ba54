// Divides indices. A GPU divides 64 bits in a call of some 100 instructions, 32 bits in a fifth of that, without one.
#pragma once

#include <cstdint>

#include "element.h"

namespace l2p {

struct Divided {
  int64_t quotient, remainder;
};

// Neither is negative; on a GPU both are below 2^32, which is for the launch to check (`too_many`).
L2P_HOST_DEVICE inline Divided divided(int64_t value, int64_t by) {
#if defined(__CUDA_ARCH__)
  const auto small = static_cast<uint32_t>(value), small_by = static_cast<uint32_t>(by);
  return {small / small_by, small % small_by};
#else
  return {value / by, value % by};
#endif
}

// Why a kernel can't run over so many indices. Null: it can.
inline const char* too_many(int64_t indices) {
  return indices >> 32 == 0 ? nullptr : "more than 2^32 elements are too many for a GPU's kernel";
}

}  // namespace l2p
