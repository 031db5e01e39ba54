// What kernels compiled with -fsanitize=undefined call, so that a mistake ends the launch with a line, not the process.
#include "emulator.h"

namespace {

// How GCC's data begin, whatever the check.
struct Where {
  const char* file;
  uint32_t line, column;
};

void found(const char* what, const void* data) {
  const Where& at = *static_cast<const Where*>(data);
  emulator::fail(std::string(what) + " in " + at.file + ":" + std::to_string(at.line));
}

}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t) { found("a misaligned access", data); }
void __ubsan_handle_out_of_bounds(void* data, uintptr_t) { found("an index beyond the array", data); }
void __ubsan_handle_add_overflow(void* data, uintptr_t, uintptr_t) { found("an overflow", data); }
void __ubsan_handle_sub_overflow(void* data, uintptr_t, uintptr_t) { found("an overflow", data); }
void __ubsan_handle_mul_overflow(void* data, uintptr_t, uintptr_t) { found("an overflow", data); }
void __ubsan_handle_negate_overflow(void* data, uintptr_t) { found("an overflow", data); }
void __ubsan_handle_divrem_overflow(void* data, uintptr_t, uintptr_t) { found("a division by zero", data); }
void __ubsan_handle_shift_out_of_bounds(void* data, uintptr_t, uintptr_t) { found("a shift beyond the type", data); }
}
