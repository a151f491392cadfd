// cosine_attention and matching_log_probs, forward and backward. The mathematics is in fastmeta/reference/cosine_attention.py, the contract of
// the operations in fastmeta/schemas/cosine_attention.py, and how a gradient is put together in csrc/cpu/cosine_attention.cpp.
//
// Two regimes. An *episode* of few supports is one block's alone: its supports are packed once, its queries pass by in tiles, everything between
// the rows and the results stays on chip, and the backward makes every gradient from the same scores. Otherwise a block has a *tile* of
// queries of its own and the supports stream by, with a running softmax; in the backward half of the blocks own supports instead, and queries
// stream by. Where that gives too few blocks the stream is cut into parts, which a second launch adds up in a fixed order. There are no atomics:
// the same bits in every run.
//
// Rows are staged in float32 (float64 stays float64) as they are, and their squares are summed from what was staged for the products, so that a
// norm costs no pass of its own. If a sum of squares left the range of numbers, the tile is done again with these rows multiplied by a power of two.
//
// With labels, the supports of a tile are staged in the order of their labels: a class is then a run of neighbouring columns of the tile
// of scores, summed about its own largest score, and no one-hot matrix exists.
//
// Tensor cores serve half types as tf32, which holds float16 and bfloat16 exactly: products of inputs are exact. Weights and slopes,
// float32, enter as the sum of two tf32 numbers, so that nothing is rounded to half precision, or out of its range, on the way.

#include "cuda/cosine_attention.h"

#include <climits>

namespace fastmeta {
namespace {

// ---- numbers in memory -----------------------------------------------------------------------------------------------------------------

template <typename T> struct alignas(16) Vector {
  T at[16 / sizeof(T)];
};
template <typename T> __device__ __forceinline__ Vector<T> load_vector(const T* from) { return *reinterpret_cast<const Vector<T>*>(from); }

struct LoadFloat {
  __device__ __forceinline__ static float load(const void* data, int64_t i) { return static_cast<const float*>(data)[i]; }
};
struct LoadDouble {
  __device__ __forceinline__ static double load(const void* data, int64_t i) { return static_cast<const double*>(data)[i]; }
};
struct LoadHalf {
  __device__ __forceinline__ static float load(const void* data, int64_t i) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<const unsigned short*>(data)[i]));
    return x;
  }
};
struct LoadBFloat16 {
  __device__ __forceinline__ static float load(const void* data, int64_t i) {
    return __uint_as_float(unsigned(static_cast<const unsigned short*>(data)[i]) << 16);
  }
};

// run(Load{}) for the type of the elements; the choice is the same for all threads.
template <typename T, typename Run> __device__ __forceinline__ void for_element(Element element, const Run& run) {
  if constexpr (sizeof(T) == 8)
    run(LoadDouble{});
  else if (element == kFloat)
    run(LoadFloat{});
  else if (element == kHalf)
    run(LoadHalf{});
  else
    run(LoadBFloat16{});
}

template <typename T> __device__ __forceinline__ T load(const void* data, int64_t i, Element element) {
  T x;
  for_element<T>(element, [&](auto loader) { x = loader.load(data, i); });
  return x;
}

// A gradient too large for float16 is cut to its largest number: the slope of a row of zeros is 1 / eps, and infinity must not come out of
// finite input.
template <typename T> __device__ __forceinline__ void store(void* data, int64_t i, T x, Element element, bool gradient) {
  if constexpr (sizeof(T) == 8) {
    static_cast<double*>(data)[i] = x;
  } else if (element == kFloat) {
    static_cast<float*>(data)[i] = x;
  } else if (element == kHalf) {
    if (gradient) x = x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(static_cast<unsigned short*>(data)[i]) : "f"(x));
  } else {
    const unsigned bits = __float_as_uint(x);  // to the nearest, ties to even; sm_75 has no instruction for it
    static_cast<unsigned short*>(data)[i] = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------------------------------

constexpr int kAbsent = -1;    // no row: past the end, or padding
constexpr int kBadLabel = -2;  // a support with a label out of range: its scores are NaN, and so is all that they enter

// Rows of episode b of a tensor, by index.
template <typename T> struct Source {
  const void* data;
  int64_t begin, row, column;
  Element element;
  const int* index;
  const T* factor;  // or null

  __device__ __forceinline__ Source(const View& view, int64_t b, Element element, const int* index, const T* factor = nullptr)
      : data(view.data), begin(b * view.strides[0]), row(view.strides[1]), column(view.strides[2]), element(element), index(index), factor(factor) {}
  __device__ __forceinline__ Source from(int row) const {
    Source rest = *this;
    rest.index += row;
    if (factor) rest.factor += row;
    return rest;
  }

  // kColumns columns of kCount rows, from column `first` on; zeros past the end, at `length`, and for absent rows.
  template <int kCount, int kColumns> __device__ __forceinline__ void stage(int first, int length, T* to, int stride) const {
    for_element<T>(element, [&](auto loader) {
#pragma unroll 4
      for (int r = warp(); r < kCount; r += kWarps) {
        const int i = index[r];
        const int64_t from = begin + i * row + first * column;
        const T by = factor ? factor[r] : T(1);
#pragma unroll
        for (int c = lane(); c < kColumns; c += 32)
          to[r * stride + c] = i >= 0 && first + c < length ? T(loader.load(data, from + c * column)) * by : T(0);
      }
    });
  }
  // All columns.
  template <int kCount> __device__ __forceinline__ void stage(int length, T* to, int stride) const {
#pragma unroll 1
    for (int first = 0; first < length; first += 32) stage<kCount, 32>(first, length, to + first, stride);
  }
};

// Sum of squares and largest element of a staged row, added to those of its earlier columns.
template <typename T> __device__ __forceinline__ void measure(const T* row, int width, T& squares, T& largest) {
  for (int d = 0; d < width; d += Tile<T>::kVector) {
    const Vector<T> x = load_vector(row + d);
#pragma unroll
    for (int v = 0; v < Tile<T>::kVector; ++v) squares += x.at[v] * x.at[v], largest = fmax(largest, fabs(x.at[v]));
  }
}

// Whether the squares of a row left the range of numbers while the row itself is in it.
template <typename T> __device__ __forceinline__ bool out_of_range(T squares, T largest) {
  constexpr T kTiny = kSmallestNorm<T>;
  return squares == squares && !(squares > kTiny * kTiny && squares < T(1) / (kTiny * kTiny)) && largest > T(0) &&
         largest <= std::numeric_limits<T>::max();
}

template <typename T> __device__ __forceinline__ void finish_row(const Attention<T>& p, bool divided, T squares, const Rows<T>& rows, int row) {
  T unit = 1, inverse = 1, norm = 1, active = 0;
  if (divided) {
    const T factor = rows.factor[row], scaled = sqrt(squares);
    const T least = (p.eps_mode == kClamp ? p.eps : kSmallestNorm<T>) * factor, divisor = scaled < least ? least : scaled;
    unit = T(1) / divisor, inverse = factor / divisor, norm = scaled / divisor, active = scaled < least ? T(0) : T(1);
  }
  if (rows.index[row] == kBadLabel) unit = T(NAN);
  rows.unit[row] = unit, rows.inverse[row] = inverse, rows.norm[row] = norm, rows.active[row] = active;
}

template <typename T> __device__ __forceinline__ bool is_real(const Attention<T>& p, int64_t b, int64_t s) {
  return s < p.supports && (!p.mask.data || static_cast<const bool*>(p.mask.data)[b * p.mask.strides[0] + s * p.mask.strides[1]]);
}

// The label of support s, -1 where it is out of range.
template <typename T> __device__ __forceinline__ int label_of(const Attention<T>& p, int64_t b, int s) {
  const int64_t label = static_cast<const int64_t*>(p.third.data)[b * p.third.strides[0] + s * p.third.strides[1]];
  return label >= 0 && label < p.columns ? int(label) : -1;
}

// The real ones of kCount supports from `begin` on. Between two barriers.
template <bool kValues, int kCount, typename T>
__device__ __forceinline__ void choose(const Attention<T>& p, int64_t b, int64_t begin, const Chosen& to) {
  const int t = threadIdx.x;
  int key = INT_MAX, at = kAbsent;
  if (t < kCount) {
    const int64_t s = begin + t;
    if (is_real(p, b, s)) {
      key = 0, at = int(s);
      if constexpr (!kValues) {
        key = max(label_of(p, b, at), 0);
        if (label_of(p, b, at) < 0) at = kBadLabel;
      }
    }
    to.keys[t] = key;
  }
  __syncthreads();
  if (t < kCount) {
    int rank = 0;
    for (int u = 0; u < kCount; ++u) rank += to.keys[u] < key || (to.keys[u] == key && u < t);
    to.index[rank] = at, to.sorted[rank] = key;
  }
  __syncthreads();
  if (t < kCount) {
    key = to.sorted[t];
    if (t == 0 && key == INT_MAX) to.counts[0] = to.counts[1] = 0;
    if (key != INT_MAX) {
      int segment = 0;
      for (int u = 1; u <= t; ++u) segment += to.sorted[u] != to.sorted[u - 1];
      if (t == 0 || to.sorted[t - 1] != key) to.first[segment] = t, to.label[segment] = key;
      if (t + 1 == kCount || to.sorted[t + 1] == INT_MAX) to.counts[0] = t + 1, to.counts[1] = segment + 1, to.first[segment + 1] = t + 1;
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------------------------

// d += a b for a 16 x 8 tile a and an 8 x 8 tile b of tf32.
__device__ __forceinline__ void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

__device__ __forceinline__ float to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

// The places that a thread has in a tile of kOwn rows and 16 kRows columns, and its numbers there.
template <typename T, bool kTensorCores> struct Accumulator {
  static constexpr int kRows = Tile<T>::kRows;
  T at[kRows][kRows] = {};

  // Rows and columns kRows by kRows, 8 and 16 apart.
  __device__ __forceinline__ void store(T* to, int stride) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kRows; ++j) to[(threadIdx.x / 16 + 8 * i) * stride + threadIdx.x % 16 + 16 * j] = at[i][j];
  }

  // at += own other^T, of `length` columns of the rows of both.
  __device__ __forceinline__ void dots(const T* own, const T* other, int stride, int length) {
#pragma unroll 1
    for (int d = 0; d < length; d += Tile<T>::kVector) {
      Vector<T> a[kRows], b[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        a[i] = load_vector(own + (threadIdx.x / 16 + 8 * i) * stride + d);
        b[i] = load_vector(other + (threadIdx.x % 16 + 16 * i) * stride + d);
      }
#pragma unroll
      for (int v = 0; v < Tile<T>::kVector; ++v)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kRows; ++j) at[i][j] += a[i].at[v] * b[j].at[v];
    }
  }

  // at += weights rows, of `count` rows (a multiple of 8) that have `width` columns.
  __device__ __forceinline__ void product(const T* weights, int weight_stride, const T* rows, int stride, int count, int width) {
#pragma unroll 1
    for (int k = 0; k < count; k += Tile<T>::kVector) {
      Vector<T> a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = load_vector(weights + (threadIdx.x / 16 + 8 * i) * weight_stride + k);
#pragma unroll
      for (int v = 0; v < Tile<T>::kVector; ++v) {
        T b[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) b[j] = threadIdx.x % 16 + 16 * j < width ? rows[(k + v) * stride + threadIdx.x % 16 + 16 * j] : T(0);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kRows; ++j) at[i][j] += a[i].at[v] * b[j];
      }
    }
  }
};

// The same on tensor cores: each of the four warps has 16 rows and 32 columns, as four tiles of 16 x 8.
template <> struct Accumulator<float, true> {
  float at[4][4] = {};

  __device__ __forceinline__ static int row() { return warp() % 2 * 16 + lane() / 4; }
  __device__ __forceinline__ static int column() { return warp() / 2 * 32; }

  __device__ __forceinline__ void store(float* to, int stride) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) to[(row() + v / 2 * 8) * stride + column() + 8 * j + lane() % 4 * 2 + v % 2] = at[j][v];
  }

  __device__ __forceinline__ static void load_rows(const float* from, int stride, float (&a)[4]) {
    from += row() * stride + lane() % 4;
    a[0] = from[0], a[1] = from[8 * stride], a[2] = from[4], a[3] = from[8 * stride + 4];
  }

  __device__ __forceinline__ void dots(const float* own, const float* other, int stride, int length) {
#pragma unroll 1
    for (int d = 0; d < length; d += 8) {
      float a[4];
      load_rows(own + d, stride, a);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* from = other + (column() + 8 * j + lane() / 4) * stride + d + lane() % 4;
        const float b[2] = {from[0], from[4]};
        multiply_add(at[j], a, b);
      }
    }
  }

  __device__ __forceinline__ void product(const float* weights, int weight_stride, const float* rows, int stride, int count, int) {
#pragma unroll 1
    for (int k = 0; k < count; k += 8) {
      float a[4], high[4], low[4];
      load_rows(weights + k, weight_stride, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) high[i] = to_tf32(a[i]), low[i] = to_tf32(a[i] - high[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* from = rows + (k + lane() % 4) * stride + column() + 8 * j + lane() / 4;
        const float b[2] = {from[0], from[4 * stride]};
        multiply_add(at[j], low, b);
        multiply_add(at[j], high, b);
      }
    }
  }
};

// scores[i][j] = own_i . other_j over `length` columns, staged in chunks; `staged` sees each chunk.
template <typename T, bool kTensorCores, typename Staged>
__device__ __forceinline__ void dot_tile(const Source<T>& own, const Source<T>& other, int length, T* stage, T* scores, int stride, const Staged& staged) {
  using S = Tile<T>;
  Accumulator<T, kTensorCores> sums;
  for (int first = 0; first < length; first += S::kChunk) {
    __syncthreads();
    own.template stage<S::kOwn, S::kChunk>(first, length, stage, S::kChunkStride);
    other.template stage<S::kOther, S::kChunk>(first, length, stage + S::kOwn * S::kChunkStride, S::kChunkStride);
    __syncthreads();
    staged(stage);
    sums.dots(stage, stage + S::kOwn * S::kChunkStride, S::kChunkStride, S::kChunk);
  }
  sums.store(scores, stride);
}

// Dot products of the rows of a tile, and all that is known of its rows: at most twice, if the first time left the range of numbers.
template <typename T, bool kTensorCores>
__device__ __forceinline__ void measured_tile(const Attention<T>& p, const Source<T>& own, const Source<T>& other, bool own_divided, bool other_divided,
                                              const Rows<T>& rows, T* stage, T* scores, int stride) {
  using S = Tile<T>;
  const int t = threadIdx.x;
  const bool divided = t < S::kOwn ? own_divided : t < S::kOwn + S::kOther && other_divided;
  if (t >= S::kOwn && t < S::kOwn + S::kOther) rows.factor[t] = T(1);
  for (bool again = false;; again = true) {
    T squares = 0, largest = 0;
    dot_tile<T, kTensorCores>(own, other, p.features, stage, scores, stride, [&](const T* staged) {
      if (divided) measure(staged + t * S::kChunkStride, S::kChunk, squares, largest);
    });
    const bool repeat = !again && divided && out_of_range(squares, largest);
    if (__syncthreads_or(repeat)) {
      if (repeat) rows.factor[t] = power_near(largest);
      continue;
    }
    if (t < S::kOwn + S::kOther) finish_row(p, divided, squares, rows, t);
    __syncthreads();
    return;
  }
}

__device__ __forceinline__ int to_eight(int count) { return (count + 7) / 8 * 8; }

// weights rows, [kOwn, length], in pieces, of the first `count` rows: emit(row, column, value) for each number, neighbouring columns by neighbouring threads.
template <typename T, bool kTensorCores, typename Emit>
__device__ __forceinline__ void product_tile(const T* weights, int stride, const Source<T>& rows, int count, int length, T* stage, const Emit& emit) {
  using S = Tile<T>;
  for (int first = 0; first < length; first += S::kColumns) {
    Accumulator<T, kTensorCores> sums;
#pragma unroll 1
    for (int row = 0; row == 0 || row < count; row += S::kOther) {
      __syncthreads();
      rows.from(row).template stage<S::kOther, S::kColumns>(first, length, stage, S::kColumnStride);
      __syncthreads();
      sums.product(weights + row, stride, stage, S::kColumnStride, to_eight(min(S::kOther, count - row)), S::kColumns);
    }
    __syncthreads();
    sums.store(stage, S::kColumns);
    __syncthreads();
    for (int e = threadIdx.x; e < S::kOwn * S::kColumns; e += kThreads) {
      const int column = first + e % S::kColumns;
      if (column < length) emit(e / S::kColumns, column, stage[e]);
    }
  }
}

// weights^T rows, [kOther, length], with `count` rows of both, all in shared memory: emit(row, column, value). A thread has kRows neighbouring rows.
template <typename T, typename Emit>
__device__ __forceinline__ void transposed_product(const T* weights, int count, const T* rows, int stride, int length, const Emit& emit) {
  using S = Tile<T>;
  for (int first = 0; first < length; first += S::kColumns)
    for (int half = 0; half < S::kOther; half += S::kOwn) {
      const int j = half + threadIdx.x / 16 * S::kRows, c = first + threadIdx.x % 16;
      T sums[S::kRows][S::kRows] = {};
      for (int k = 0; k < count; ++k) {
        const Vector<T> a = load_vector(weights + k * S::kScoreStride + j);
#pragma unroll
        for (int v = 0; v < S::kRows; ++v) {
          const T b = c + 16 * v < length ? rows[k * stride + c + 16 * v] : T(0);
#pragma unroll
          for (int i = 0; i < S::kRows; ++i) sums[i][v] += a.at[i] * b;
        }
      }
#pragma unroll
      for (int v = 0; v < S::kRows; ++v)
#pragma unroll
        for (int i = 0; i < S::kRows; ++i)
          if (c + 16 * v < length) emit(j + i, c + 16 * v, sums[i][v]);
    }
}

// ---- scores and slopes -----------------------------------------------------------------------------------------------------------------

template <typename T> __device__ __forceinline__ bool separable(const Attention<T>& p) { return p.normalize == kNone || p.eps_mode == kClamp; }

template <typename T> __device__ __forceinline__ T scale_of(const Attention<T>& p, int64_t b) {
  return p.scales ? p.scale * p.scales[b * p.scales_stride] : p.scale;
}

// u of a pair of rows.
template <typename T> __device__ __forceinline__ T factor_of(const Attention<T>& p, const Rows<T>& a, int i, const Rows<T>& b, int j) {
  return separable(p) ? T(1) : cosine_factor(p.eps_mode, p.eps, a.norm[i] * b.norm[j], a.inverse[i] * b.inverse[j]);
}

// s of a pair of rows whose staged rows have the product `dot`.
template <typename T> __device__ __forceinline__ T score_of(const Attention<T>& p, T scale, const Rows<T>& a, int i, const Rows<T>& b, int j, T dot) {
  return scale * factor_of(p, a, i, b, j) * (dot * a.unit[i] * b.unit[j]);
}

// For `count` queries, a divisor of kThreads, by threads side by side. `log_at(i, c)` and `grad_at(i, c)`: log-sum and gradient of class c of query i; for
// values the total is only made with kTotal.
template <typename T, bool kValues, bool kTotal, typename LogAt, typename GradAt>
__device__ __forceinline__ void take_incoming(const Backward<T>& p, int64_t b, const int* index, int count, const Incoming<T>& to, const LogAt& log_at,
                                              const GradAt& grad_at) {
  const int each = kThreads / count, i = threadIdx.x / each, q = index[i];
  T top = -infinity<T>(), sum = 0, total = 0;
  if (q >= 0) {
    if constexpr (kValues) {
      const int64_t result = b * p.result.strides[0] + q * p.result.strides[1];
      for (int c = threadIdx.x % each; kTotal && c < p.columns; c += each)
        total += grad_at(i, c) * load<T>(p.result.data, result + c * p.result.strides[2], p.element);
    } else {
      for (int c = threadIdx.x % each; c < p.columns; c += each) {
        const T log_sum = log_at(i, c);
        if (log_sum == -infinity<T>()) continue;  // a class without support gives no gradient
        const T before = top;
        top = fmax(top, log_sum);
        sum = sum * exp_about(before, top) + exp_about(log_sum, top);
        total += grad_at(i, c);
      }
    }
  }
  for (int distance = each / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
    if constexpr (!kValues) {
      const T other = __shfl_xor_sync(kAllLanes, top, distance), others = __shfl_xor_sync(kAllLanes, sum, distance), now = fmax(top, other);
      sum = sum * exp_about(top, now) + others * exp_about(other, now), top = now;
    }
  }
  if (threadIdx.x % each == 0) {
    const T log_sum = kValues ? (q >= 0 ? p.log_sums[b * p.queries + q] : T(0)) : top + log(sum);
    // No support at all: +infinity makes every weight 0.
    to.log[i] = q < 0 || log_sum == -infinity<T>() ? infinity<T>() : log_sum;
    to.total[i] = total;
  }
}

// The slope of the loss by a score, with labels: `log_sum` and `grad` are of the class of the support.
template <typename T> __device__ __forceinline__ T class_slope(T score, T log_sum, T grad, T log, T total) {
  return exp(score - log_sum) * grad - exp(score - log) * total;
}

// The sum of a number of each thread, in thread 0, by way of kWarps numbers of shared memory. Between two barriers.
template <typename T> __device__ __forceinline__ T block_sum(T x, T* across) {
  x = warp_sum(x);
  if (lane() == 0) across[warp()] = x;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += across[w];
  return sum;
}

// ---- forward, tiles --------------------------------------------------------------------------------------------------------------------

// The state of the queries of a tile with labels: of each class and query the largest score, and the sum of exponentials about it.
template <typename T> struct ClassState {
  T *peak, *sum;
  int stride;  // from class to class
  __device__ __forceinline__ ClassState(T* at, int classes, int stride) : peak(at), sum(at + int64_t(classes) * stride), stride(stride) {}
};

// Result and log-sums of the queries [first, first + count) of episode b. `work` is shared memory, 2 * (kThreads + kOwn). Begins and ends at barriers.
template <typename T>
__device__ __forceinline__ void finish_classes(const Forward<T>& p, int64_t b, int first, int count, const ClassState<T>& state, T* work) {
  constexpr int kOwn = Tile<T>::kOwn, kEach = kThreads / kOwn;
  T *parts = work, *top = parts + 2 * kThreads, *total = top + kOwn;
  const int q = threadIdx.x % kOwn, sub = threadIdx.x / kOwn;
  T peak = -infinity<T>(), sum = 0;
  for (int c = sub; c < p.columns; c += kEach) peak = fmax(peak, state.peak[c * int64_t(state.stride) + q]);
  for (int c = sub; c < p.columns; c += kEach) sum += state.sum[c * int64_t(state.stride) + q] * exp_about(state.peak[c * int64_t(state.stride) + q], peak);
  parts[threadIdx.x] = peak, parts[kThreads + threadIdx.x] = sum;
  __syncthreads();
  if (sub == 0) {
    peak = -infinity<T>(), sum = 0;
    for (int i = 0; i < kEach; ++i) peak = fmax(peak, parts[i * kOwn + q]);
    for (int i = 0; i < kEach; ++i) sum += parts[kThreads + i * kOwn + q] * exp_about(parts[i * kOwn + q], peak);
    top[q] = peak, total[q] = log(sum);
  }
  __syncthreads();
  const int64_t to = (b * p.queries + first) * int64_t(p.columns);
  for (int64_t e = threadIdx.x; e < int64_t(count) * p.columns; e += kThreads) {
    const int i = int(e / p.columns), c = int(e % p.columns);
    const T largest = state.peak[c * int64_t(state.stride) + i], log_sum = log(state.sum[c * int64_t(state.stride) + i]);
    // Relative to the largest score, so that large scores do not round the small differences away.
    const bool absent = log_sum == -infinity<T>();
    store(p.result, to + e, absent ? log_sum : (largest - top[i]) + (log_sum - total[i]), p.element, false);
    p.log_sums[to + e] = largest + log_sum;
  }
}

template <typename T, bool kValues, bool kTensorCores> __device__ __forceinline__ void forward_tiles(const Forward<T>& p) {
  using S = Tile<T>;
  using Memory = ForwardMemory<T, kValues>;
  constexpr int kStride = Memory::kStride, kEach = kThreads / S::kOwn;
  const int t = threadIdx.x, part = blockIdx.x % p.parts, tile = blockIdx.x / p.parts % p.query_tiles;
  const int64_t b = blockIdx.x / p.parts / p.query_tiles;
  const T scale = scale_of(p, b);

  Arena arena(shared_memory);
  const Memory memory(arena, p);
  T *stage = memory.stage, *scores = memory.scores, *peak = memory.peak, *sum = memory.sum, *shrink = memory.shrink;
  const Rows<T> own = memory.rows, other = own.from(S::kOwn);
  const Chosen& chosen = memory.chosen;
  T* state = memory.state + (p.state ? blockIdx.x * state_size<T>(kValues, p.columns) : 0);
  const ClassState<T> classes(state, p.columns, p.state ? S::kOwn : S::kOwn + 1);

  const int first = tile * S::kOwn, count = min(S::kOwn, p.queries - first);
  if (t < S::kOwn) {
    own.index[t] = t < count ? first + t : kAbsent, own.factor[t] = T(1);
    peak[t] = -infinity<T>(), sum[t] = T(0);
  }
  if constexpr (!kValues)
    for (int e = t; e < p.columns * classes.stride; e += kThreads) classes.peak[e] = -infinity<T>(), classes.sum[e] = T(0);
  const Source<T> queries(p.query, b, p.element, own.index, own.factor), supports(p.support, b, p.element, other.index, other.factor);

  const int64_t tiles = (p.supports + S::kOther - 1) / S::kOther, end = tiles * (part + 1) / p.parts;
  int64_t at = tiles * part / p.parts;
  bool begun = false;  // whether there is anything in `state` to add to
  do {  // once even without supports
    const bool ends = at + 1 >= end;
    __syncthreads();
    choose<kValues, S::kOther>(p, b, at * S::kOther, chosen);
    __syncthreads();
    const int real = chosen.counts[0];
    if (real == 0 && !(kValues && ends)) continue;
    measured_tile<T, kTensorCores>(p, queries, supports, p.normalize == kBoth, p.normalize != kNone, own, stage, scores, kStride);
    if constexpr (kValues) {
      const int i = t / kEach;
      T largest = -infinity<T>(), added = 0;
      for (int j = t % kEach; j < real; j += kEach) {
        const T s = score_of(p, scale, own, i, other, j, scores[i * kStride + j]);
        scores[i * kStride + j] = s;
        largest = fmax(largest, s);
      }
      for (int distance = kEach / 2; distance > 0; distance /= 2) largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, distance));
      const T before = peak[i], now = fmax(before, largest);
      for (int j = t % kEach; j < S::kOther; j += kEach) {
        const T e = j < real ? exp(scores[i * kStride + j] - (now == -infinity<T>() ? T(0) : now)) : T(0);
        scores[i * kStride + j] = e;
        added += e;
      }
      for (int distance = kEach / 2; distance > 0; distance /= 2) added += __shfl_xor_sync(kAllLanes, added, distance);
      __syncwarp();
      if (t % kEach == 0) {
        shrink[i] = exp_about(before, now);
        peak[i] = now, sum[i] = sum[i] * shrink[i] + added;
      }
      const Source<T> values(p.third, b, p.element, other.index);
      product_tile<T, kTensorCores>(scores, kStride, values, real, p.columns, stage, [&](int row, int column, T x) {
        T* gathered = state + row * p.columns + column;
        if (begun) x += *gathered * shrink[row];
        if (!ends || p.parts > 1)
          *gathered = x;
        else if (row < count)
          store(p.result, ((b * p.queries + first + row) * p.columns + column), sum[row] == T(0) ? T(0) : x / sum[row], p.element, false);
      });
      begun = true;
    } else {
      const int segments = chosen.counts[1];
      for (int task = t; task < S::kOwn * segments; task += kThreads) {
        const int i = task % S::kOwn, segment = task / S::kOwn, from = chosen.first[segment], to = chosen.first[segment + 1];
        if (i >= count) continue;
        T *row = scores + i * kStride, largest = -infinity<T>(), added = 0;
        for (int j = from; j < to; ++j) {
          row[j] = score_of(p, scale, own, i, other, j, row[j]);
          largest = fmax(largest, row[j]);
        }
        const T shift = largest == -infinity<T>() ? T(0) : largest;
        for (int j = from; j < to; ++j) added += exp(row[j] - shift);
        T& class_peak = classes.peak[chosen.label[segment] * int64_t(classes.stride) + i];
        T& class_sum = classes.sum[chosen.label[segment] * int64_t(classes.stride) + i];
        const T now = fmax(class_peak, shift);
        class_sum = class_sum * exp_about(class_peak, now) + added * exp_about(shift, now);
        class_peak = now;
      }
    }
  } while (++at < end);

  __syncthreads();
  if constexpr (kValues) {
    if (p.parts > 1) {
      if (t < S::kOwn) state[S::kOwn * p.columns + t] = peak[t], state[S::kOwn * (p.columns + 1) + t] = sum[t];
    } else if (t < count) {
      p.log_sums[b * p.queries + first + t] = peak[t] + log(sum[t]);
    }
  } else if (p.parts == 1) {
    finish_classes(p, b, first, count, classes, stage);
  }
}

// The parts of each tile of queries, from the first to the last.
template <typename T, bool kValues> __device__ __forceinline__ void merge(const Forward<T>& p) {
  constexpr int kOwn = Tile<T>::kOwn;
  const int t = threadIdx.x, tile = blockIdx.x % p.query_tiles, first = tile * kOwn, count = min(kOwn, p.queries - first);
  const int64_t b = blockIdx.x / p.query_tiles, each = state_size<T>(kValues, p.columns);
  T* state = p.state + int64_t(blockIdx.x) * p.parts * each;
  Arena arena(shared_memory);
  T* work = MergeMemory<T>(arena).work;
  if constexpr (kValues) {
    T *top = work, *total = work + kOwn;
    if (t < kOwn) {
      const T *peak = state + kOwn * p.columns + t, *sum = peak + kOwn;
      T largest = -infinity<T>(), all = 0;
      for (int i = 0; i < p.parts; ++i) largest = fmax(largest, peak[i * each]);
      for (int i = 0; i < p.parts; ++i) all += sum[i * each] * exp_about(peak[i * each], largest);
      top[t] = largest, total[t] = all;
      if (t < count) p.log_sums[b * p.queries + first + t] = largest + log(all);
    }
    __syncthreads();
    for (int64_t e = t; e < int64_t(count) * p.columns; e += kThreads) {
      const int q = int(e / p.columns);
      T x = 0;
      for (int i = 0; i < p.parts; ++i) x += state[i * each + e] * exp_about(state[i * each + kOwn * p.columns + q], top[q]);
      store(p.result, (b * p.queries + first) * int64_t(p.columns) + e, total[q] == T(0) ? T(0) : x / total[q], p.element, false);
    }
  } else {
    const int64_t classes = int64_t(kOwn) * p.columns;
    for (int64_t e = t; e < classes; e += kThreads) {
      T largest = -infinity<T>(), all = 0;
      for (int i = 0; i < p.parts; ++i) largest = fmax(largest, state[i * each + e]);
      for (int i = 0; i < p.parts; ++i) all += state[i * each + classes + e] * exp_about(state[i * each + e], largest);
      state[e] = largest, state[classes + e] = all;
    }
    __syncthreads();
    finish_classes(p, b, first, count, ClassState<T>(state, p.columns, kOwn), work);
  }
}

// ---- backward, tiles -------------------------------------------------------------------------------------------------------------------

template <typename T, bool kValues, bool kTensorCores> __device__ __forceinline__ void backward_tiles(const Backward<T>& p) {
  using S = Tile<T>;
  const int t = threadIdx.x;
  // First the blocks that own queries, then those that own supports.
  const int64_t query_blocks = int64_t(p.batch) * p.query_tiles * p.support_parts;
  const bool owns_queries = blockIdx.x < query_blocks;
  const int64_t block = owns_queries ? blockIdx.x : blockIdx.x - query_blocks;
  const int parts = owns_queries ? p.support_parts : p.query_parts, own_tiles = owns_queries ? p.query_tiles : p.support_tiles;
  const int part = int(block % parts), own_tile = int(block / parts % own_tiles);
  const int64_t b = block / parts / own_tiles;
  const int own_rows = owns_queries ? p.queries : p.supports, other_rows = owns_queries ? p.supports : p.queries;
  const T scale = scale_of(p, b);

  Arena arena(shared_memory);
  const BackwardMemory<T, kValues> memory(arena);
  T *stage = memory.stage, *radial = memory.radial;
  const Rows<T> own = memory.rows, other = own.from(S::kOwn);
  const Incoming<T>& incoming = memory.incoming;

  const int first = own_tile * S::kOwn, count = min(S::kOwn, own_rows - first);
  if (t < S::kOwn) {
    const int i = first + t;
    own.index[t] = i < own_rows && (owns_queries || is_real(p, b, i)) ? i : kAbsent, own.factor[t] = T(1), radial[t] = T(0);
    if (!kValues && !owns_queries) memory.labels[t] = own.index[t] >= 0 ? label_of(p, b, i) : 0;
  }
  __syncthreads();
  const int* query_index = owns_queries ? own.index : other.index;
  const auto log_at = [&](int i, int c) { return p.log_sums[(b * p.queries + query_index[i]) * p.columns + c]; };
  const auto grad_at = [&](int i, int c) {
    return load<T>(p.grad.data, b * p.grad.strides[0] + query_index[i] * p.grad.strides[1] + c * p.grad.strides[2], p.element);
  };
  if (owns_queries) take_incoming<T, kValues, true>(p, b, own.index, S::kOwn, incoming, log_at, grad_at);

  const View &own_view = owns_queries ? p.query : p.support, &other_view = owns_queries ? p.support : p.query;
  const View &own_value_view = owns_queries ? p.grad : p.third, &other_value_view = owns_queries ? p.third : p.grad;  // for values
  const Source<T> own_source(own_view, b, p.element, own.index, own.factor), other_source(other_view, b, p.element, other.index, other.factor);
  const bool own_divided = owns_queries ? p.normalize == kBoth : p.normalize != kNone, other_divided = owns_queries ? p.normalize != kNone : p.normalize == kBoth;
  const int64_t tiles = (other_rows + S::kOther - 1) / S::kOther, begin = tiles * part / parts, end = tiles * (part + 1) / parts;
  const int64_t to = b * own_rows + first, part_rows = int64_t(p.batch) * own_rows * part;
  T scale_sum = 0;
  int64_t strip = begin;
  do {  // once even where the other side has no rows: the gradients are then 0
    const bool begins = strip == begin, ends = strip + 2 >= end;
    int streamed = 0;  // rows of the strip
    for (int half = 0; half < 2 && strip + half < end; ++half) {
      const int64_t from = (strip + half) * S::kOther;
      const int others = int(min(int64_t(S::kOther), other_rows - from));
      T *flow = memory.flow + half * S::kOther, *weights = memory.weights + half * S::kOther;
      streamed += others;
      __syncthreads();
      if (t < S::kOther) {
        const int64_t j = from + t;
        other.index[t] = j < other_rows && (!owns_queries || is_real(p, b, j)) ? int(j) : kAbsent;
        memory.strip_index[half * S::kOther + t] = other.index[t];
        if (!kValues && owns_queries) memory.labels[t] = other.index[t] >= 0 ? label_of(p, b, int(j)) : 0;
      }
      __syncthreads();
      if (!owns_queries) take_incoming<T, kValues, true>(p, b, other.index, S::kOther, incoming, log_at, grad_at);
      if constexpr (kValues) {
        const Source<T> of_own(own_value_view, b, p.element, own.index), of_other(other_value_view, b, p.element, other.index);
        dot_tile<T, kTensorCores>(of_own, of_other, p.columns, stage, weights, S::kStripStride, [](const T*) {});
      }
      measured_tile<T, kTensorCores>(p, own_source, other_source, own_divided, other_divided, own, stage, flow, S::kStripStride);
      if (t < S::kOther) memory.strip_factor[half * S::kOther + t] = other.factor[t];
      // Of the queries log-sums and gradients of all classes, where they fit in what was the stage: the loop below reads them in no order that memory likes.
      const int queries = owns_queries ? count : others, query_first = owns_queries ? first : int(from), class_stride = S::class_stride(p.columns);
      const bool staged = !kValues && 2 * queries * class_stride <= S::kStage;
      if (staged) {
        for (int e = t; e < queries * p.columns; e += kThreads) {
          const int i = e / p.columns, c = e % p.columns;
          stage[i * class_stride + c] = p.log_sums[(b * p.queries + query_first) * p.columns + e];
          stage[(queries + i) * class_stride + c] = grad_at(i, c);
        }
        __syncthreads();
      }
      for (int i = warp(); i < count; i += kWarps) {
        T along_row = 0;
        for (int j = lane(); j < to_eight(others); j += 32) {
          T out = 0, weight = 0;
          if (own.index[i] >= 0 && other.index[j] >= 0) {
            const int q = owns_queries ? i : j, s = owns_queries ? j : i;
            const T u = factor_of(p, own, i, other, j), cosine = flow[i * S::kStripStride + j] * own.unit[i] * other.unit[j], score = scale * u * cosine;
            T ds;
            if constexpr (kValues) {
              weight = exp(score - incoming.log[q]);
              ds = weight * (weights[i * S::kStripStride + j] - incoming.total[q]);
            } else {
              const int label = memory.labels[s];
              const T log_sum = staged ? stage[q * class_stride + max(label, 0)] : log_at(q, max(label, 0));
              const T grad = staged ? stage[(queries + q) * class_stride + max(label, 0)] : grad_at(q, max(label, 0));
              ds = label < 0 ? T(NAN) : class_slope(score, log_sum, grad, incoming.log[q], incoming.total[q]);
            }
            scale_sum += ds * u * cosine;
            along_row += scale * ds * (separable(p) ? T(1) : radial_factor(p.eps_mode, u)) * cosine;
            out = scale * ds * u * other.unit[j];
          }
          flow[i * S::kStripStride + j] = out;
          if constexpr (kValues) weights[i * S::kStripStride + j] = weight;
        }
        along_row = warp_sum(along_row);
        if (lane() == 0) radial[i] += along_row;
      }
    }
    // A number of a gradient: to the sum of the strips so far, or the last one to where it belongs.
    const auto gather = [&](const Gradient<T>& of, int row, int column, int columns, T x, const auto& finish) {
      if (row >= count) return;
      const int64_t place = (to + row) * columns + column;
      T* sum = of.parts ? of.parts + part_rows * columns + place : of.between + place;
      if (!begins) x += *sum;
      if (!ends)
        *sum = x;
      else if (of.parts)
        *sum = finish(x);
      else
        store(of.to, place, finish(x), p.element, true);
    };
    const Gradient<T>& of_own = owns_queries ? p.of_query : p.of_support;
    if (of_own.to) {
      const Source<T> rows(other_view, b, p.element, memory.strip_index, memory.strip_factor);
      product_tile<T, kTensorCores>(memory.flow, S::kStripStride, rows, streamed, p.features, stage, [&](int row, int column, T x) {
        gather(of_own, row, column, p.features, x, [&](T sum) {
          const int i = own.index[row];
          const T unit = i < 0 ? T(0)
                               : load<T>(own_view.data, b * own_view.strides[0] + i * own_view.strides[1] + column * own_view.strides[2], p.element) *
                                     own.factor[row] * own.unit[row];
          return own.inverse[row] * (sum - radial[row] * own.active[row] * unit);
        });
      });
    }
    if constexpr (kValues)
      if (p.of_values.to && !owns_queries) {
        const Source<T> grads(p.grad, b, p.element, memory.strip_index);
        product_tile<T, kTensorCores>(memory.weights, S::kStripStride, grads, streamed, p.columns, stage,
                                      [&](int row, int column, T x) { gather(p.of_values, row, column, p.columns, x, [](T sum) { return sum; }); });
      }
    strip += 2;
  } while (strip < end);
  if (owns_queries && p.scale_parts) {
    __syncthreads();
    scale_sum = block_sum(scale_sum, memory.across);
    if (t == 0) p.scale_parts[block] = p.scale * scale_sum;
  }
}

template <typename T> __device__ __forceinline__ void reduce(const Reduce<T>& p) {
  const int64_t start = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (const auto& sum : p.sums)
    for (int64_t e = start; e < sum.size; e += step) {
      T x = 0;
      for (int64_t i = 0; i < sum.count; ++i) x += sum.parts[i * sum.size + e];
      store(sum.to, e, x, p.element, true);
    }
  if (p.to_scales)
    for (int64_t b = start; b < p.batch; b += step) {
      T x = 0;
      for (int64_t i = 0; i < p.scale_parts; ++i) x += p.scales[b * p.scale_parts + i];
      p.to_scales[b] = x;
    }
}

// ---- an episode that is one block's alone ------------------------------------------------------------------------------------------------

// Rows in shared memory, divided by their norm in place. Between two barriers.
template <typename T>
__device__ __forceinline__ void pack_rows(const Attention<T>& p, bool divided, int count, T* at, int stride, const Rows<T>& rows) {
  const int t = threadIdx.x;
  if (t < count) {
    T *row = at + t * stride, squares = 0, largest = 0;
    rows.factor[t] = T(1);
    if (divided) {
      measure(row, p.features, squares, largest);
      if (out_of_range(squares, largest)) {
        const T by = power_near(largest);
        for (int d = 0; d < p.features; ++d) row[d] *= by;
        squares = 0, rows.factor[t] = by;
        measure(row, p.features, squares, largest);
      }
    }
    finish_row(p, divided, squares, rows, t);
  }
  __syncthreads();
  for (int r = warp(); r < count; r += kWarps)
    for (int d = lane(); d < p.features; d += 32) at[r * stride + d] *= rows.unit[r];
}

// Rows of shared memory to a contiguous tensor, from its row `first` on.
template <typename T>
__device__ __forceinline__ void write_rows(const T* from, int stride, int count, int columns, void* to, int64_t first, Element element, bool gradient) {
  for (int e = threadIdx.x; e < count * columns; e += kThreads)
    store(to, first * columns + e, from[e / columns * stride + e % columns], element, gradient);
}

template <typename T, bool kValues> __device__ __forceinline__ void episode_forward(const Forward<T>& p) {
  using S = Tile<T>;
  const int t = threadIdx.x, stride = S::episode_stride(p.features), value_stride = S::episode_stride(p.columns);
  const int64_t b = blockIdx.x;
  const T scale = scale_of(p, b);
  Arena arena(shared_memory);
  const EpisodeForwardMemory<T, kValues> memory(arena, stride, value_stride);
  T *supports = memory.supports, *queries = memory.queries, *scores = memory.scores, *values = memory.values, *top = memory.top, *total = memory.total;
  const Rows<T> own = memory.rows, other = own.from(S::kOwn);
  const Chosen& chosen = memory.chosen;
  int* segment_of = memory.segment_of;

  if constexpr (!kValues)
    for (int c = t; c < p.columns; c += kThreads) segment_of[c] = -1;
  choose<kValues, S::kOwn>(p, b, 0, chosen);
  __syncthreads();
  const int real = chosen.counts[0], segments = chosen.counts[1];
  if (!kValues && t < segments) segment_of[chosen.label[t]] = t;
  Source<T>(p.support, b, p.element, own.index).template stage<S::kOwn>(p.features, supports, stride);
  if constexpr (kValues) Source<T>(p.third, b, p.element, own.index).template stage<S::kOwn>(p.columns, values, value_stride);
  __syncthreads();
  pack_rows(p, p.normalize != kNone, S::kOwn, supports, stride, own);

  for (int first = 0; first < p.queries; first += S::kOther) {
    const int count = min(S::kOther, p.queries - first);
    __syncthreads();
    if (t < S::kOther) other.index[t] = t < count ? first + t : kAbsent;
    __syncthreads();
    Source<T>(p.query, b, p.element, other.index).template stage<S::kOther>(p.features, queries, stride);
    __syncthreads();
    pack_rows(p, p.normalize == kBoth, S::kOther, queries, stride, other);
    __syncthreads();
    Accumulator<T, false> sums;
    sums.dots(supports, queries, stride, p.features);
    sums.store(scores, S::kScoreStride);
    __syncthreads();
    const int64_t to = (b * p.queries + first);
    if constexpr (kValues) {
      if (t < S::kOther) {
        T largest = -infinity<T>(), sum = 0;
        for (int j = 0; j < real; ++j) {
          T& s = scores[j * S::kScoreStride + t];
          s *= scale * factor_of(p, own, j, other, t);
          largest = fmax(largest, s);
        }
        const T shift = largest == -infinity<T>() ? T(0) : largest;
        for (int j = 0; j < real; ++j) {
          T& s = scores[j * S::kScoreStride + t];
          s = exp(s - shift);
          sum += s;
        }
        total[t] = real ? T(1) / sum : T(0);
        if (t < count) p.log_sums[to + t] = largest + log(sum);
      }
      __syncthreads();
      transposed_product(scores, real, values, value_stride, p.columns,
                         [&](int row, int column, T x) { queries[row * value_stride + column] = x * total[row]; });
      __syncthreads();
      write_rows(queries, value_stride, count, p.columns, p.result, to, p.element, false);
    } else {
      // In place: the largest score of a class takes the place of its first, the logarithm of the sum about it that of its second.
      for (int task = t; task < S::kOther * segments; task += kThreads) {
        const int i = task % S::kOther, segment = task / S::kOther, from = chosen.first[segment], end = chosen.first[segment + 1];
        T *column = scores + i, largest = -infinity<T>(), sum = 0;
        for (int j = from; j < end; ++j) {
          T& s = column[j * S::kScoreStride];
          s *= scale * factor_of(p, own, j, other, i);
          largest = s != s ? s : fmax(largest, s);
        }
        for (int j = from; j < end; ++j) sum += exp_about(column[j * S::kScoreStride], largest);
        column[from * S::kScoreStride] = largest;
        if (end > from + 1) column[(from + 1) * S::kScoreStride] = log(sum);
      }
      __syncthreads();
      const auto log_of = [&](int segment, int i) {
        return chosen.first[segment + 1] > chosen.first[segment] + 1 ? scores[(chosen.first[segment] + 1) * S::kScoreStride + i] : T(0);
      };
      if (t < S::kOther) {
        T largest = -infinity<T>(), sum = 0;
        for (int s = 0; s < segments; ++s) largest = fmax(largest, scores[chosen.first[s] * S::kScoreStride + t]);
        for (int s = 0; s < segments; ++s) sum += exp((scores[chosen.first[s] * S::kScoreStride + t] - largest) + log_of(s, t));
        top[t] = largest, total[t] = log(sum);
      }
      __syncthreads();
      for (int e = t; e < count * p.columns; e += kThreads) {
        const int i = e / p.columns, segment = segment_of[e % p.columns];
        T result = -infinity<T>(), log_sum = result;
        if (segment >= 0) {
          const T peak = scores[chosen.first[segment] * S::kScoreStride + i], log = log_of(segment, i);
          result = (peak - top[i]) + (log - total[i]), log_sum = peak + log;
        }
        store(p.result, to * p.columns + e, result, p.element, false);
        p.log_sums[to * p.columns + e] = log_sum;
      }
    }
  }
}

template <typename T, bool kValues> __device__ __forceinline__ void episode_backward(const Backward<T>& p) {
  using S = Tile<T>;
  constexpr int kPieces = S::kEpisodeColumns / S::kColumns;
  const int t = threadIdx.x, stride = S::episode_stride(p.features), value_stride = kValues ? S::episode_stride(p.columns) : S::class_stride(p.columns);
  const int64_t b = blockIdx.x;
  const T scale = scale_of(p, b);
  Arena arena(shared_memory);
  const EpisodeBackwardMemory<T, kValues> memory(arena, stride, value_stride);
  T *supports = memory.supports, *queries = memory.queries, *flow = memory.flow, *weights = memory.weights, *values = memory.values;
  T *grads = memory.grads, *radial = memory.radial, *radial_parts = memory.radial_parts, *whole = memory.whole;
  const Rows<T> own = memory.rows, other = own.from(S::kOwn);
  const Incoming<T>& incoming = memory.incoming;

  if (t < S::kOwn) {
    own.index[t] = is_real(p, b, t) ? t : kAbsent, radial[t] = T(0);
    if (!kValues) memory.labels[t] = own.index[t] >= 0 ? label_of(p, b, t) : 0;
  }
  const auto log_at = [&](int i, int c) { return memory.logs[i * value_stride + c]; };
  const auto grad_at = [&](int i, int c) { return grads[i * value_stride + c]; };
  __syncthreads();
  Source<T>(p.support, b, p.element, own.index).template stage<S::kOwn>(p.features, supports, stride);
  if constexpr (kValues) Source<T>(p.third, b, p.element, own.index).template stage<S::kOwn>(p.columns, values, value_stride);
  __syncthreads();
  pack_rows(p, p.normalize != kNone, S::kOwn, supports, stride, own);

  Accumulator<T, false> of_support[kPieces], of_values[kPieces];
  T scale_sum = 0;
  for (int first = 0; first < p.queries; first += S::kOther) {
    const int count = min(S::kOther, p.queries - first);
    __syncthreads();
    if (t < S::kOther) other.index[t] = t < count ? first + t : kAbsent;
    __syncthreads();
    Source<T>(p.query, b, p.element, other.index).template stage<S::kOther>(p.features, queries, stride);
    if constexpr (kValues)
      Source<T>(p.grad, b, p.element, other.index).template stage<S::kOther>(p.columns, grads, value_stride);
    else
      for (int e = t; e < count * p.columns; e += kThreads) {
        const int i = e / p.columns, c = e % p.columns;
        memory.logs[i * value_stride + c] = p.log_sums[(b * p.queries + first) * p.columns + e];
        grads[i * value_stride + c] = load<T>(p.grad.data, b * p.grad.strides[0] + (first + i) * p.grad.strides[1] + c * p.grad.strides[2], p.element);
      }
    __syncthreads();
    take_incoming<T, kValues, !kValues>(p, b, other.index, S::kOther, incoming, log_at, grad_at);
    pack_rows(p, p.normalize == kBoth, S::kOther, queries, stride, other);
    __syncthreads();
    {
      Accumulator<T, false> sums;
      sums.dots(supports, queries, stride, p.features);
      sums.store(flow, S::kScoreStride);
    }
    if constexpr (kValues) {
      Accumulator<T, false> sums;
      sums.dots(values, grads, value_stride, p.columns);
      sums.store(weights, S::kScoreStride);
    }
    __syncthreads();
    if constexpr (kValues) {
      // All scores of a query are here: its weights can be made to sum to 1, and its slopes to 0, more exactly than log-sum and result allow, which are rounded.
      if (t < S::kOther) {
        T sum = 0, total = 0;
        for (int i = 0; i < p.supports; ++i) {
          if (own.index[i] < 0) continue;
          const T e = exp(scale * factor_of(p, own, i, other, t) * flow[i * S::kScoreStride + t] - incoming.log[t]);
          sum += e, total += e * weights[i * S::kScoreStride + t];
        }
        whole[t] = sum == T(0) ? T(0) : T(1) / sum, incoming.total[t] = total * whole[t];
      }
      __syncthreads();
    }
    // flow = scale ds u, for the products with rows of norm 1; and the sums of scale ds v (q^ . k^) over either side.
    for (int j = lane(); j < S::kOther; j += 32) radial_parts[warp() * S::kOther + j] = T(0);
    for (int i = warp(); i < p.supports; i += kWarps) {
      T along_row = 0;
      for (int j = lane(); j < to_eight(count); j += 32) {
        T out = 0, weight = 0;
        if (own.index[i] >= 0 && other.index[j] >= 0) {
          const T u = factor_of(p, own, i, other, j), cosine = flow[i * S::kScoreStride + j];
          T ds;
          if constexpr (kValues) {
            weight = exp(scale * u * cosine - incoming.log[j]) * whole[j];
            ds = weight * (weights[i * S::kScoreStride + j] - incoming.total[j]);
          } else {
            const int label = memory.labels[i];
            ds = label < 0 ? T(NAN) : class_slope(scale * u * cosine, log_at(j, label), grad_at(j, label), incoming.log[j], incoming.total[j]);
          }
          const T along = scale * ds * (separable(p) ? T(1) : radial_factor(p.eps_mode, u)) * cosine;
          scale_sum += ds * u * cosine, along_row += along, radial_parts[warp() * S::kOther + j] += along;
          out = scale * ds * u;
        }
        flow[i * S::kScoreStride + j] = out;
        if constexpr (kValues) weights[i * S::kScoreStride + j] = weight;
      }
      along_row = warp_sum(along_row);
      if (lane() == 0) radial[i] += along_row;
    }
    __syncthreads();
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (p.of_support.to && piece * S::kColumns < p.features)
        of_support[piece].product(flow, S::kScoreStride, queries + piece * S::kColumns, stride, to_eight(count), p.features - piece * S::kColumns);
      if (kValues && p.of_values.to && piece * S::kColumns < p.columns)
        of_values[piece].product(weights, S::kScoreStride, grads + piece * S::kColumns, value_stride, to_eight(count), p.columns - piece * S::kColumns);
    }
    if (p.of_query.to) {
      __syncthreads();
      transposed_product(flow, p.supports, supports, stride, p.features, [&](int row, int column, T x) {
        T back = 0;
        for (int w = 0; w < kWarps; ++w) back += radial_parts[w * S::kOther + row];
        T& at = queries[row * stride + column];
        at = other.inverse[row] * (x - back * other.active[row] * at);
      });
      __syncthreads();
      write_rows(queries, stride, count, p.features, p.of_query.to, b * p.queries + first, p.element, true);
    }
  }
  __syncthreads();
  if (p.of_support.to) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
      for (int i = 0; i < S::kRows; ++i)
#pragma unroll
        for (int j = 0; j < S::kRows; ++j) {
          const int row = t / 16 + 8 * i, column = piece * S::kColumns + t % 16 + 16 * j;
          if (column >= p.features) continue;
          T& at = supports[row * stride + column];
          at = own.inverse[row] * (of_support[piece].at[i][j] - radial[row] * own.active[row] * at);
        }
  }
  if (kValues && p.of_values.to) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
      for (int i = 0; i < S::kRows; ++i)
#pragma unroll
        for (int j = 0; j < S::kRows; ++j) {
          const int column = piece * S::kColumns + t % 16 + 16 * j;
          if (column < p.columns) values[(t / 16 + 8 * i) * value_stride + column] = of_values[piece].at[i][j];
        }
  }
  __syncthreads();
  if (p.of_support.to) write_rows(supports, stride, p.supports, p.features, p.of_support.to, b * p.supports, p.element, true);
  if (kValues && p.of_values.to) write_rows(values, value_stride, p.supports, p.columns, p.of_values.to, b * p.supports, p.element, true);
  if (p.to_scales) {
    scale_sum = block_sum(scale_sum, memory.across);
    if (t == 0) p.to_scales[b] = p.scale * scale_sum;
  }
}

}  // namespace
}  // namespace fastmeta

// ---- the kernels -----------------------------------------------------------------------------------------------------------------------

// kBlocks: how many shall fit on a processor. Where shared memory has no room for four, as in an episode's backward and in float64, three have more registers.
#define FASTMETA_DEFINE(name, Parameters, kBlocks, call) \
  extern "C" __global__ void __launch_bounds__(fastmeta::kThreads, kBlocks) name(const __grid_constant__ Parameters p) { call; }
#define FASTMETA_DEFINE_TILES(suffix, T, kTensorCores, kBlocks)                                                                                      \
  FASTMETA_DEFINE(cosine_attention_forward_##suffix, fastmeta::Forward<T>, kBlocks, (fastmeta::forward_tiles<T, true, kTensorCores>(p)))             \
  FASTMETA_DEFINE(cosine_attention_backward_##suffix, fastmeta::Backward<T>, kBlocks, (fastmeta::backward_tiles<T, true, kTensorCores>(p)))          \
  FASTMETA_DEFINE(matching_log_probs_forward_##suffix, fastmeta::Forward<T>, kBlocks, (fastmeta::forward_tiles<T, false, kTensorCores>(p)))          \
  FASTMETA_DEFINE(matching_log_probs_backward_##suffix, fastmeta::Backward<T>, kBlocks, (fastmeta::backward_tiles<T, false, kTensorCores>(p)))
#define FASTMETA_DEFINE_REST(suffix, T)                                                                                                         \
  FASTMETA_DEFINE(cosine_attention_episode_forward_##suffix, fastmeta::Forward<T>, 4, (fastmeta::episode_forward<T, true>(p)))                  \
  FASTMETA_DEFINE(cosine_attention_episode_backward_##suffix, fastmeta::Backward<T>, 3, (fastmeta::episode_backward<T, true>(p)))               \
  FASTMETA_DEFINE(matching_log_probs_episode_forward_##suffix, fastmeta::Forward<T>, 4, (fastmeta::episode_forward<T, false>(p)))               \
  FASTMETA_DEFINE(matching_log_probs_episode_backward_##suffix, fastmeta::Backward<T>, 4, (fastmeta::episode_backward<T, false>(p)))            \
  FASTMETA_DEFINE(cosine_attention_merge_##suffix, fastmeta::Forward<T>, 4, (fastmeta::merge<T, true>(p)))                                      \
  FASTMETA_DEFINE(matching_log_probs_merge_##suffix, fastmeta::Forward<T>, 4, (fastmeta::merge<T, false>(p)))                                   \
  FASTMETA_DEFINE(cosine_attention_reduce_##suffix, fastmeta::Reduce<T>, 4, (fastmeta::reduce<T>(p)))

FASTMETA_DEFINE_TILES(float, float, false, 4)
FASTMETA_DEFINE_TILES(double, double, false, 3)
FASTMETA_DEFINE_TILES(tensor_core, float, true, 4)
FASTMETA_DEFINE_REST(float, float)
FASTMETA_DEFINE_REST(double, double)
