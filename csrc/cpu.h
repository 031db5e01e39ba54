// What every CPU kernel shares: element types, loads and stores that the compiler can vectorize, one build for
// every processor. Included only by *_cpu.cpp files.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "element.h"

// What on_this_cpu is given must become part of its clones, with all it calls, to be compiled for their processors.
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

// Where code is built for processors that only some of those it runs on are.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define L2P_X86_TARGETS
#define L2P_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define L2P_AVX512 L2P_AVX2 ",avx512f,avx512cd,avx512bw,avx512dq,avx512vl"

enum class Cpu { baseline, avx2, avx512 };

// What this processor has; of it at most AVX2 with L2P_CPU=avx2, so that one machine can test both.
inline Cpu this_cpu() {
  static const Cpu widest = [] {
    __builtin_cpu_init();
    const auto has = [](auto... answers) { return (static_cast<bool>(answers) && ...); };
    if (!has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi2"))) {
      return Cpu::baseline;
    }
    return has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512cd"), __builtin_cpu_supports("avx512bw"),
               __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"))
               ? Cpu::avx512
               : Cpu::avx2;
  }();
  const char* pretended = std::getenv("L2P_CPU");
  return widest == Cpu::avx512 && pretended != nullptr && std::strcmp(pretended, "avx2") == 0 ? Cpu::avx2 : widest;
}

template <typename Body>
__attribute__((target(L2P_AVX512), noinline)) void with_avx512(const Body& body) { body(); }
template <typename Body>
__attribute__((target(L2P_AVX2), noinline)) void with_avx2(const Body& body) { body(); }

// Calls body(), compiled for the widest instructions that this processor has: one build runs everywhere.
template <typename Body>
void on_this_cpu(const Body& body) {
  switch (this_cpu()) {
    case Cpu::avx512: return with_avx512(body);
    case Cpu::avx2: return with_avx2(body);
    case Cpu::baseline: return body();
  }
}
#else
template <typename Body>
void on_this_cpu(const Body& body) { body(); }
#endif

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
