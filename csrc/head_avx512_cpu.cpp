// The Detailer Head's levels on a CPU with AVX-512: head_cpu.h on 16 words, bfloat16 by its dot products.
#include "cpu.h"
#include "head.h"

#if defined(L2P_X86_TARGETS)

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

// GCC 12 takes its own intrinsics' placeholders for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

#include "head_cpu.h"

namespace l2p {
namespace {

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

struct Avx512 {
  using Words = __m512i;
  using Floats = __m512;
  static constexpr int64_t kLanes = 16;

  // 8 x 3 sums, 3 vectors of columns and weights fit the 32 registers.
  static constexpr int outputs(int) { return 8; }

  static Words load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(uint32_t* to, Words words) { _mm512_storeu_si512(to, words); }
  static Words load_first(const uint32_t* from, int64_t count) {
    return _mm512_maskz_loadu_epi32(first_lanes(count), from);
  }
  static void store_first(uint32_t* to, int64_t count, Words words) {
    _mm512_mask_storeu_epi32(to, first_lanes(count), words);
  }
  static Words broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

  static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
  static void store_floats(float* to, Floats values) { _mm512_storeu_ps(to, values); }
  static Floats set(float value) { return _mm512_set1_ps(value); }
  static Floats add_to_lane(Floats sum, int64_t lane, float value) {
    return _mm512_mask_add_ps(sum, static_cast<__mmask16>(1u << lane), sum, set(value));
  }

  static Floats floats(Words words) { return _mm512_castsi512_ps(words); }
  static Words words(Floats values) { return _mm512_castps_si512(values); }
  static Floats low_floats(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static Floats high_floats(Words words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void deinterleave(const float* from, Floats& even, Floats& odd) {
    alignas(64) static constexpr int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const __m512 left = _mm512_loadu_ps(from), right = _mm512_loadu_ps(from + kLanes);
    const __m512i order = _mm512_load_si512(kEven);
    even = _mm512_permutex2var_ps(left, order, right);
    odd = _mm512_permutex2var_ps(left, _mm512_add_epi32(order, _mm512_set1_epi32(1)), right);
  }

  // A square of words, mirrored.
  L2P_INLINE static void transpose(Words (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
      r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
      r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
      r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
  }

 protected:
  // 1 + exp(-x), where the polynomial gives 2^rest on [-0.5, 0.5].
  template <int N>
  L2P_INLINE static Floats one_and_exp(Floats x, const float (&polynomial)[N]) {
    const __m512 t = _mm512_mul_ps(x, set(-1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(t, whole);
    __m512 power = set(polynomial[0]);
#pragma GCC unroll 8
    for (int i = 1; i < N; ++i) power = _mm512_fmadd_ps(power, rest, set(polynomial[i]));
    return _mm512_add_ps(_mm512_scalef_ps(power, whole), set(1));
  }
  // NaN where one of the two is, as PyTorch's pool; the instruction alone takes b then.
  static Floats max_floats(Floats a, Floats b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
};

struct Avx512F32 : Avx512 {
  using Operand = __m512;
  static constexpr Element kType = Element::f32;
  static constexpr bool kWinograd = true;
  static constexpr int64_t kPer = 1;
  static constexpr int kParts = 1;
  static Operand operand(Words words, int) { return _mm512_castsi512_ps(words); }
  static Floats multiply_add(Operand a, Operand b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Floats silu(Floats x) {  // to about 2^-22
    return _mm512_div_ps(x, one_and_exp(x, {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                                            6.9314718e-1f, 1.0f}));
  }
  static Words join(const Floats (&values)[1]) { return _mm512_castps_si512(values[0]); }
  static Words max(Words a, Words b) {
    return _mm512_castps_si512(max_floats(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static void store_interleaved(uint32_t* to, int64_t count, const Floats (&values)[2]) {
    alignas(64) static constexpr int32_t kOrder[16] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const __m512i order = _mm512_load_si512(kOrder), later = _mm512_add_epi32(order, _mm512_set1_epi32(8));
    store_first(to, 2 * count, _mm512_castps_si512(_mm512_permutex2var_ps(values[0], order, values[1])));
    if (2 * count <= kLanes) return;
    store_first(to + kLanes, 2 * count - kLanes,
                _mm512_castps_si512(_mm512_permutex2var_ps(values[0], later, values[1])));
  }
};

struct Avx512Bf16 : Avx512 {
  using Operand = __m512bh;
  static constexpr Element kType = Element::bf16;
  static constexpr bool kWinograd = false;
  static constexpr int64_t kPer = 2;
  static constexpr int kParts = 1;
  static Operand operand(Words words, int) { return reinterpret_cast<__m512bh>(words); }
  static Floats multiply_add(Operand a, Operand b, Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
  static Floats silu(Floats x) {  // to about 2^-14
    return _mm512_mul_ps(x, _mm512_rcp14_ps(one_and_exp(x, {0.0096181f, 0.0555041f, 0.2402265f, 0.6931472f, 1.0f})));
  }
  // Rounded to nearest even.
  static Words join(const Floats (&values)[2]) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0]));
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  }
  static Words max(Words a, Words b) {
    const __m512i low = _mm512_castps_si512(max_floats(low_floats(a), low_floats(b)));
    const __m512i high = _mm512_castps_si512(max_floats(high_floats(a), high_floats(b)));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
  }
  static void store_interleaved(uint32_t* to, int64_t count, const Floats (&values)[2]) {
    store_first(to, count, join(values));
  }
};

}  // namespace

void head_level_avx512(const HeadLevel& level) {
  level.type == Element::f32 ? run_level<Avx512F32>(level) : run_level<Avx512Bf16>(level);
}

}  // namespace l2p

#pragma GCC pop_options
#pragma GCC diagnostic pop

#endif
