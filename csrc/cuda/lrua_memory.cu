// memory_read, lrua_write and lrua_step, forward and backward: a block is one episode. The contract of the operations is in
// fastmeta/schemas/lrua_memory.py, what a block does in lrua_memory.h.

#include "cuda/lrua_memory.h"

namespace fastmeta {
namespace {

template <typename T> __device__ __forceinline__ void load_step(const LruaStep<T>& p, const LruaForwardMemory<T>& to) {
  const Lrua<T>& lrua = p.lrua;
  const int64_t b = blockIdx.x;
  if (p.keys) {
    copy(p.keys + b * lrua.reads(), lrua.reads(), to.keys);
    if (p.strengths) copy(p.strengths + b * lrua.heads, lrua.heads, to.strengths);
  }
  if (p.gate) {
    copy(p.usage + b * lrua.slots, lrua.slots, to.usage);
    load_weights(lrua, p.before + b * lrua.heads * lrua.slots, to.before);
    copy(p.add + b * lrua.reads(), lrua.reads(), to.add);
    copy(p.gate + b * lrua.heads, lrua.heads, to.gate);
    __syncthreads();
    if (warp() == 0) choose_least_used(lrua, to.usage, to.chosen);
    __syncthreads();
    write_weights(lrua, to.before, lrua.padded(), to.gate, to.chosen, to.written);
  }
}

template <bool kOnChip, typename T> __device__ __forceinline__ void step_forward(const LruaForward<T>& p) {
  const Lrua<T>& lrua = p.lrua;
  const auto& row = memory_of<LruaForwardMemory<T>, kOnChip>(p, lrua);
  const int64_t b = blockIdx.x, memory_at = b * lrua.slots * lrua.width, weights_at = b * lrua.heads * lrua.slots;
  const T* strengths = p.strengths ? row.strengths : nullptr;
  load_memory(lrua, p.memory + memory_at, row.memory);
  load_step(p, row);
  __syncthreads();
  const bool before = p.keys && (lrua.read_before_write || !p.gate);
  if (before) score(lrua, row.memory, row.keys, strengths, row.weights, row.sums);
  if (p.gate) write(lrua, row.written, row.add, row.chosen, row.memory);
  if (p.keys && !before) score(lrua, row.memory, row.keys, strengths, row.weights, row.sums);
  __syncthreads();
  if (p.gate) store_memory(lrua, row.memory, p.to_memory + memory_at);
  if (p.to_written) store_weights(lrua, row.written, p.to_written + weights_at);
  if (!p.keys) return;
  normalise(lrua, row.sums, row.weights);
  if (p.to_usage) update_usage(lrua, row.weights, row.written, row.usage, p.to_usage + b * lrua.slots);
  __syncthreads();
  store_weights(lrua, row.weights, p.to_weights + weights_at);
  read(lrua, row.memory, row.weights, [&](int j, int m, T x) { p.read[b * lrua.reads() + j * lrua.width + m] = x; });
}

template <bool kReads, bool kWrites, bool kOnChip, typename T> __device__ __forceinline__ void step_backward(const LruaBackward<T>& p) {
  const Lrua<T>& lrua = p.lrua;
  const auto& row = memory_of<LruaBackwardMemory<T>, kOnChip>(p, lrua);
  const LruaForwardMemory<T>& given = row.given;
  const int64_t b = blockIdx.x, memory_at = b * lrua.slots * lrua.width, weights_at = b * lrua.heads * lrua.slots;
  const bool after = kWrites && lrua.read_before_write;  // the gradient of the cosines belongs to the memory before the write
  if constexpr (kReads) {
    load_memory(lrua, (kWrites ? p.after : p.memory) + memory_at, given.memory);
    load_weights(lrua, p.weights + weights_at, given.weights);
    load_weights(lrua, p.grad_weights + weights_at, row.of_weights);
    copy(p.grad_read + b * lrua.reads(), lrua.reads(), row.of_read);
  }
  if (p.grad_memory)
    load_memory(lrua, p.grad_memory + memory_at, row.of_memory);
  else
    fill(row.of_memory, lrua.memory_size(), T(0));
  load_step(p, given);
  __syncthreads();
  if constexpr (kReads) {
    const T* strengths = p.strengths ? given.strengths : nullptr;
    read_backward(lrua, given.memory, given.weights, row.of_read, row.of_weights, row.sums);
    if (after) {
      __syncthreads();
      load_memory(lrua, p.memory + memory_at, given.memory);
      __syncthreads();
    }
    address_again(lrua, given.memory, given.keys, row.addressed);
    __syncthreads();
    address_backward(lrua, strengths, given.weights, row.of_weights, row.addressed, row.sums);
    if (after)
      memory_backward<false>(lrua, given.memory, given.keys, given.weights, row.of_read, row.addressed, row.of_memory);
    else
      memory_backward<true>(lrua, given.memory, given.keys, given.weights, row.of_read, row.addressed, row.of_memory);
  }
  if constexpr (kWrites)
    write_backward(lrua, given.before, given.gate, given.add, given.chosen, row.of_memory, p.grad_written ? p.grad_written + weights_at : nullptr,
                   row.of_weights, row.sums);
  __syncthreads();
  rows_backward<kReads, kWrites>(lrua, given.memory, given.keys, row.addressed, given.written, given.chosen, after, row.of_memory, row.sums,
                                 [&](int j, int m, T by_key, T by_add) {
                                   const int64_t at = b * lrua.reads() + j * lrua.width + m;
                                   if (kReads && p.of_keys) p.of_keys[at] = by_key;
                                   if (kWrites && p.of_add) p.of_add[at] = by_add;
                                 });
  for (int j = threadIdx.x; j < lrua.heads; j += kRowThreads) {
    if (kReads && p.of_strengths) p.of_strengths[b * lrua.heads + j] = sum_warps(lrua, row.sums.by_strength, j);
    if (kWrites && p.of_gate) p.of_gate[b * lrua.heads + j] = sum_warps(lrua, row.sums.by_gate, j);
  }
  if (kWrites && p.of_before) store_weights(lrua, row.of_weights, p.of_before + weights_at);
  __syncthreads();
  if (p.of_memory) store_memory(lrua, row.of_memory, p.of_memory + memory_at);
}

template <bool kOnChip, typename T> __device__ __forceinline__ void step_backward(const LruaBackward<T>& p) {
  if (p.keys && p.gate)
    step_backward<true, true, kOnChip>(p);
  else if (p.keys)
    step_backward<true, false, kOnChip>(p);
  else
    step_backward<false, true, kOnChip>(p);
}

}  // namespace
}  // namespace fastmeta

// ---- the kernels ------------------------------------------------------------------------------------------------------------------------

#define FASTMETA_DEFINE_LRUA(place, kOnChip, suffix, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(fastmeta::kRowThreads, 1)                                                                   \
      lrua_memory_forward_##place##suffix(const __grid_constant__ fastmeta::LruaForward<T> p) { fastmeta::step_forward<kOnChip>(p); }      \
  extern "C" __global__ void __launch_bounds__(fastmeta::kRowThreads, 1)                                                                   \
      lrua_memory_backward_##place##suffix(const __grid_constant__ fastmeta::LruaBackward<T> p) { fastmeta::step_backward<kOnChip>(p); }

FASTMETA_DEFINE_LRUA(, true, float, float)
FASTMETA_DEFINE_LRUA(, true, double, double)
FASTMETA_DEFINE_LRUA(large_, false, float, float)
FASTMETA_DEFINE_LRUA(large_, false, double, double)
