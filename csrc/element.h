// Names for the element types that cross between the C++ faces (PyTorch's types) and the kernels (CUDA's or plain ones).
#pragma once

namespace l2p {

enum class Element { f32, f64, f16, bf16 };

inline int element_bytes(Element element) {
  return element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2;
}

}  // namespace l2p

#if defined(__CUDACC__)
#define L2P_HOST_DEVICE __host__ __device__
#else
#define L2P_HOST_DEVICE
#endif
