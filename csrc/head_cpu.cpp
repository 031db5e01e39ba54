// Which of the Detailer Head's CPU kernels this processor runs.
#include "cpu.h"
#include "head.h"

namespace l2p {

#if defined(L2P_X86_TARGETS)

HeadKernel head_kernel_cpu() {
  switch (this_cpu()) {
    case Cpu::avx512: return __builtin_cpu_supports("avx512bf16") ? head_level_avx512 : head_level_avx2;
    case Cpu::avx2: return head_level_avx2;
    case Cpu::baseline: break;
  }
  return nullptr;
}

#else

HeadKernel head_kernel_cpu() { return nullptr; }

#endif

}  // namespace l2p
