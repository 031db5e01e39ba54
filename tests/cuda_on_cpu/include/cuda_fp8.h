// Float8 as CUDA has it, for a CPU's compiler: by the format's definition (OCP 8-bit floating point, E4M3), not by bits.
#pragma once

#include "cuda_runtime.h"

using __nv_fp8_storage_t = unsigned char;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

inline double emulator_e4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
}
inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t) {
  const int sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return static_cast<__nv_fp8_storage_t>(sign | 0x7f);
  const double size = std::fabs(static_cast<double>(x));
  int code = 0;  // the last whose value is not above; codes grow with their values
  for (int step = 64; step > 0; step /= 2) {
    if (code + step < 0x7f && emulator_e4m3(code + step) <= size) code += step;
  }
  if (code < 0x7e) {
    const double below = size - emulator_e4m3(code), above = emulator_e4m3(code + 1) - size;
    if (above < below || (above == below && code % 2 == 1)) ++code;
  }
  return static_cast<__nv_fp8_storage_t>(sign | code);
}
