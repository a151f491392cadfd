// mann_episode, forward and backward: one launch has all the steps, a block one episode from the first step to the last. The contract of the
// operation is in fastmeta/schemas/mann_episode.py, what a block does with the memory in lrua_memory.h.
//
// Memory, usage, weights and state stay on the chip between the steps. What does not fit, and is needed by every step of every episode, are the
// recurrent weights: they are read from the L2 cache, in whole lines and many loads at a time, straight from the tensor of the caller. That is
// what a step takes its time for; all else is small. The weights of the inputs and the gradients of all weights are products of the library, before and after.
//
// The backward has the memory of a step by doing the writes since the last checkpoint again: at most kSegment of them, each a few operations a
// number. What the tape has of these steps is read once, for the whole segment.

#include "cuda/mann_episode.h"

namespace fastmeta {
namespace {

template <typename T> __device__ __forceinline__ T sigmoid(T x) { return 1 / (1 + exp(-x)); }

// The length of an episode. One out of range cannot be reported from here: the episode is all NaN, `bad`.
template <typename T> __device__ __forceinline__ int length_of(const MannEpisode<T>& e, int b, bool& bad) {
  bad = false;
  if (!e.lengths) return e.steps;
  const int64_t length = e.lengths[b];
  bad = length < 0 || length > e.steps;
  return bad ? e.steps : int(length);
}

// A pointer that the compiler takes as it is: out of a sum of three it would make each address anew.
template <typename T> __device__ __forceinline__ const T* opaque(const T* at) {
  asm("" : "+l"(at));
  return at;
}

// store(i, begin(i) + sum_k weight[i][k] x[k]) for each row i. Rows are `stride` apart; a warp has four of them at a time.
template <typename T, typename Begin, typename Store>
__device__ __forceinline__ void multiply_rows(const T* weight, int64_t stride, int rows, int depth, const T* x, const Begin& begin, const Store& store) {
  constexpr int kRows = 4, kAhead = sizeof(T) == 4 ? 4 : 2;  // loads in flight: kRows x kAhead
#pragma unroll 1
  for (int first = warp() * kRows; first < rows; first += kRowWarps * kRows) {
    const int own = first + lane() / (32 / kRows);
    const bool writes = lane() % (32 / kRows) == 0 && own < rows;
    const T* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = opaque(weight + min(first + r, rows - 1) * stride + lane());
    T sums[kRows] = {};
    const T at_first = writes ? begin(own) : T(0);
    int k = lane();
    auto add = [&](int ahead) {
      const T value = x[k + ahead];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] += __ldg(row[r] + ahead) * value;
    };
#pragma unroll 1
    for (; k + (kAhead - 1) * 32 < depth; k += kAhead * 32) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) add(u * 32);
#pragma unroll
      for (int r = 0; r < kRows; ++r) row[r] += kAhead * 32;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (k + u * 32 < depth) add(u * 32);
    const T sum = sum_each(sums);
    if (writes) store(own, at_first + sum);
  }
}

// parts[s][k] = the sum over the s-th part of the rows i of x[i] weight[i][k]. A warp has kSpan columns of a part at a time.
template <typename T>
__device__ __forceinline__ void multiply_columns(const T* weight, int64_t stride, int rows, int columns, const T* x, T* parts) {
  constexpr int kEach = kSpan / 32;
  const int splits = splits_of(columns), each = (rows + splits - 1) / splits, spans = (columns + kSpan - 1) / kSpan;
#pragma unroll 1
  for (int task = warp(); task < spans * splits; task += kRowWarps) {
    const int split = task / spans, column = task % spans * kSpan + lane(), end = min((split + 1) * each, rows);
    const T* at[kEach];
#pragma unroll
    for (int u = 0; u < kEach; ++u) at[u] = opaque(weight + split * each * stride + min(column + u * 32, columns - 1));
    T sums[kEach] = {};
#pragma unroll 4
    for (int i = split * each; i < end; ++i) {
      const T value = x[i];
#pragma unroll
      for (int u = 0; u < kEach; ++u) sums[u] += value * __ldg(at[u]), at[u] += stride;
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (column + u * 32 < columns) parts[split * columns + column + u * 32] = sums[u];
  }
}

template <typename T> __device__ __forceinline__ T sum_splits(const T* parts, int columns, int k) {
  T sum = 0;
  for (int s = 0; s < splits_of(columns); ++s) sum += parts[s * columns + k];
  return sum;
}

// ---- forward -------------------------------------------------------------------------------------------------------------------------------

template <bool kOnChip, typename T> __device__ __forceinline__ void episode_forward(const MannForward<T>& e) {
  const Lrua<T>& p = e.lrua;
  const auto& row = memory_of<MannForwardMemory<T>, kOnChip>(e, e);
  T *weights = row.weights, *next_weights = row.next_weights;
  const int b = blockIdx.x, reads = p.reads(), carried = e.carried(), memory_count = p.slots * p.width, weights_count = p.heads * p.slots;
  bool bad;
  const int length = length_of(e, b, bad);
  load_memory(p, e.from.memory + int64_t(b) * memory_count, row.memory);
  load_weights(p, e.from.read_weights + int64_t(b) * weights_count, weights);
  copy(e.from.usage + int64_t(b) * p.slots, p.slots, row.usage);
  copy(e.from.read + int64_t(b) * reads, reads, row.carry);
  copy(e.from.hidden + int64_t(b) * e.hidden, e.hidden, row.carry + reads);
  if (bad)
    fill(row.cell, e.hidden, T(NAN));
  else
    copy(e.from.cell + int64_t(b) * e.hidden, e.hidden, row.cell);
  __syncthreads();

  for (int t = 0; t < length; ++t) {
    const int64_t at = int64_t(t) * e.batch + b;  // of this row and step
    T* line = e.tape ? e.tape + at * e.line() : nullptr;
    T* outputs = e.outputs + at * carried;
    if (line) {
      copy(e.given + at * e.inputs, e.inputs, line);
      copy(row.carry, carried, line + e.inputs);
    }
    if (warp() == kRowWarps - 1) {
      choose_least_used(p, row.usage, row.chosen);
      if (line) {
        __syncwarp();
        for (int j = lane(); j < p.heads; j += 32) e.slots[at * p.heads + j] = row.chosen[j];
      }
    }
    multiply_rows(e.weight + e.inputs, e.entering(), 4 * e.hidden, carried, row.carry,
                  [&](int i) { return __ldg(e.projected + at * 4 * e.hidden + i) + __ldg(e.bias + i); }, [&](int i, T x) { row.gates[i] = x; });
    __syncthreads();
    for (int h = threadIdx.x; h < e.hidden; h += kRowThreads) {
      const T i = sigmoid(row.gates[h]), f = sigmoid(row.gates[e.hidden + h]), g = tanh(row.gates[2 * e.hidden + h]);
      const T o = sigmoid(row.gates[3 * e.hidden + h]), cell = f * row.cell[h] + i * g, hidden = o * tanh(cell);
      row.cell[h] = cell, row.carry[reads + h] = hidden, outputs[h] = hidden;
      if (line) {
        T* gates = line + e.gates_at();
        gates[h] = i, gates[e.hidden + h] = f, gates[2 * e.hidden + h] = g, gates[3 * e.hidden + h] = o;
        line[e.cell_at() + h] = cell;
      }
    }
    __syncthreads();
    multiply_rows(e.head_weight, e.hidden, e.heads, e.hidden, row.carry + reads, [&](int i) { return __ldg(e.head_bias + i); }, [&](int i, T x) {
      if (i < e.gate_at())
        x = tanh(x);
      else if (i < e.strength_at())
        x = sigmoid(x);
      else
        x = 1 + fmax(x, T(0)) + log1p(exp(-fabs(x)));  // 1 + softplus
      row.heads[i] = x;
      if (line) line[e.heads_at() + i] = x;
    });
    __syncthreads();
    const T *keys = row.heads, *add = row.heads + e.add_at(), *gate = row.heads + e.gate_at();
    const T* strengths = e.learned_strength ? row.heads + e.strength_at() : nullptr;
    if (line && t % kSegment == 0) {
      T* checkpoint = e.checkpoints + (int64_t(t / kSegment) * e.batch + b) * memory_count;
      over_slots(p, [&](int n, bool real) {
        if (!real) return;
#pragma unroll 1
        for (int m = part(); m < p.width; m += kParts) checkpoint[m * p.slots + n] = row.memory[m * p.padded() + n];
      });
    }
    // The write of a slot is its warp's, and so is its score: in order, without a barrier between.
    write_weights(p, weights, p.padded(), gate, row.chosen, row.written);
    for (int pass = 0; pass < 2; ++pass)
      if ((pass == 0) == p.read_before_write)
        score(p, row.memory, keys, strengths, next_weights, row.sums);
      else
        write(p, row.written, add, row.chosen, row.memory);
    __syncthreads();
    normalise(p, row.sums, next_weights);
    update_usage(p, next_weights, row.written, row.usage, row.usage);
    __syncthreads();
    if (line) store_weights(p, next_weights, line + e.weights_at());
    read(p, row.memory, next_weights, [&](int j, int m, T x) {
      row.carry[j * p.width + m] = x;
      outputs[e.hidden + j * p.width + m] = x;
    });
    T* swap = weights;
    weights = next_weights, next_weights = swap;
    __syncthreads();
  }

  store_memory(p, row.memory, e.to.memory + int64_t(b) * memory_count);
  store_weights(p, weights, e.to.read_weights + int64_t(b) * weights_count);
  copy(row.usage, p.slots, e.to.usage + int64_t(b) * p.slots);
  copy(row.carry, reads, e.to.read + int64_t(b) * reads);
  copy(row.carry + reads, e.hidden, e.to.hidden + int64_t(b) * e.hidden);
  copy(row.cell, e.hidden, e.to.cell + int64_t(b) * e.hidden);
  // After the end of an episode: zeros, as the products over all lines want them.
  for (int t = length; t < e.steps; ++t) {
    const int64_t at = int64_t(t) * e.batch + b;
    fill(e.outputs + at * carried, carried, T(0));
    if (!e.tape) continue;
    fill(e.tape + at * e.line(), e.line(), T(0));
    fill(e.slots + at * p.heads, p.heads, int64_t(0));
    if (t % kSegment == 0) fill(e.checkpoints + (int64_t(t / kSegment) * e.batch + b) * memory_count, memory_count, T(0));
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------------

// A segment as the block has it, its step s.
template <typename T> struct Segment {
  const MannEpisode<T>& e;
  const MannBackwardMemory<T>& row;

  __device__ __forceinline__ T* written(int s) const { return row.written + s * e.lrua.weights_size(); }
  __device__ __forceinline__ T* heads(int s) const { return row.heads + s * e.heads; }
  __device__ __forceinline__ int* chosen(int s) const { return row.chosen + s * e.lrua.heads; }

  // The read weights after step t of row b.
  __device__ __forceinline__ const T* read_weights(int b, int t) const {
    return t < 0 ? e.from.read_weights + int64_t(b) * e.lrua.heads * e.lrua.slots : e.tape + (int64_t(t) * e.batch + b) * e.line() + e.weights_at();
  }

  // What the tape has of the steps from `first` to t.
  __device__ __forceinline__ void load(int b, int first, int t) const {
    const Lrua<T>& p = e.lrua;
    for (int s = 0; s <= t - first; ++s) {
      const int64_t at = int64_t(first + s) * e.batch + b;
      copy(e.tape + at * e.line() + e.heads_at(), e.heads, heads(s));
      for (int j = threadIdx.x; j < p.heads; j += kRowThreads) chosen(s)[j] = int(e.slots[at * p.heads + j]);
    }
    __syncthreads();
    for (int s = 0; s <= t - first; ++s) write_weights(p, read_weights(b, first + s - 1), p.slots, heads(s) + e.gate_at(), chosen(s), written(s));
  }

  // The memory after `count` of its steps. Over slots.
  __device__ __forceinline__ void replay(const T* checkpoint, int count) const {
    const Lrua<T>& p = e.lrua;
    over_slots(p, [&](int n, bool real) {
      if (!real) return;
#pragma unroll 2
      for (int m = part(); m < p.width; m += kParts) row.memory[m * p.padded() + n] = checkpoint[m * p.slots + n];
    });
#pragma unroll 1
    for (int s = 0; s < count; ++s) write(p, written(s), heads(s) + e.add_at(), chosen(s), row.memory);
  }
};

template <bool kOnChip, typename T> __device__ __forceinline__ void episode_backward(const MannBackward<T>& e) {
  const Lrua<T>& p = e.lrua;
  const auto& row = memory_of<MannBackwardMemory<T>, kOnChip>(e, e);
  const Segment<T> segment{e, row};
  T *now = row.weights, *before = row.before;
  const int b = blockIdx.x, reads = p.reads(), carried = e.carried(), memory_count = p.slots * p.width, weights_count = p.heads * p.slots;
  bool bad;
  const int length = length_of(e, b, bad);
  load_memory(p, e.grad_to.memory + int64_t(b) * memory_count, row.of_memory);
  load_weights(p, e.grad_to.read_weights + int64_t(b) * weights_count, row.of_weights);
  copy(e.grad_to.read + int64_t(b) * reads, reads, row.of_carry);
  copy(e.grad_to.hidden + int64_t(b) * e.hidden, e.hidden, row.of_carry + reads);
  copy(e.grad_to.cell + int64_t(b) * e.hidden, e.hidden, row.of_cell);
  if (length > 0) {
    copy(e.tape + (int64_t(length - 1) * e.batch + b) * e.line() + e.cell_at(), e.hidden, row.cell);
    load_weights(p, segment.read_weights(b, length - 1), now);
  }
  __syncthreads();

  for (int t = length - 1; t >= 0; --t) {
    const int first = t / kSegment * kSegment, s = t - first;
    const int64_t at = int64_t(t) * e.batch + b;
    const T* checkpoint = e.checkpoints + (int64_t(t / kSegment) * e.batch + b) * memory_count;
    if (t == length - 1 || s == kSegment - 1) segment.load(b, first, t);
    load_weights(p, segment.read_weights(b, t - 1), before);
    for (int k = threadIdx.x; k < carried; k += kRowThreads) {
      const T by_output = e.grad_outputs[at * carried + (k < reads ? e.hidden + k : k - reads)];
      row.of_carry[k] = by_output + (t == length - 1 ? row.of_carry[k] : sum_splits(row.parts, carried, k));
    }
    __syncthreads();
    const T* heads = segment.heads(s);
    const T *keys = heads, *add = heads + e.add_at(), *gate = heads + e.gate_at();
    const T* strengths = e.learned_strength ? heads + e.strength_at() : nullptr;
    const int* chosen = segment.chosen(s);
    segment.replay(checkpoint, s + 1);
    read_backward(p, row.memory, now, row.of_carry, row.of_weights, row.sums);
    if (p.read_before_write) segment.replay(checkpoint, s);
    address_again(p, row.memory, keys, row.addressed);
    __syncthreads();
    address_backward(p, strengths, now, row.of_weights, row.addressed, row.sums);
    if (p.read_before_write)
      memory_backward<false>(p, row.memory, keys, now, row.of_carry, row.addressed, row.of_memory);
    else
      memory_backward<true>(p, row.memory, keys, now, row.of_carry, row.addressed, row.of_memory);
    write_backward(p, before, gate, add, chosen, row.of_memory, (const T*)nullptr, row.of_weights, row.sums);
    __syncthreads();
    T* grad_heads = e.grad_heads + at * e.heads;
    auto store = [&](int i, T x) { row.of_heads[i] = x, grad_heads[i] = x; };
    rows_backward<true, true>(p, row.memory, keys, row.addressed, segment.written(s), chosen, p.read_before_write, row.of_memory, row.sums,
                              [&](int j, int m, T by_key, T by_add) {
                                const int i = j * p.width + m;
                                store(i, (e.own_add ? by_key : by_key + by_add) * (1 - keys[i] * keys[i]));
                                if (e.own_add) store(reads + i, by_add * (1 - add[i] * add[i]));
                              });
    for (int j = threadIdx.x; j < p.heads; j += kRowThreads) {
      store(e.gate_at() + j, sum_warps(p, row.sums.by_gate, j) * gate[j] * (1 - gate[j]));
      if (e.learned_strength) store(e.strength_at() + j, sum_warps(p, row.sums.by_strength, j) * -expm1(1 - strengths[j]));
    }
    __syncthreads();
    multiply_columns(e.head_weight, e.hidden, e.heads, e.hidden, row.of_heads, row.parts);
    __syncthreads();
    for (int h = threadIdx.x; h < e.hidden; h += kRowThreads) {
      const T* gates = e.tape + at * e.line() + e.gates_at();
      const T i = gates[h], f = gates[e.hidden + h], g = gates[2 * e.hidden + h], o = gates[3 * e.hidden + h];
      const T cell_before = t ? e.tape[(at - e.batch) * e.line() + e.cell_at() + h] : e.from.cell[int64_t(b) * e.hidden + h];
      const T of_hidden = row.of_carry[reads + h] + sum_splits(row.parts, e.hidden, h);
      const T squashed = tanh(row.cell[h]), grad = row.of_cell[h] + of_hidden * o * (1 - squashed * squashed);
      auto set = [&](int gate, T x) {
        row.of_gates[gate * e.hidden + h] = x;
        e.grad_gates[at * 4 * e.hidden + gate * e.hidden + h] = x;
      };
      set(0, grad * g * i * (1 - i)), set(1, grad * cell_before * f * (1 - f)), set(2, grad * i * (1 - g * g));
      set(3, of_hidden * squashed * o * (1 - o));
      row.of_cell[h] = grad * f, row.cell[h] = cell_before;
    }
    __syncthreads();
    multiply_columns(e.weight + e.inputs, e.entering(), 4 * e.hidden, carried, row.of_gates, row.parts);
    T* swap = now;
    now = before, before = swap;
    __syncthreads();
  }

  for (int k = threadIdx.x; k < carried; k += kRowThreads) {
    const T grad = length > 0 ? sum_splits(row.parts, carried, k) : row.of_carry[k];
    if (k < reads)
      e.grad_from.read[int64_t(b) * reads + k] = grad;
    else
      e.grad_from.hidden[int64_t(b) * e.hidden + k - reads] = grad;
  }
  copy(row.of_cell, e.hidden, e.grad_from.cell + int64_t(b) * e.hidden);
  store_weights(p, row.of_weights, e.grad_from.read_weights + int64_t(b) * weights_count);
  store_memory(p, row.of_memory, e.grad_from.memory + int64_t(b) * memory_count);
  for (int t = length; t < e.steps; ++t) {
    const int64_t at = int64_t(t) * e.batch + b;
    fill(e.grad_gates + at * 4 * e.hidden, 4 * e.hidden, T(0));
    fill(e.grad_heads + at * e.heads, e.heads, T(0));
  }
}

// A block has 32 columns, its warps every kRowWarps-th row.
template <typename T> __device__ __forceinline__ void biases(const MannBiases<T>& p) {
  T* sums = Arena(shared_memory).take<T>(kRowThreads);
  const int blocks = p.of_bias ? (p.gates + 31) / 32 : 0;
  const bool of_heads = int(blockIdx.x) >= blocks;
  const int columns = of_heads ? p.heads : p.gates, column = (int(blockIdx.x) - (of_heads ? blocks : 0)) * 32 + lane();
  const T* from = of_heads ? p.grad_heads : p.grad_gates;
  T sum = 0;
  if (column < columns)
#pragma unroll 4
    for (int64_t i = warp(); i < p.rows; i += kRowWarps) sum += from[i * columns + column];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp() != 0 || column >= columns) return;
  for (int w = 1; w < kRowWarps; ++w) sum += sums[w * 32 + lane()];
  (of_heads ? p.of_head_bias : p.of_bias)[column] = sum;
}

}  // namespace
}  // namespace fastmeta

// ---- the kernels ------------------------------------------------------------------------------------------------------------------------

#define FASTMETA_DEFINE_MANN(name, Parameters, call) \
  extern "C" __global__ void __launch_bounds__(fastmeta::kRowThreads, 1) name(const __grid_constant__ fastmeta::Parameters p) { fastmeta::call; }

FASTMETA_DEFINE_MANN(mann_episode_forward_float, MannForward<float>, episode_forward<true>(p))
FASTMETA_DEFINE_MANN(mann_episode_forward_double, MannForward<double>, episode_forward<true>(p))
FASTMETA_DEFINE_MANN(mann_episode_forward_large_float, MannForward<float>, episode_forward<false>(p))
FASTMETA_DEFINE_MANN(mann_episode_forward_large_double, MannForward<double>, episode_forward<false>(p))
FASTMETA_DEFINE_MANN(mann_episode_backward_float, MannBackward<float>, episode_backward<true>(p))
FASTMETA_DEFINE_MANN(mann_episode_backward_double, MannBackward<double>, episode_backward<true>(p))
FASTMETA_DEFINE_MANN(mann_episode_backward_large_float, MannBackward<float>, episode_backward<false>(p))
FASTMETA_DEFINE_MANN(mann_episode_backward_large_double, MannBackward<double>, episode_backward<false>(p))
FASTMETA_DEFINE_MANN(mann_episode_biases_float, MannBiases<float>, biases(p))
FASTMETA_DEFINE_MANN(mann_episode_biases_double, MannBiases<double>, biases(p))
