// Why: what every CPU kernel shares: element types, loads and stores that the compiler can vectorize, one build for
// every processor. Included only by *_cpu.cpp files.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "element.h"

// One build runs on every x86-64 processor: the loader picks the widest clone the processor has. Levels and features,
// not models ("arch=haswell"): those match one maker's one generation.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && __GNUC__ >= 12
#define L2P_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define L2P_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define L2P_CLONES
#endif
// What a clone calls must become part of it, to be compiled for its processor.
#define L2P_INLINE __attribute__((always_inline)) inline
#define L2P_INLINE_LAMBDA __attribute__((always_inline))

namespace l2p {

using torch::headeronly::Half;

// bfloat16 as its bits, so that the compiler sees only integer arithmetic in the vector loops.
struct Bits16 {
  uint16_t bits;
};

// What values of a type are computed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

L2P_INLINE float load(float value) { return value; }
L2P_INLINE double load(double value) { return value; }
L2P_INLINE float load(Half value) { return static_cast<float>(value); }
L2P_INLINE float load(Bits16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

template <typename A>
L2P_INLINE void store(float& to, A value) { to = static_cast<float>(value); }
template <typename A>
L2P_INLINE void store(double& to, A value) { to = static_cast<double>(value); }
template <typename A>
L2P_INLINE void store(Half& to, A value) { to = static_cast<Half>(static_cast<float>(value)); }
template <typename A>
L2P_INLINE void store(Bits16& to, A given) {
  const float value = static_cast<float>(given);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Calls body(T{}) with the element type.
template <typename Body>
L2P_INLINE void with_type(Element element, const Body& body) {
  switch (element) {
    case Element::f32: return body(float{});
    case Element::f64: return body(double{});
    case Element::f16: return body(Half{});
    case Element::bf16: return body(Bits16{});
  }
}

// A large result is fresh memory: in 4 KB pages, the first touch of each costs more than filling it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#endif
}

}  // namespace l2p
