// Tells how the extension was built, on machines where the kernels themselves don't load, too. It needs nothing of
// PyTorch. l2p_build_info.h is written by setup.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "l2p_build_info.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What this processor has of the instruction sets that the CPU kernels are cloned or worth writing for.
std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#endif
  return found;
}

py::dict info() {
  py::dict result;
  result["compiler"] = compiler();
  result["torch"] = L2P_BUILT_TORCH;
  result["torch_abi"] = L2P_TORCH_ABI;
  result["flags"] = L2P_CXX_FLAGS;
  result["cuda"] = std::string(L2P_CUDA_VERSION).empty() ? py::object(py::none()) : py::object(py::str(L2P_CUDA_VERSION));
  result["cuda_architectures"] = std::vector<std::string>(L2P_CUDA_ARCHITECTURES);
  result["cuda_flags"] = L2P_NVCC_FLAGS;
  result["pybind11"] = py::str("{}.{}.{}").format(PYBIND11_VERSION_MAJOR, PYBIND11_VERSION_MINOR, PYBIND11_VERSION_PATCH);
  result["cpu_capabilities"] = cpu_capabilities();
  return result;
}

}  // namespace

PYBIND11_MODULE(_build, module) {
  module.doc() = "How l2p_fast's compiled extension was built.";
  module.def("info", &info, "A dict: compiler, PyTorch built against, flags, CUDA version and architectures or none.");
}
