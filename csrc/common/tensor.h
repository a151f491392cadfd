// Tensors on torch's stable ABI, for the host code of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An uninitialised contiguous tensor. Without the dispatcher, which would be half of the time of a small call.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

template <typename T> inline constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline ScalarType accumulation_type(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// run(0.0) for float64, run(0.f) for everything smaller: what an operation computes in.
template <typename Run> auto for_dtype(const Tensor& t, const Run& run) {
  return t.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// The first `count` columns of a contiguous tensor, as a matrix.
inline Tensor columns(const Tensor& t, int64_t width, int64_t count) {
  Tensor matrix = torch::stable::view(t, {width ? t.numel() / width : 0, width});
  return torch::stable::narrow(matrix, 1, 0, count);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace fastmeta
