// From the host to the device: tensors, the stream, and the one place where kernels are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/tensor.h"

namespace fastmeta {

// A kernel: `function` is its host stub, `name` what it is called in the compiled code.
struct Kernel {
  const char* name;
  const void* function;
};
#define FASTMETA_KERNEL(name) ::fastmeta::Kernel { #name, reinterpret_cast<const void*>(&name) }

// Stands in for the device: where one is set, launches go to it with everything that the device would have got, and nothing is asked of the
// CUDA runtime. The tests set the PTX machine, so that they run this very host code on tensors of the CPU.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual void allocated(const void* data, int64_t bytes) = 0;
  virtual void computed(const void* data, int64_t bytes) = 0;  // by a kernel of PyTorch's
  virtual void launch(const Kernel& kernel, dim3 grid, dim3 block, int64_t shared, const void* parameters, int64_t bytes) = 0;
};
extern Machine* machine;

// Where the numbers of a tensor begin; null where it has none.
template <typename T> T* data(const Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; }

// A size as the kernels have it.
int32_t small(int64_t size);

// The device of the tensors of a call, current as long as this lives.
class Device {
 public:
  explicit Device(const Tensor& t);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // An uninitialised contiguous tensor on the device.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const;
  // A tensor itself, or a copy that is contiguous.
  Tensor contiguous(const Tensor& t) const;
  Optional contiguous(const Optional& t) const { return t ? Optional(contiguous(*t)) : t; }
  // The library's product of two matrices.
  Tensor product(const Tensor& a, const Tensor& b) const;
  // Bytes of shared memory that a block can have.
  int64_t shared_limit() const;
  // Whether its tensor cores take tf32.
  bool has_tf32() const;
  template <typename Parameters>
  void launch(const Kernel& kernel, int64_t blocks, int threads, int64_t shared, const Parameters& parameters) const {
    launch(kernel, blocks, threads, shared, &parameters, sizeof parameters);
  }

 private:
  void launch(const Kernel& kernel, int64_t blocks, int threads, int64_t shared, const void* parameters, int64_t bytes) const;

  int32_t type_, index_;
  void *guard_ = nullptr, *stream_ = nullptr;
};

}  // namespace fastmeta
