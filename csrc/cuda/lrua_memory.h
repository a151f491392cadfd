// One row of a memory with least-recently-used access, as a block of threads works on it: choose, write, address, read, and their derivatives; and
// the parameters of the kernels in lrua_memory.cu. The mathematics is in fastmeta/reference/lrua_memory.py, the names are those of
// csrc/cpu/lrua_memory.h.
//
// The memory of a row lies as [M][padded], a slot a column. It is walked in two ways. *Over slots*: a warp has eight slots at a time, and four lanes,
// the parts, share a slot: each has every fourth number of its row, and in sums every fourth head. Whatever belongs to a slot alone stays with its
// warp, so that write, cosines, usage and the gradients by a slot need no barrier among them. *Over rows*: a warp has one of the M numbers of all
// slots, for sums over slots. Padded to 8 more than a multiple of 32, neither way meets a bank twice.
#pragma once

#include <new>

#include "common/lrua_memory.h"
#include "cuda/kernel.h"

namespace fastmeta {

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32;  // of a block; the episode streams its weights through them
constexpr int kParts = 4, kWarpSlots = 32 / kParts;             // lanes that share a slot, slots of a warp; heads go by as many as there are parts

template <typename T> struct Lrua {
  int32_t slots, width, heads;  // N, M, R
  int32_t eps_mode, least_used;
  bool read_before_write;
  T eps, strength, usage_decay;

  FASTMETA_EVERYWHERE int32_t padded() const { return (slots + 23) / 32 * 32 + 8; }
  FASTMETA_EVERYWHERE int32_t memory_size() const { return width * padded(); }
  FASTMETA_EVERYWHERE int32_t weights_size() const { return heads * padded(); }
  FASTMETA_EVERYWHERE int32_t reads() const { return heads * width; }
};

// What warps leave of their slots for all: of the scores of each head the largest, and the sum of exponentials about it.
template <typename T> struct ScoreSums {
  T *tops, *totals;  // [kRowWarps][R]
  FASTMETA_EVERYWHERE ScoreSums(Arena& arena, const Lrua<T>& p)
      : tops(arena.take<T>(kRowWarps * p.heads)), totals(arena.take<T>(kRowWarps * p.heads)) {}
};

// And in the backward: the mean of the gradient by the read weights, and the gradients by the norm of the key, the strength and the gate.
template <typename T> struct GradientSums {
  T *means, *by_norm, *by_strength, *by_gate;  // [kRowWarps][R]
  FASTMETA_EVERYWHERE GradientSums(Arena& arena, const Lrua<T>& p)
      : means(arena.take<T>(kRowWarps * p.heads)), by_norm(arena.take<T>(kRowWarps * p.heads)), by_strength(arena.take<T>(kRowWarps * p.heads)),
        by_gate(arena.take<T>(kRowWarps * p.heads)) {}
};

// What the backward of addressing keeps between its passes. Rows m = m' / t and keys k = k' / t, with t other than 1 only where squares are unusual.
template <typename T> struct Addressed {
  T *cosines, *flow;             // [R][padded]; flow: 1 / g, and then the gradient by the product of k' and m'
  T *squares, *scales, *radial;  // [padded]: of m', t, the gradient along m'
  T *key_squares, *key_scales;   // [R]
  FASTMETA_EVERYWHERE Addressed(Arena& arena, const Lrua<T>& p)
      : cosines(arena.take<T>(p.weights_size())), flow(arena.take<T>(p.weights_size())), squares(arena.take<T>(p.padded())),
        scales(arena.take<T>(p.padded())), radial(arena.take<T>(p.padded())), key_squares(arena.take<T>(p.heads)),
        key_scales(arena.take<T>(p.heads)) {}
};

// ---- the step kernels: parameters and memory of a block ------------------------------------------------------------------------------------------

// All contiguous, null for what there is not: without keys nothing is read, without gates nothing is written.
template <typename T> struct LruaStep {
  Lrua<T> lrua;
  unsigned char* scratch;  // of each block `scratch_size` bytes, where shared memory is too small; else null
  int64_t scratch_size;
  const T *memory, *usage, *before, *keys, *add, *gate, *strengths;
};

template <typename T> struct LruaForward : LruaStep<T> {
  T *read, *to_memory, *to_usage, *to_weights, *to_written;
};

template <typename T> struct LruaBackward : LruaStep<T> {
  const T *after, *weights;                                    // results of the forward: the memory after a write, and the read weights
  const T *grad_read, *grad_memory, *grad_weights, *grad_written;
  T *of_memory, *of_before, *of_keys, *of_add, *of_gate, *of_strengths;
};

template <typename T> struct LruaForwardMemory {
  T *memory, *usage, *before, *written, *weights, *keys, *add, *gate, *strengths;
  int* chosen;
  ScoreSums<T> sums;
  FASTMETA_EVERYWHERE LruaForwardMemory(Arena& arena, const Lrua<T>& p)
      : memory(arena.take<T>(p.memory_size())), usage(arena.take<T>(p.slots)), before(arena.take<T>(p.weights_size())),
        written(arena.take<T>(p.weights_size())), weights(arena.take<T>(p.weights_size())), keys(arena.take<T>(p.reads())),
        add(arena.take<T>(p.reads())), gate(arena.take<T>(p.heads)), strengths(arena.take<T>(p.heads)),
        chosen(arena.take<int>(p.heads)), sums(arena, p) {}
};

template <typename T> struct LruaBackwardMemory {
  LruaForwardMemory<T> given;
  T *of_memory, *of_weights, *of_read;
  Addressed<T> addressed;
  GradientSums<T> sums;
  FASTMETA_EVERYWHERE LruaBackwardMemory(Arena& arena, const Lrua<T>& p)
      : given(arena, p), of_memory(arena.take<T>(p.memory_size())), of_weights(arena.take<T>(p.weights_size())), of_read(arena.take<T>(p.reads())),
        addressed(arena, p), sums(arena, p) {}
};

#ifdef __CUDACC__

// The memory of this block: on the chip, or, where a row is too large for that, at its place in `scratch`. There pointers are of 64 bits, and kept
// in shared memory themselves: in registers there is no room for all of them.
template <typename Memory, bool kOnChip, typename Parameters, typename Of>
__device__ __forceinline__ decltype(auto) memory_of(const Parameters& p, const Of& of) {
  if constexpr (kOnChip) {
    Arena arena(shared_memory);
    return Memory(arena, of);
  } else {
    __shared__ alignas(16) unsigned char place[sizeof(Memory)];
    if (threadIdx.x == 0) {
      Arena arena(p.scratch + blockIdx.x * p.scratch_size);
      new (place) Memory(arena, of);
    }
    __syncthreads();
    return *reinterpret_cast<const Memory*>(place);
  }
}

// ---- walks and sums ------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int part() { return lane() / kWarpSlots; }

// body(n, whether there is a slot n), for the whole warp at a time.
template <typename T, typename Body> __device__ __forceinline__ void over_slots(const Lrua<T>& p, const Body& body) {
#pragma unroll 1
  for (int first = warp() * kWarpSlots; first < p.slots; first += kRowWarps * kWarpSlots) {
    const int n = first + lane() % kWarpSlots;
    body(n, n < p.slots);
  }
}

// body(j, count): heads j to j + count, kParts at most.
template <typename T, typename Body> __device__ __forceinline__ void over_heads(const Lrua<T>& p, const Body& body) {
#pragma unroll 1
  for (int j = 0; j < p.heads; j += kParts) body(j, min(kParts, p.heads - j));
}

template <typename T> __device__ __forceinline__ void fill(T* to, int count, T x) {
  for (int i = threadIdx.x; i < count; i += kRowThreads) to[i] = x;
}
template <typename T> __device__ __forceinline__ void copy(const T* from, int count, T* to) {
  for (int i = threadIdx.x; i < count; i += kRowThreads) to[i] = from[i];
}

// [N][M] as a caller has it, to [M][padded] and back; [R][N] to [R][padded] and back.
template <typename T> __device__ __forceinline__ void load_memory(const Lrua<T>& p, const T* from, T* to) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.slots * p.width; i += kRowThreads) to[i % p.width * p.padded() + i / p.width] = from[i];
}
template <typename T> __device__ __forceinline__ void store_memory(const Lrua<T>& p, const T* from, T* to) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.slots * p.width; i += kRowThreads) to[i] = from[i % p.width * p.padded() + i / p.width];
}
template <typename T> __device__ __forceinline__ void load_weights(const Lrua<T>& p, const T* from, T* to) {
  for (int j = 0; j < p.heads; ++j) copy(from + j * p.slots, p.slots, to + j * p.padded());
}
template <typename T> __device__ __forceinline__ void store_weights(const Lrua<T>& p, const T* from, T* to) {
  for (int j = 0; j < p.heads; ++j) copy(from + j * p.padded(), p.slots, to + j * p.slots);
}

// Lane l gets the sum of number l / (32 / kCount), over the lanes that are a multiple of 32 / kCount from it. Each round halves the numbers.
template <int kCount, typename T> __device__ __forceinline__ T sum_halves(T (&x)[kCount]) {
#pragma unroll
  for (int half = kCount / 2, distance = 16; half > 0; half /= 2, distance /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane() & distance;
      const T mine = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
      x[i] = mine + __shfl_xor_sync(kAllLanes, other, distance);
    }
  return x[0];
}

// The same over all lanes.
template <int kCount, typename T> __device__ __forceinline__ T sum_each(T (&x)[kCount]) {
  T sum = sum_halves(x);
  for (int distance = 16 / kCount; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// Over the parts of a slot: of a number of each head that of the part's own head, or of one number for all.
template <typename T> __device__ __forceinline__ T sum_parts(T (&x)[kParts]) { return sum_halves(x); }
template <typename T> __device__ __forceinline__ T sum_parts(T x) {
  for (int distance = 16; distance >= kWarpSlots; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <typename T> __device__ __forceinline__ T largest_of_parts(T x) {
  for (int distance = 16; distance >= kWarpSlots; distance /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Over the slots of a warp, for each part.
template <typename T> __device__ __forceinline__ T sum_slots(T x) {
  for (int distance = kWarpSlots / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <typename T> __device__ __forceinline__ T largest_of_slots(T x) {
  for (int distance = kWarpSlots / 2; distance > 0; distance /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// The warps' sums of head j, added in their order.
template <typename T> __device__ __forceinline__ T sum_warps(const Lrua<T>& p, const T* sums, int j) {
  T sum = 0;
#pragma unroll 4
  for (int w = 0; w < kRowWarps; ++w) sum += sums[w * p.heads + j];
  return sum;
}

// ---- forward -------------------------------------------------------------------------------------------------------------------------------

// An integer of the same order as x, which is 0 for -0, too, and the largest for NaN.
__device__ __forceinline__ unsigned long long sortable(double x) {
  if (x != x) return ~0ull;
  const unsigned long long bits = __double_as_longlong(x == 0 ? 0.0 : x);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ unsigned long long sortable(float x) { return sortable(double(x)); }

// The R slots of least usage, the least first, ties by the lowest index. By one warp.
template <typename T> __device__ __forceinline__ void choose_least_used(const Lrua<T>& p, const T* usage, int* chosen) {
  unsigned long long last = 0;
  int last_slot = -1;  // of the ones chosen
#pragma unroll 1
  for (int j = 0; j < p.heads; ++j) {
    unsigned long long least = ~0ull;
    int slot = p.slots;
#pragma unroll 1
    for (int n = lane(); n < p.slots; n += 32) {
      const unsigned long long x = sortable(usage[n]);
      const bool left = x > last || (x == last && n > last_slot) || last_slot < 0;
      if (left && (x < least || (x == least && n < slot))) least = x, slot = n;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      const unsigned long long other = __shfl_xor_sync(kAllLanes, least, distance);
      const int other_slot = __shfl_xor_sync(kAllLanes, slot, distance);
      if (other < least || (other == least && other_slot < slot)) least = other, slot = other_slot;
    }
    if (lane() == 0) chosen[j] = slot;
    last = least, last_slot = slot;
  }
}

template <typename T> __device__ __forceinline__ bool is_least_used(const Lrua<T>& p, const int* chosen, int j, int n) {
  if (p.least_used == kPerHead) return chosen[j] == n;
  bool any = false;
#pragma unroll 1
  for (int i = 0; i < p.heads; ++i) any |= chosen[i] == n;
  return any;
}

// ww = s wr_{t-1} + (1 - s) wlu, from rows of wr `stride` apart. Over slots.
template <typename T>
__device__ __forceinline__ void write_weights(const Lrua<T>& p, const T* before, int stride, const T* gate, const int* chosen, T* to) {
  over_heads(p, [&](int j, int count) {
    if (part() >= count) return;
    const int head = j + part();
    const T s = gate[head];
    over_slots(p, [&](int n, bool real) {
      if (!real) return;
      const T x = s * before[head * stride + n];
      to[head * p.padded() + n] = is_least_used(p, chosen, head, n) ? x + (1 - s) : x;
    });
  });
  __syncwarp();  // the weights of a slot are its parts'
}

// The numbers of heads j to j + count at slot n, 0 for more of them.
template <typename T> __device__ __forceinline__ void at_slot(const Lrua<T>& p, const T* weights, int j, int count, int n, T (&to)[kParts]) {
#pragma unroll
  for (int u = 0; u < kParts; ++u) to[u] = u < count ? weights[(j + u) * p.padded() + n] : T(0);
}

// Their vectors [R][M]; for more of them the last one's, so that a loop over numbers needs no condition.
template <typename T> struct Vectors {
  const T* row[kParts];
  __device__ __forceinline__ Vectors(const Lrua<T>& p, const T* vectors, int j, int count) {
#pragma unroll
    for (int u = 0; u < kParts; ++u) row[u] = vectors + (j + min(u, count - 1)) * p.width;
  }
};

// M_t from M_{t-1}, in place. Over slots.
template <typename T> __device__ __forceinline__ void write(const Lrua<T>& p, const T* written, const T* add, const int* chosen, T* memory) {
  over_slots(p, [&](int n, bool real) {
    if (!real) return;
    over_heads(p, [&](int j, int count) {
      T weights[kParts];
      at_slot(p, written, j, count, n, weights);
      const Vectors<T> a(p, add, j, count);
      const bool erased = j == 0 && n == chosen[0];
#pragma unroll 2
      for (int m = part(); m < p.width; m += kParts) {
        T& at = memory[m * p.padded() + n];
        T x = erased ? T(0) : at;
#pragma unroll
        for (int u = 0; u < kParts; ++u) x += a.row[u][m] * weights[u];
        at = x;
      }
    });
  });
}

// Of a slot, and of the part's own head.
template <typename T> struct Cosine {
  T cosine, inverse;  // c, 1 / g
  T square, scale, key_square, key_scale;
};

// c(k, M(n)) for heads j to j + count, with memory and keys scaled where their squares are not of usual size. The whole warp, over slots.
template <typename T>
__device__ __forceinline__ Cosine<T> cosine(const Lrua<T>& p, const T* memory, const T* keys, int j, int count, int n, bool real) {
  T dots[kParts], key_squares[kParts], key_scales[kParts], square, scale = 1, dot, key_square;
#pragma unroll
  for (int u = 0; u < kParts; ++u) key_scales[u] = 1;
  const int own = j + min(part(), count - 1);
  T own_scale = 1;
  const Vectors<T> k(p, keys, j, count);
  auto number = [&](int m) { return real ? memory[m * p.padded() + n] : T(0); };
  auto products = [&] {
    square = 0;
#pragma unroll
    for (int u = 0; u < kParts; ++u) dots[u] = key_squares[u] = 0;
#pragma unroll 2
    for (int m = part(); m < p.width; m += kParts) {
      const T x = number(m) * scale;
      square += x * x;
#pragma unroll
      for (int u = 0; u < kParts; ++u) {
        const T y = k.row[u][m] * key_scales[u];
        dots[u] += y * x, key_squares[u] += y * y;
      }
    }
    square = sum_parts(square), dot = sum_parts(dots), key_square = sum_parts(key_squares);
  };
  products();
  const bool small_eps = !(p.eps > kSmallEps<T>), scaled = small_eps || !usual(square), key_scaled = small_eps || !usual(key_square);
  if (__any_sync(kAllLanes, scaled || key_scaled)) {
    T largest = 0, key_largest = 0;
#pragma unroll 1
    for (int m = part(); m < p.width; m += kParts) largest = fmax(largest, fabs(number(m)));
#pragma unroll 1
    for (int m = 0; m < p.width; ++m) key_largest = fmax(key_largest, fabs(keys[own * p.width + m]));
    largest = largest_of_parts(largest);
    if (scaled && largest > 0) scale = power_near(largest);
    if (key_scaled && key_largest > 0) own_scale = power_near(key_largest);
#pragma unroll
    for (int u = 0; u < kParts; ++u) key_scales[u] = __shfl_sync(kAllLanes, own_scale, u * kWarpSlots + lane() % kWarpSlots);
    products();
  }
  constexpr T kTiny = std::numeric_limits<T>::min();
  T g;
  if (p.eps_mode == kSqrt) {
    const T least = sqrt(p.eps) * own_scale * scale;
    g = sqrt(key_square * square + least * least);
  } else if (p.eps_mode == kAdd) {
    g = sqrt(key_square) * sqrt(square) + p.eps * own_scale * scale;
  } else {
    const T a = sqrt(key_square), b = sqrt(square), least_a = p.eps * own_scale, least_b = p.eps * scale;
    g = (a < least_a ? least_a : a) * (b < least_b ? least_b : b);
  }
  const T inverse = 1 / (g < kTiny ? kTiny : g);
  return {dot * inverse, inverse, square, scale, key_square, own_scale};
}

template <typename T> __device__ __forceinline__ T strength_of(const Lrua<T>& p, const T* strengths, int j) {
  return strengths ? p.strength * strengths[j] : p.strength;
}

// The scores, and of each warp the largest and the sum of exponentials about it. Over slots.
template <typename T>
__device__ __forceinline__ void score(const Lrua<T>& p, const T* memory, const T* keys, const T* strengths, T* scores, const ScoreSums<T>& sums) {
  over_heads(p, [&](int j, int count) {
    const bool has_head = part() < count;
    const T strength = has_head ? strength_of(p, strengths, j + part()) : T(0);
    T top = -infinity<T>(), total = 0;
    over_slots(p, [&](int n, bool real) {
      T x = strength * cosine(p, memory, keys, j, count, n, real).cosine;
      if (real && has_head) scores[(j + part()) * p.padded() + n] = x;
      if (!real) x = -infinity<T>();
      const T above = fmax(top, largest_of_slots(x));
      total = total * exp_about(top, above) + sum_slots(real ? exp_about(x, above) : T(0));
      top = above;
    });
    if (has_head && lane() % kWarpSlots == 0) {
      const int at = warp() * p.heads + j + part();
      sums.tops[at] = top, sums.totals[at] = total;
    }
  });
}

// wr = softmax of the scores, in place. Over slots, after all scores are there.
template <typename T> __device__ __forceinline__ void normalise(const Lrua<T>& p, const ScoreSums<T>& sums, T* scores) {
  over_heads(p, [&](int j, int count) {
    if (part() >= count) return;
    const int head = j + part();
    T top = -infinity<T>(), total = 0;
    for (int w = 0; w < kRowWarps; ++w) top = fmax(top, sums.tops[w * p.heads + head]);
#pragma unroll 1
    for (int w = 0; w < kRowWarps; ++w) {
      const T some = sums.totals[w * p.heads + head];
      if (some != 0) total += some * exp_about(sums.tops[w * p.heads + head], top);
    }
    const T inverse = 1 / total;
    over_slots(p, [&](int n, bool real) {
      if (!real) return;
      T& at = scores[head * p.padded() + n];
      at = inverse * exp_about(at, top);
    });
  });
}

// wu_t from wu_{t-1}. Over slots.
template <typename T>
__device__ __forceinline__ void update_usage(const Lrua<T>& p, const T* weights, const T* written, const T* usage, T* to) {
  __syncwarp();  // the weights of a slot are its parts'
  over_slots(p, [&](int n, bool real) {
    if (!real || part() != 0) return;
    T sum = p.usage_decay * usage[n];
    for (int j = 0; j < p.heads; ++j) sum += weights[j * p.padded() + n];
    for (int j = 0; j < p.heads; ++j) sum += written[j * p.padded() + n];
    to[n] = sum;
  });
}

// store(j, m, r): r = wr M. Over rows.
template <typename T, typename Store> __device__ __forceinline__ void read(const Lrua<T>& p, const T* memory, const T* weights, const Store& store) {
  for (int m = warp(); m < p.width; m += kRowWarps)
    over_heads(p, [&](int j, int count) {
      T sums[kParts] = {};
      const int last = j + count - 1;
#pragma unroll 2
      for (int n = lane(); n < p.slots; n += 32) {
        const T x = memory[m * p.padded() + n];
#pragma unroll
        for (int u = 0; u < kParts; ++u) sums[u] += weights[min(j + u, last) * p.padded() + n] * x;
      }
      const T sum = sum_each(sums);
      if (lane() % kWarpSlots == 0 && part() < count) store(j + part(), m, sum);
    });
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------------

// The products of the rows of a slot with vectors, for each part that of its head. The whole warp.
template <typename T> __device__ __forceinline__ T dots_with(const Lrua<T>& p, const T* memory, const Vectors<T>& vectors, int n, bool real) {
  T dots[kParts] = {};
  if (real)
#pragma unroll 2
    for (int m = part(); m < p.width; m += kParts) {
      const T x = memory[m * p.padded() + n];
#pragma unroll
      for (int u = 0; u < kParts; ++u) dots[u] += vectors.row[u][m] * x;
    }
  return sum_parts(dots);
}

// of_weights += the gradient by wr of r = wr M; sums.means: sum_n wr of_weights. Over slots.
template <typename T>
__device__ __forceinline__ void read_backward(const Lrua<T>& p, const T* memory, const T* weights, const T* of_read, T* of_weights,
                                              const GradientSums<T>& sums) {
  over_heads(p, [&](int j, int count) {
    const int head = j + part();
    const Vectors<T> grads(p, of_read, j, count);
    T mean = 0;
    over_slots(p, [&](int n, bool real) {
      const T dot = dots_with(p, memory, grads, n, real);
      if (!real || part() >= count) return;
      T& grad = of_weights[head * p.padded() + n];
      grad += dot;
      mean += weights[head * p.padded() + n] * grad;
    });
    mean = sum_slots(mean);
    if (part() < count && lane() % kWarpSlots == 0) sums.means[warp() * p.heads + head] = mean;
  });
}

// The cosines once more. Over slots.
template <typename T>
__device__ __forceinline__ void address_again(const Lrua<T>& p, const T* memory, const T* keys, const Addressed<T>& to) {
  over_heads(p, [&](int j, int count) {
    const int head = j + part();
    over_slots(p, [&](int n, bool real) {
      const Cosine<T> c = cosine(p, memory, keys, j, count, n, real);
      if (real && part() < count) to.cosines[head * p.padded() + n] = c.cosine, to.flow[head * p.padded() + n] = c.inverse;
      if (real && part() == 0) to.squares[n] = c.square, to.scales[n] = c.scale;
      if (n == 0 && part() < count) to.key_squares[head] = c.key_square, to.key_scales[head] = c.key_scale;
    });
  });
}

// From the gradient by wr that by the products of keys and slots, and by their norms; sums.by_norm and by_strength. Over slots, after read_backward
// and address_again of all.
template <typename T>
__device__ __forceinline__ void address_backward(const Lrua<T>& p, const T* strengths, const T* weights, const T* of_weights, const Addressed<T>& a,
                                                 const GradientSums<T>& sums) {
  over_heads(p, [&](int j, int count) {
    const int head = j + part();
    const bool has_head = part() < count;
    const T mean = has_head ? sum_warps(p, sums.means, head) : T(0), strength = has_head ? strength_of(p, strengths, head) : T(0);
    const T square = has_head ? a.key_squares[head] : T(0), norm = sqrt(square), key_scale = has_head ? a.key_scales[head] : T(1);
    const bool active = norm > p.eps * key_scale;  // of `clamp`
    T by_key = 0, by_strength = 0;
    over_slots(p, [&](int n, bool real) {
      T radial = 0;
      if (real && has_head) {
        const int at = head * p.padded() + n;
        const T by_score = weights[at] * (of_weights[at] - mean), c = a.cosines[at], inverse = a.flow[at], q = strength * by_score;
        const T squares = a.squares[n];
        by_strength += by_score * c;
        // c = d / g: beside d / dk the share of g, along k and along m.
        if (p.eps_mode == kSqrt) {
          const T along = q * c * inverse * inverse;
          by_key += along * squares, radial = along * square;
        } else if (p.eps_mode == kAdd) {
          const T along = q * c * inverse, b = sqrt(squares);
          by_key += norm > 0 ? along * b / norm : T(0), radial = b > 0 ? along * norm / b : T(0);
        } else {
          const T along = q * c, least = p.eps * a.scales[n];
          by_key += active ? along / square : T(0), radial = squares > least * least ? along / squares : T(0);
        }
        a.flow[at] = q * inverse;
      }
      radial = sum_parts(radial);
      if (real && part() == 0) a.radial[n] = j == 0 ? radial : a.radial[n] + radial;
    });
    by_key = sum_slots(by_key), by_strength = sum_slots(by_strength);
    if (has_head && lane() % kWarpSlots == 0) {
      sums.by_norm[warp() * p.heads + head] = by_key;
      sums.by_strength[warp() * p.heads + head] = p.strength * by_strength;
    }
  });
  __syncwarp();  // the flow of a slot is its parts'
}

// The gradient by the row of a slot of its cosines with heads j to j + count, number by number.
template <typename T> struct SlotGradient {
  T flow[kParts], key_scales[kParts], radial, scale;
  Vectors<T> keys;
  __device__ __forceinline__ SlotGradient(const Lrua<T>& p, const T* keys, const Addressed<T>& a, int j, int count, int n)
      : scale(a.scales[n]), keys(p, keys, j, count) {
    at_slot(p, a.flow, j, count, n, flow);
#pragma unroll
    for (int u = 0; u < kParts; ++u) flow[u] *= scale, key_scales[u] = a.key_scales[j + min(u, count - 1)];
    radial = j == 0 ? a.radial[n] * scale : T(0);
  }
  __device__ __forceinline__ T at(int m, T number) const {
    T sum = -radial * (number * scale);
#pragma unroll
    for (int u = 0; u < kParts; ++u) sum += flow[u] * (keys.row[u][m] * key_scales[u]);
    return sum;
  }
};

// of_memory += the gradient by M_t of r = wr M, and with kAddressed of the cosines. Over slots.
template <bool kAddressed, typename T>
__device__ __forceinline__ void memory_backward(const Lrua<T>& p, const T* memory, const T* keys, const T* weights, const T* of_read,
                                                const Addressed<T>& a, T* of_memory) {
  over_slots(p, [&](int n, bool real) {
    if (!real) return;
    over_heads(p, [&](int j, int count) {
      T w[kParts];
      at_slot(p, weights, j, count, n, w);
      const Vectors<T> grads(p, of_read, j, count);
      const SlotGradient<T> by_cosines(p, keys, a, j, count, n);
#pragma unroll 2
      for (int m = part(); m < p.width; m += kParts) {
        T& at = of_memory[m * p.padded() + n];
        T sum = at;
#pragma unroll
        for (int u = 0; u < kParts; ++u) sum += grads.row[u][m] * w[u];
        if constexpr (kAddressed) sum += by_cosines.at(m, memory[m * p.padded() + n]);
        at = sum;
      }
    });
  });
}

// From the gradient by M_t those by ww, to which of_written [R][N] is added where there is one, and wr_{t-1}: of_before, set; sums.by_gate: by the
// gate. Over slots.
template <typename T>
__device__ __forceinline__ void write_backward(const Lrua<T>& p, const T* before, const T* gate, const T* add, const int* chosen, const T* of_memory,
                                               const T* of_written, T* of_before, const GradientSums<T>& sums) {
  over_heads(p, [&](int j, int count) {
    const int head = j + part();
    const Vectors<T> a(p, add, j, count);
    T by_gate = 0;
    over_slots(p, [&](int n, bool real) {
      T grad = dots_with(p, of_memory, a, n, real);
      if (!real || part() >= count) return;
      if (of_written) grad += of_written[head * p.slots + n];
      by_gate += grad * before[head * p.padded() + n];
      if (is_least_used(p, chosen, head, n)) by_gate -= grad;
      of_before[head * p.padded() + n] = gate[head] * grad;
    });
    by_gate = sum_slots(by_gate);
    if (part() < count && lane() % kWarpSlots == 0) sums.by_gate[warp() * p.heads + head] = by_gate;
  });
}

// store(j, m, gradient by the key, by the add vector), and the gradient by M_t made that by M_{t-1}, in place. Over rows. kReads, kWrites: which of
// the two there is; after: the gradient of the cosines is still to be added, as they were of M_{t-1}.
template <bool kReads, bool kWrites, typename T, typename Store>
__device__ __forceinline__ void rows_backward(const Lrua<T>& p, const T* memory, const T* keys, const Addressed<T>& a, const T* written,
                                              const int* chosen, bool after, T* of_memory, const GradientSums<T>& sums, const Store& store) {
  for (int m = warp(); m < p.width; m += kRowWarps) {
    over_heads(p, [&](int j, int count) {
      T totals[2 * kParts] = {};
      const int last = j + count - 1;
#pragma unroll 2
      for (int n = lane(); n < p.slots; n += 32) {
        const T x = kReads ? memory[m * p.padded() + n] * a.scales[n] : T(0), grad = kWrites ? of_memory[m * p.padded() + n] : T(0);
#pragma unroll
        for (int u = 0; u < kParts; ++u) {
          const int at = min(j + u, last) * p.padded() + n;
          if (kReads) totals[u] += a.flow[at] * x;
          if (kWrites) totals[kParts + u] += written[at] * grad;
        }
      }
      T total = sum_each(totals);
      const T by_add = __shfl_xor_sync(kAllLanes, total, 16);
      const int u = lane() / (32 / (2 * kParts)), head = j + u;
      if (lane() % (32 / (2 * kParts)) == 0 && u < count) {
        if (kReads) total = a.key_scales[head] * (total - sum_warps(p, sums.by_norm, head) * (keys[head * p.width + m] * a.key_scales[head]));
        store(head, m, total, by_add);
      }
    });
    if constexpr (kWrites) {
#pragma unroll 1
      for (int n = lane(); n < p.slots; n += 32) {
        T& at = of_memory[m * p.padded() + n];
        T grad = n == chosen[0] ? T(0) : at;
        if (kReads && after)
          over_heads(p, [&](int j, int count) { grad += SlotGradient<T>(p, keys, a, j, count, n).at(m, memory[m * p.padded() + n]); });
        at = grad;
      }
    }
  }
}

#endif

}  // namespace fastmeta

#define FASTMETA_DECLARE_LRUA(place, suffix, T)                              \
  void lrua_memory_forward_##place##suffix(const fastmeta::LruaForward<T>);  \
  void lrua_memory_backward_##place##suffix(const fastmeta::LruaBackward<T>);
#ifndef __CUDACC__
extern "C" {
FASTMETA_DECLARE_LRUA(, float, float)
FASTMETA_DECLARE_LRUA(, double, double)
FASTMETA_DECLARE_LRUA(large_, float, float)
FASTMETA_DECLARE_LRUA(large_, double, double)
}
#endif
