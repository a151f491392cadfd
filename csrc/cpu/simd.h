// Lanes, an exponential that vectorises, and the one product kernel that everything on the CPU is built from.
//
// One source serves every instruction set: GCC compiles a function marked FASTMETA_CLONES for x86-64-v4 (AVX-512), -v3 (AVX2 with FMA) and
// the baseline, and the loader picks; clang compiles it for what its flags say. All that it calls is always_inline, so that it is compiled with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FASTMETA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define FASTMETA_INSTRUCTION_SETS "x86-64", "x86-64-v3", "x86-64-v4"
#else
#define FASTMETA_CLONES
#define FASTMETA_INSTRUCTION_SETS "baseline"
#endif
#define FASTMETA_INLINE __attribute__((always_inline)) inline
#define FASTMETA_INLINE_LAMBDA __attribute__((always_inline))
// A loop over the lanes of arrays that do not overlap: vector code without a check of that at run time.
#define FASTMETA_EACH_LANE _Pragma("omp simd") for (int l = 0; l < kLanes<T>; ++l)

namespace fastmeta {

// Lanes are queries, or coordinates: a tile row holds one number for each of kLanes of them, 64 bytes in all.
template <typename T> inline constexpr int kLanes = 64 / sizeof(T);

template <typename T> struct FloatFormat;
template <> struct FloatFormat<float> {
  using Integer = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int kTerms = 7, kLogTerms = 9;  // Taylor of exp to r^7, of atanh to s^9: the next terms are 5e-9 and 7e-10
  static constexpr float kLowest = -87.3f, kHighest = 88.9f;      // exp() of less is subnormal; of this infinite
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts: n * high is exact
};
template <> struct FloatFormat<double> {
  using Integer = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kTerms = 13, kLogTerms = 21;  // the next terms are 4e-18 and 2e-19
  static constexpr double kLowest = -708.3, kHighest = 710;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

// exp(x) = (1 + tail) * power, for x in [kLowest, kHighest]: x = n ln 2 + r, power = 2^n (infinite from 127.5 ln 2 on, double: 1023.5 ln 2),
// tail = exp(r) - 1. No branch and no call,
// so that a loop over it becomes vector code.
template <typename T> FASTMETA_INLINE T exp_parts(T x, T& power) {
  using Format = FloatFormat<T>;
  using Integer = typename Format::Integer;
  constexpr T kRound = T(1.5) * T(Integer(1) << Format::kMantissa);  // adding it leaves n in the lowest bits
  const T shifted = x * T(1.4426950408889634074) + kRound;
  const T n = shifted - kRound;
  const T r = (x - n * Format::kLn2High) - n * Format::kLn2Low;
  T coefficient = 1;
#pragma GCC unroll 16
  for (int i = 2; i <= Format::kTerms; ++i) coefficient /= T(i);
  T p = coefficient;
#pragma GCC unroll 16
  for (int i = Format::kTerms; i > 1; --i) {
    coefficient *= T(i);
    p = p * r + coefficient;
  }
  Integer bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = Integer((uint64_t(bits) << Format::kMantissa) + (uint64_t(Format::kBias) << Format::kMantissa));
  std::memcpy(&power, &bits, sizeof power);
  return p * r;
}

// exp(x) for x that is not large; 0 where it would be subnormal, NaN for NaN.
template <typename T> FASTMETA_INLINE T exp_nonpositive(T x) {
  constexpr T kLowest = FloatFormat<T>::kLowest;
  T power;
  const T tail = exp_parts(x < kLowest ? kLowest : x, power);
  return x < kLowest ? T(0) : (tail + T(1)) * power;
}

// tanh and the logistic function to a few roundings, small results and the far ends included.
template <typename T> FASTMETA_INLINE T tanh_of(T x) {
  constexpr T kLowest = FloatFormat<T>::kLowest;
  const T y = std::abs(x) * T(-2);
  T power;
  const T tail = exp_parts(y < kLowest ? kLowest : y, power);
  const T expm1 = power * tail + (power - T(1));
  return std::copysign(expm1 / (expm1 + T(2)), x);
}

template <typename T> FASTMETA_INLINE T sigmoid_of(T x) {
  constexpr T kLowest = FloatFormat<T>::kLowest, kHighest = FloatFormat<T>::kHighest;
  const T bounded = -x > kHighest ? kHighest : -x;
  T power;
  const T tail = exp_parts(bounded < kLowest ? kLowest : bounded, power);
  return T(1) / (T(1) + (tail + T(1)) * power);  // not power * tail + power: of an infinite power that is NaN
}

// log(x) for x that is not negative nor subnormal: 2 atanh((m - 1) / (m + 1)) + e ln 2 with x = 2^e m. 0 gives -inf, infinity and NaN themselves.
template <typename T> FASTMETA_INLINE T log_of(T x) {
  using Format = FloatFormat<T>;
  using Integer = typename Format::Integer;
  constexpr T kRootHalf = T(0.70710678118654752440);
  Integer bits, root;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&root, &kRootHalf, sizeof root);
  const Integer e = (bits - root) >> Format::kMantissa;
  bits -= Integer(uint64_t(e) << Format::kMantissa);
  T m;
  std::memcpy(&m, &bits, sizeof m);
  const T s = (m - 1) / (m + 1), square = s * s;
  T p = T(2) / T(Format::kLogTerms);
#pragma GCC unroll 16
  for (int i = Format::kLogTerms - 2; i > 0; i -= 2) p = p * square + T(2) / T(i);
  const T result = T(e) * Format::kLn2High + (p * s + T(e) * Format::kLn2Low);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  return x == 0 ? -kInfinity : x < kInfinity ? result : x;
}

// kLanes numbers as generic vectors of GCC and clang, of the widest registers that every target of interest has: GCC keeps a vector wider
// than the registers of a clone in memory (measured: one 64-byte vector in the AVX2 clone makes the product ten times as slow).
#if defined(__x86_64__)
inline constexpr int kRegister = 32;
#else
inline constexpr int kRegister = 16;
#endif
template <typename T> struct Register;
template <> struct Register<float> { typedef float type __attribute__((vector_size(kRegister))); };
template <> struct Register<double> { typedef double type __attribute__((vector_size(kRegister))); };

template <typename T> struct Vector {
  static constexpr int kParts = 64 / kRegister;
  typename Register<T>::type part[kParts];

  FASTMETA_INLINE void operator+=(const Vector& b) {
    for (int i = 0; i < kParts; ++i) part[i] += b.part[i];
  }
  friend FASTMETA_INLINE Vector operator-(Vector a, const Vector& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] -= b.part[i];
    return a;
  }
  friend FASTMETA_INLINE Vector operator*(Vector a, const Vector& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
    return a;
  }
  friend FASTMETA_INLINE Vector operator*(T a, Vector b) {
    for (int i = 0; i < kParts; ++i) b.part[i] = a * b.part[i];
    return b;
  }
};

template <typename T> FASTMETA_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  for (int i = 0; i < Vector<T>::kParts; ++i) std::memcpy(&v.part[i], p + i * kRegister / int(sizeof(T)), kRegister);
  return v;
}

template <typename T> FASTMETA_INLINE void store(T* p, const Vector<T>& v) {
  for (int i = 0; i < Vector<T>::kParts; ++i) std::memcpy(p + i * kRegister / int(sizeof(T)), &v.part[i], kRegister);
}

// How the left factor of a product lies in memory: element (m, k) at a[m * ld + k], or at a[k * ld + m].
enum class Left { kRows, kColumns };

inline constexpr int kTileRows = 6;  // 6 x 64 bytes of sums fill 12 of the 16 registers of AVX2

template <typename T, Left kLeft, int kRows>
FASTMETA_INLINE void product_tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  Vector<T> sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = add ? load(c + r * ldc) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> right = load(b + k * ldb);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] += (kLeft == Left::kRows ? a[r * lda + k] : a[k * lda + r]) * right;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store(c + r * ldc, sums[r]);
}

// c[m][lanes] = (add ? c : 0) + sum_k a(m, k) b[k][lanes], for m < rows and k < depth.
template <typename T, Left kLeft>
FASTMETA_INLINE void product(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  const int64_t step = kLeft == Left::kRows ? lda : 1;
  // Tiles of 6 rows, and of 4 where 6 would leave one or two: few sums at a time wait for each other.
  for (; rows > 8 || rows == kTileRows; rows -= kTileRows, a += kTileRows * step, c += kTileRows * ldc)
    product_tile<T, kLeft, kTileRows>(depth, a, lda, b, ldb, c, ldc, add);
  if (rows > kTileRows) {
    product_tile<T, kLeft, 4>(depth, a, lda, b, ldb, c, ldc, add);
    rows -= 4, a += 4 * step, c += 4 * ldc;
  }
  switch (rows) {
    case 5: product_tile<T, kLeft, 5>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 4: product_tile<T, kLeft, 4>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 3: product_tile<T, kLeft, 3>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 2: product_tile<T, kLeft, 2>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 1: product_tile<T, kLeft, 1>(depth, a, lda, b, ldb, c, ldc, add); break;
  }
}

template <typename T, int kRows, int kPanels>
FASTMETA_INLINE void panels_tile(int64_t depth, const T* a, int64_t lda, const T* panels, T* c, int64_t ldc, bool add) {
  Vector<T> sums[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kPanels; ++i) sums[r][i] = add ? load(c + r * ldc + i * kLanes<T>) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < kPanels; ++i) {
      const Vector<T> right = load(panels + (i * depth + k) * kLanes<T>);
      for (int r = 0; r < kRows; ++r) sums[r][i] += a[r * lda + k] * right;
    }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kPanels; ++i) store(c + r * ldc + i * kLanes<T>, sums[r][i]);
}

// c[m][n] = (add ? c : 0) + sum_k a[m][k] b[k][n], with b packed in `count` panels of kLanes columns: [count][depth][kLanes].
template <typename T>
FASTMETA_INLINE void product_with_panels(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* panels, int64_t count, T* c, int64_t ldc,
                                         bool add) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = 0;
  if (rows < 3)  // too few sums at a time with one panel
    for (; i + 4 <= count; i += 4)
      rows == 1 ? panels_tile<T, 1, 4>(depth, a, lda, panels + i * depth * L, c + i * L, ldc, add)
                : panels_tile<T, 2, 4>(depth, a, lda, panels + i * depth * L, c + i * L, ldc, add);
  for (; i < count; ++i) product<T, Left::kRows>(rows, depth, a, lda, panels + i * depth * L, L, c + i * L, ldc, add);
}

// Transposes a square of 32 bytes by 32 bytes: one vector of 32 bytes a row, log2 of its length rounds of exchanges. Loops are unrolled so that the
// rows stay in registers.
template <typename T> struct Square;

template <typename Row, typename Index, Index... kIndices> FASTMETA_INLINE Row pick(Row a, Row b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndices...);
#else
  typedef Index Indices __attribute__((vector_size(32)));
  return __builtin_shuffle(a, b, Indices{kIndices...});
#endif
}

template <> struct Square<float> {
  typedef float Row __attribute__((vector_size(32)));
  static constexpr int kSize = 8;
  template <int32_t... kIndices> static FASTMETA_INLINE Row pick(Row a, Row b) { return fastmeta::pick<Row, int32_t, kIndices...>(a, b); }
  static FASTMETA_INLINE void transpose(Row* v) {
    Row w[8];
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) w[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(v[i], v[i + 4]), w[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(v[i], v[i + 4]);
    auto exchange = [&](int i) FASTMETA_INLINE_LAMBDA { v[i] = pick<0, 1, 8, 9, 4, 5, 12, 13>(w[i], w[i + 2]), v[i + 2] = pick<2, 3, 10, 11, 6, 7, 14, 15>(w[i], w[i + 2]); };
    exchange(0), exchange(1), exchange(4), exchange(5);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) w[i] = pick<0, 8, 2, 10, 4, 12, 6, 14>(v[i], v[i + 1]), w[i + 1] = pick<1, 9, 3, 11, 5, 13, 7, 15>(v[i], v[i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = w[i];
  }
};

template <> struct Square<double> {
  typedef double Row __attribute__((vector_size(32)));
  static constexpr int kSize = 4;
  template <int64_t... kIndices> static FASTMETA_INLINE Row pick(Row a, Row b) { return fastmeta::pick<Row, int64_t, kIndices...>(a, b); }
  static FASTMETA_INLINE void transpose(Row* v) {
    Row w[4];
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) w[i] = pick<0, 1, 4, 5>(v[i], v[i + 2]), w[i + 2] = pick<2, 3, 6, 7>(v[i], v[i + 2]);
#pragma GCC unroll 8
    for (int i = 0; i < 4; i += 2) v[i] = pick<0, 4, 2, 6>(w[i], w[i + 1]), v[i + 1] = pick<1, 5, 3, 7>(w[i], w[i + 1]);
  }
};

// to[j][i] = from[i][j] for i < rows and j < columns, both multiples of Square<T>::kSize.
template <typename T> FASTMETA_INLINE void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  using Row = typename Square<T>::Row;
  constexpr int kSize = Square<T>::kSize;
  for (int64_t i = 0; i < rows; i += kSize)
    for (int64_t j = 0; j < columns; j += kSize) {
      Row v[kSize];
#pragma GCC unroll 8
      for (int r = 0; r < kSize; ++r) std::memcpy(&v[r], from + (i + r) * from_ld + j, sizeof(Row));
      Square<T>::transpose(v);
#pragma GCC unroll 8
      for (int r = 0; r < kSize; ++r) std::memcpy(to + (j + r) * to_ld + i, &v[r], sizeof(Row));
    }
}

}  // namespace fastmeta
