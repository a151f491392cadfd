// Tensors, memory and threads for the kernels of the CPU, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace fastmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The positions in fastmeta.reference.cosine_attention.EPS_MODES.
enum EpsMode : int64_t { kClamp, kAdd, kSqrt };

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised numbers on a cache line boundary.
template <typename T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

template <typename Body> void for_each_task(int64_t count, int64_t grain, const Body& body) {
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  if (grain >= count)
    range(0, count);
  else
    torch::stable::parallel_for(0, count, grain, range);
}

// Without the dispatcher, which would be half of the time of a small call.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <typename T> inline constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// run(0.0) for float64, run(0.f) for float32.
template <typename Run> auto for_dtype(const Tensor& t, const Run& run) {
  return t.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A contiguous tensor, or none, and where the numbers of each index of its first dimension begin.
template <typename T> class Rows {
 public:
  Rows() = default;
  explicit Rows(const Tensor& t) : tensor_(as_contiguous(t)) {
    data_ = static_cast<T*>(const_cast<void*>(tensor_->const_data_ptr()));
    each_ = t.size(0) ? t.numel() / t.size(0) : 0;
  }
  explicit Rows(const Optional& t) {
    if (t) *this = Rows(*t);
  }
  // Uninitialised.
  static Rows make(const std::vector<int64_t>& sizes) { return Rows(empty(sizes, kScalarType<T>)); }

  T* operator[](int64_t i) const { return data_ ? data_ + i * each_ : nullptr; }
  const Tensor& tensor() const { return *tensor_; }

 private:
  Optional tensor_;
  T* data_ = nullptr;
  int64_t each_ = 0;
};

}  // namespace fastmeta
