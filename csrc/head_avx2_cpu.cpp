// The Detailer Head's levels on a CPU with AVX2 and FMA: head_cpu.h on 8 words. bfloat16 is widened to float32 as it
// is multiplied, so it halves memory and takes little more time.
#include "cpu.h"
#include "head.h"

#if defined(L2P_X86_TARGETS)

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "head_cpu.h"

namespace l2p {
namespace {

// A mask of the first `count` lanes.
__m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(count, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Avx2 {
  using Words = __m256i;
  using Floats = __m256;
  using Operand = __m256;
  static constexpr int64_t kLanes = 8;

  // 4 x 3 sums, 3 vectors of columns and a weight fill the 16 registers.
  static constexpr int outputs(int vectors) { return vectors == 1 ? 8 : 4; }

  static Words load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void store(uint32_t* to, Words words) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words); }
  static Words load_first(const uint32_t* from, int64_t count) {
    if (count >= kLanes) return load(from);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_lanes(count));
  }
  static void store_first(uint32_t* to, int64_t count, Words words) {
    if (count >= kLanes) return store(to, words);
    _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first_lanes(count), words);
  }
  static Words broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

  static Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
  static void store_floats(float* to, Floats values) { _mm256_storeu_ps(to, values); }
  static Floats set(float value) { return _mm256_set1_ps(value); }
  static Floats multiply_add(Operand a, Operand b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Floats add_to_lane(Floats sum, int64_t lane, float value) {
    const __m256i only = _mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int>(lane)),
                                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_add_ps(sum, _mm256_and_ps(_mm256_castsi256_ps(only), set(value)));
  }

  static Floats floats(Words words) { return _mm256_castsi256_ps(words); }
  static Words words(Floats values) { return _mm256_castps_si256(values); }
  static Floats low_floats(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static Floats high_floats(Words words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void deinterleave(const float* from, Floats& even, Floats& odd) {
    const __m256 left = _mm256_loadu_ps(from), right = _mm256_loadu_ps(from + kLanes);
    even = in_order(_mm256_shuffle_ps(left, right, 0x88));
    odd = in_order(_mm256_shuffle_ps(left, right, 0xdd));
  }

  // x / (1 + exp(-x)), to about 2^-22.
  static Floats silu(Floats x) {
    __m256 t = _mm256_mul_ps(x, set(-1.44269504f));
    t = _mm256_min_ps(_mm256_max_ps(t, set(-126)), set(128));  // 2^128 is infinite, so x far below 0 becomes 0
    const __m256 whole = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 rest = _mm256_sub_ps(t, whole);
    __m256 power = set(1.5403530e-4f);  // 2^rest on [-0.5, 0.5]
    power = _mm256_fmadd_ps(power, rest, set(1.3333558e-3f));
    power = _mm256_fmadd_ps(power, rest, set(9.6181291e-3f));
    power = _mm256_fmadd_ps(power, rest, set(5.5504109e-2f));
    power = _mm256_fmadd_ps(power, rest, set(2.4022651e-1f));
    power = _mm256_fmadd_ps(power, rest, set(6.9314718e-1f));
    power = _mm256_fmadd_ps(power, rest, set(1));
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(power), _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23));
    return _mm256_div_ps(x, _mm256_add_ps(set(1), _mm256_castsi256_ps(scaled)));
  }

  // A square of words, mirrored.
  static void transpose(Words (&r)[8]) {
    __m256i t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
      t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

 protected:
  static Floats in_order(Floats quarters) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(quarters), 0xd8));
  }
  // NaN where one of the two is, as PyTorch's pool; the instruction alone takes b then.
  static Floats max_floats(Floats a, Floats b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
};

struct Avx2F32 : Avx2 {
  static constexpr Element kType = Element::f32;
  static constexpr bool kWinograd = true;
  static constexpr int64_t kPer = 1;
  static constexpr int kParts = 1;
  static Operand operand(Words words, int) { return _mm256_castsi256_ps(words); }
  static Words join(const Floats (&values)[1]) { return _mm256_castps_si256(values[0]); }
  static Words max(Words a, Words b) {
    return _mm256_castps_si256(max_floats(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  }
  static void store_interleaved(uint32_t* to, int64_t count, const Floats (&values)[2]) {
    const __m256i low = _mm256_castps_si256(_mm256_unpacklo_ps(values[0], values[1]));
    const __m256i high = _mm256_castps_si256(_mm256_unpackhi_ps(values[0], values[1]));
    store_first(to, 2 * count, _mm256_permute2x128_si256(low, high, 0x20));
    if (2 * count > kLanes) store_first(to + kLanes, 2 * count - kLanes, _mm256_permute2x128_si256(low, high, 0x31));
  }
};

struct Avx2Bf16 : Avx2 {
  static constexpr Element kType = Element::bf16;
  static constexpr bool kWinograd = false;
  static constexpr int64_t kPer = 2;
  static constexpr int kParts = 2;
  static Operand operand(Words words, int part) { return part == 0 ? low_floats(words) : high_floats(words); }
  static Words join(const Floats (&values)[2]) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(values[0]), 16), rounded(values[1]), 0xaa);
  }
  static Words max(Words a, Words b) {
    const __m256i low = _mm256_castps_si256(max_floats(low_floats(a), low_floats(b)));
    const __m256i high = _mm256_castps_si256(max_floats(high_floats(a), high_floats(b)));
    return _mm256_or_si256(_mm256_srli_epi32(low, 16), high);
  }
  static void store_interleaved(uint32_t* to, int64_t count, const Floats (&values)[2]) {
    store_first(to, count, join(values));
  }

 private:
  // bfloat16, nearest even, in the upper half; what is not a number stays so.
  static Words rounded(Floats values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  }
};

}  // namespace

void head_level_avx2(const HeadLevel& level) {
  level.type == Element::f32 ? run_level<Avx2F32>(level) : run_level<Avx2Bf16>(level);
}

}  // namespace l2p

#pragma GCC pop_options

#endif
