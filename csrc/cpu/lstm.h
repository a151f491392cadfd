// The nonlinear part of a step of an LSTM, for `count` cells side by side. Gates lie as i, f, g, o in torch's order, `count` numbers of each.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace fastmeta {

// In `gates`, sums become gates; `cell` follows from the cell `before`, which may be the same array; `squashed` is its tanh and `output` h.
template <typename T> FASTMETA_INLINE void activate_gates(int64_t count, T* gates, const T* before, T* cell, T* squashed, T* output) {
  T *i = gates, *f = gates + count, *g = gates + 2 * count, *o = gates + 3 * count;
#pragma omp simd
  for (int64_t h = 0; h < count; ++h) {
    i[h] = sigmoid_of(i[h]), f[h] = sigmoid_of(f[h]), g[h] = tanh_of(g[h]), o[h] = sigmoid_of(o[h]);
    cell[h] = f[h] * before[h] + i[h] * g[h];
  }
  // In a loop of its own, the chain from a gate to the output is half as long: the processor works on more of them at a time.
#pragma omp simd
  for (int64_t h = 0; h < count; ++h) {
    squashed[h] = tanh_of(cell[h]);
    output[h] = o[h] * squashed[h];
  }
}

// The gradients of the sums of the gates (set), and of the cell before the step (in place of that after it).
template <typename T>
FASTMETA_INLINE void gates_backward(int64_t count, const T* gates, const T* squashed, const T* before, const T* grad_output, T* grad_cell,
                                    T* grad_gates) {
  const T *i = gates, *f = gates + count, *g = gates + 2 * count, *o = gates + 3 * count;
  T *di = grad_gates, *df = grad_gates + count, *dg = grad_gates + 2 * count, *d_o = grad_gates + 3 * count;
#pragma omp simd
  for (int64_t h = 0; h < count; ++h) {
    const T grad = grad_cell[h] + grad_output[h] * o[h] * (1 - squashed[h] * squashed[h]);
    d_o[h] = grad_output[h] * squashed[h] * o[h] * (1 - o[h]);
    di[h] = grad * g[h] * i[h] * (1 - i[h]);
    df[h] = grad * before[h] * f[h] * (1 - f[h]);
    dg[h] = grad * i[h] * (1 - g[h] * g[h]);
    grad_cell[h] = grad * f[h];
  }
}

}  // namespace fastmeta
