// The pybind11 module fastmeta._C_cuda: importing it registers the CUDA kernels, its functions tell how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "cuda/launch.h"

namespace {

namespace py = pybind11;
using Sizes = std::tuple<unsigned, unsigned, unsigned>;

struct PythonMachine : fastmeta::Machine {
  py::function on_allocated, on_computed, on_launch;

  void allocated(const void* data, int64_t bytes) override {
    py::gil_scoped_acquire gil;
    on_allocated(reinterpret_cast<uintptr_t>(data), bytes);
  }
  void computed(const void* data, int64_t bytes) override {
    py::gil_scoped_acquire gil;
    on_computed(reinterpret_cast<uintptr_t>(data), bytes);
  }
  void launch(const fastmeta::Kernel& kernel, dim3 grid, dim3 block, int64_t shared, const void* parameters, int64_t bytes) override {
    py::gil_scoped_acquire gil;
    on_launch(kernel.name, Sizes(grid.x, grid.y, grid.z), Sizes(block.x, block.y, block.z), shared,
              py::bytes(static_cast<const char*>(parameters), static_cast<size_t>(bytes)));
  }
};

PythonMachine* python_machine = nullptr;  // not destroyed at exit, when there is no Python any more

void set_machine(py::object allocated, py::object computed, py::object launch) {
  fastmeta::machine = nullptr;
  delete std::exchange(python_machine, nullptr);
  if (allocated.is_none()) return;
  python_machine = new PythonMachine;
  python_machine->on_allocated = allocated, python_machine->on_computed = computed, python_machine->on_launch = launch;
  fastmeta::machine = python_machine;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of fastmeta";
  module.def("build_info", [] {
    py::dict info;
    info["architectures"] = FASTMETA_CUDA_ARCHITECTURES;
    info["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["torch_stable_abi"] = FASTMETA_STABLE_ABI;
    return info;
  }, "How the extension was built: architectures, toolkit, torch_stable_abi.");
  module.def("set_machine", &set_machine, py::arg("allocated"), py::arg("computed"), py::arg("launch"),
             "For tests: operations called on the CUDA key hand their launches to `launch(name, grid, block, shared, parameters)`, and tell "
             "`allocated(address, bytes)` of each tensor they make, `computed(address, bytes)` of each that PyTorch computed for them. None three times: back to "
             "the device.");
}
