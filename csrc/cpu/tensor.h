// Tensors, memory and threads for the kernels of the CPU, on torch's stable ABI.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "common/cosine.h"
#include "common/tensor.h"

namespace fastmeta {

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

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) { return empty(sizes, dtype, aoti_torch_device_type_cpu(), 0); }

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
