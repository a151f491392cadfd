// augmented_pool, forward and backward: one pass over its arguments each. The contract of the operation is in
// fastmeta/schemas/augmented_pool.py. The backward finds the maxima again; the forward keeps nothing for it.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "cpu/tensor.h"

namespace fastmeta {
namespace {

template <typename T> FASTMETA_INLINE T rectified(T x) { return x < 0 ? T(0) : x; }  // NaN stays

// The maximum of a window and its position: the first of equal ones, and any NaN is larger, as PyTorch has it.
template <typename T> struct Largest {
  T value, position;
  FASTMETA_INLINE void take(T other, T at) {
    const bool larger = other > value || other != other;
    value = larger ? other : value;
    position = larger ? at : position;
  }
};

// Rows of windows of two rows (`below` is one row further), or of one (`below` is 0), as at the lower border of an odd height.
template <typename T> struct Row {
  const T *slow, *fast;
  int64_t width, below;

  FASTMETA_INLINE T at(int64_t i) const { return rectified(slow[i]) + rectified(fast[i]); }
  // A window of two columns from column i on, or of the last one alone.
  FASTMETA_INLINE Largest<T> window(int64_t i, bool two) const {
    Largest<T> largest{at(i), T(0)};
    if (two) largest.take(at(i + 1), T(1));
    if (below) {
      largest.take(at(i + below), T(2));
      if (two) largest.take(at(i + below + 1), T(3));
    }
    return largest;
  }
};

// use(j, window) for every window of a row; `use` holds its pointers by value, or GCC makes no vector code of the loop.
template <typename T, typename Use> FASTMETA_INLINE void for_each_window(const Row<T>& row, const Use& use) {
  const int64_t pairs = row.width / 2;
  if (row.below)
#pragma omp simd
    for (int64_t j = 0; j < pairs; ++j) use(j, row.window(2 * j, true));
  else
    for (int64_t j = 0; j < pairs; ++j) use(j, row.window(2 * j, true));
  if (row.width % 2) use(pairs, row.window(2 * pairs, false));
}

template <typename T> FASTMETA_INLINE void pool_row(const Row<T>& row, T* pooled) {
  for_each_window(row, [=](int64_t j, Largest<T> window) FASTMETA_INLINE_LAMBDA { pooled[j] = window.value; });
}

template <typename T> FASTMETA_INLINE void pool_row_backward(const Row<T>& row, const T* grad, T* positions, T* grad_slow, T* grad_fast) {
  const int64_t pairs = row.width / 2;
  auto set = [&](int64_t i, bool largest, T g) FASTMETA_INLINE_LAMBDA {
    const T slow = row.slow[i], fast = row.fast[i];
    grad_slow[i] = !largest || slow <= 0 ? T(0) : g;
    grad_fast[i] = !largest || fast <= 0 ? T(0) : g;
  };
  for_each_window(row, [=](int64_t j, Largest<T> window) FASTMETA_INLINE_LAMBDA { positions[j] = window.position; });
  // Row by row, so that each loop writes side by side.
  for (int64_t below = 0; below <= row.below; below += std::max<int64_t>(1, row.below)) {
    const T left = below ? T(2) : T(0);
#pragma omp simd
    for (int64_t j = 0; j < pairs; ++j) {
      const T position = positions[j], g = grad[j];
      set(below + 2 * j, position == left, g);
      set(below + 2 * j + 1, position == left + 1, g);
    }
    if (row.width % 2) set(below + 2 * pairs, positions[pairs] == left, grad[pairs]);
  }
}

template <typename T> struct Pool {
  int64_t planes, height, width;
  const T *slow, *fast;

  int64_t pooled_height() const { return ceil_divide(height, 2); }
  int64_t pooled_width() const { return ceil_divide(width, 2); }
};

// run(row, where it begins in a plane stack, where its results do) for every row of windows of the planes.
template <typename T, typename Run> FASTMETA_INLINE void for_each_row(const Pool<T>& p, int64_t begin, int64_t end, const Run& run) {
  for (int64_t plane = begin; plane < end; ++plane)
    for (int64_t i = 0; i < p.pooled_height(); ++i) {
      const int64_t at = (plane * p.height + 2 * i) * p.width;
      run(Row<T>{p.slow + at, p.fast + at, p.width, 2 * i + 1 < p.height ? p.width : 0}, at, (plane * p.pooled_height() + i) * p.pooled_width());
    }
}

template <typename T> FASTMETA_INLINE void pool(const Pool<T>& p, int64_t begin, int64_t end, T* pooled) {
  for_each_row(p, begin, end, [&](const Row<T>& row, int64_t, int64_t to) FASTMETA_INLINE_LAMBDA { pool_row(row, pooled + to); });
}

template <typename T> FASTMETA_INLINE void pool_backward(const Pool<T>& p, int64_t begin, int64_t end, const T* grad, T* grad_slow, T* grad_fast) {
  const Buffer<T> positions(p.pooled_width());
  for_each_row(p, begin, end, [&](const Row<T>& row, int64_t at, int64_t to) FASTMETA_INLINE_LAMBDA {
    pool_row_backward(row, grad + to, positions.get(), grad_slow + at, grad_fast + at);
  });
}

FASTMETA_CLONES void run(const Pool<float>& p, int64_t begin, int64_t end, float* pooled) { pool(p, begin, end, pooled); }
FASTMETA_CLONES void run(const Pool<double>& p, int64_t begin, int64_t end, double* pooled) { pool(p, begin, end, pooled); }
FASTMETA_CLONES void run_backward(const Pool<float>& p, int64_t begin, int64_t end, const float* grad, float* grad_slow, float* grad_fast) {
  pool_backward(p, begin, end, grad, grad_slow, grad_fast);
}
FASTMETA_CLONES void run_backward(const Pool<double>& p, int64_t begin, int64_t end, const double* grad, double* grad_slow, double* grad_fast) {
  pool_backward(p, begin, end, grad, grad_slow, grad_fast);
}

// A task is as many planes as have about 2^15 numbers.
template <typename T, typename Run> void for_each_group(const Pool<T>& p, const Run& run) {
  const int64_t group = std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, p.height * p.width));
  for_each_task(ceil_divide(p.planes, group), 1, [&](int64_t i) { run(i * group, std::min(p.planes, (i + 1) * group)); });
}

template <typename T> Pool<T> make_pool(const Rows<T>& slow, const Rows<T>& fast) {
  const Tensor& t = slow.tensor();
  return {t.size(0) * t.size(1), t.size(2), t.size(3), slow[0], fast[0]};
}

Tensor augmented_pool(Tensor slow, Tensor fast) {
  return for_dtype(slow, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> slow_rows(slow), fast_rows(fast);
    const Pool<T> p = make_pool(slow_rows, fast_rows);
    const Rows<T> pooled = Rows<T>::make({slow.size(0), slow.size(1), p.pooled_height(), p.pooled_width()});
    for_each_group(p, [&](int64_t begin, int64_t end) { run(p, begin, end, pooled[0]); });
    return pooled.tensor();
  });
}

std::tuple<Tensor, Tensor> augmented_pool_backward(Tensor grad, int64_t needs, Tensor slow, Tensor fast, Tensor) {
  return for_dtype(slow, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const Rows<T> slow_rows(slow), fast_rows(fast), grad_rows(grad);
    const Pool<T> p = make_pool(slow_rows, fast_rows);
    const std::vector<int64_t> sizes{slow.size(0), slow.size(1), p.height, p.width};
    const Rows<T> grad_slow = Rows<T>::make(sizes), grad_fast = Rows<T>::make(sizes);
    for_each_group(p, [&](int64_t begin, int64_t end) { run_backward(p, begin, end, grad_rows[0], grad_slow[0], grad_fast[0]); });
    const Tensor none = empty({0}, kScalarType<T>);
    return {needs & 1 ? grad_slow.tensor() : none, needs & 2 ? grad_fast.tensor() : none};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, module) {
  module.impl("augmented_pool", TORCH_BOX(&augmented_pool));
  module.impl("augmented_pool_backward", TORCH_BOX(&augmented_pool_backward));
}

}  // namespace fastmeta
