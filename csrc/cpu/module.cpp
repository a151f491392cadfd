// The pybind11 module fastmeta._C: importing it registers the CPU kernels, its functions tell how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/simd.h"

namespace {

// The clone that the loader picks on this processor.
std::string instruction_set() {
  const std::vector<std::string> built{FASTMETA_INSTRUCTION_SETS};
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return built[2];
  if (__builtin_cpu_supports("x86-64-v3")) return built[1];
#endif
  return built[0];
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of fastmeta";
  module.def("instruction_set", &instruction_set, "The instruction set that the kernels run with on this processor.");
  module.def("build_info", [] {
    pybind11::dict info;
    info["instruction_sets"] = std::vector<std::string>{FASTMETA_INSTRUCTION_SETS};
    info["compiler"] = __VERSION__;
    info["torch_stable_abi"] = FASTMETA_STABLE_ABI;
    return info;
  }, "How the extension was built: instruction_sets, compiler, torch_stable_abi.");
}
