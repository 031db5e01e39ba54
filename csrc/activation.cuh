// SiLU by the two instructions that a GPU has for it, for results that are rounded to bfloat16.
#pragma once

#include "ptx.cuh"

namespace l2p {

__device__ inline float fast_silu(float x) { return x * reciprocal(1.0f + power_of_two(x * -1.4426950408889634f)); }

}  // namespace l2p
