#include "cuda/launch.h"

#include <limits>
#include <stdexcept>
#include <string>

// Not in torch builds without CUDA, under which this module is loaded for the PTX machine only.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastmeta {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": CUDA error: " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "fastmeta");
  return value;
}

}  // namespace

Machine* machine = nullptr;

int32_t small(int64_t size) {
  if (size > std::numeric_limits<int32_t>::max() / 2)
    throw std::runtime_error("fastmeta: on a GPU a dimension must be less than 2^30, got " + std::to_string(size));
  return static_cast<int32_t>(size);
}

Device::Device(const Tensor& t) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type_));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index_));
  if (machine) return;
  DeviceGuardHandle guard;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index_, &guard));
  guard_ = guard;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
}

Device::~Device() {
  if (guard_) aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
}

Tensor Device::empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
  Tensor t = fastmeta::empty(sizes, dtype, type_, index_);
  if (machine) machine->allocated(t.const_data_ptr(), t.numel() * t.element_size());
  return t;
}

Tensor Device::contiguous(const Tensor& t) const {
  if (t.is_contiguous()) return t;
  Tensor copy = torch::stable::contiguous(t);
  if (machine) machine->computed(copy.const_data_ptr(), copy.numel() * copy.element_size());
  return copy;
}

Tensor Device::product(const Tensor& a, const Tensor& b) const {
  Tensor result = torch::stable::matmul(a, b);
  if (machine) machine->computed(result.const_data_ptr(), result.numel() * result.element_size());
  return result;
}

int64_t Device::shared_limit() const {
  return machine ? 99 * 1024 : attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index_);  // the machine: as sm_86, 89 and 120
}

bool Device::has_tf32() const { return machine || attribute(cudaDevAttrComputeCapabilityMajor, index_) >= 8; }

void Device::launch(const Kernel& kernel, int64_t blocks, int threads, int64_t shared, const void* parameters, int64_t bytes) const {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error(std::string(kernel.name) + ": needs " + std::to_string(blocks) + " blocks, a launch has at most 2147483647");
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  if (machine) return machine->launch(kernel, grid, block, shared, parameters, bytes);
  if (shared > 48 * 1024)  // what a block has without asking
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), kernel.name);
  void* arguments[] = {const_cast<void*>(parameters)};
  check(cudaLaunchKernel(kernel.function, grid, block, arguments, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream_)), kernel.name);
}

}  // namespace fastmeta
