// Lanes, an exponential that vectorises, and the one product kernel that everything on the CPU is built from.
//
// One source serves every instruction set: a function marked FASTMETA_CLONES is compiled for x86-64-v4 (AVX-512), -v3 (AVX2 with FMA) and
// the baseline, and the loader picks. All that it calls is always_inline, so that it is compiled with it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__linux__)
#define FASTMETA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define FASTMETA_INSTRUCTION_SETS "x86-64", "x86-64-v3", "x86-64-v4"
#else
#define FASTMETA_CLONES
#define FASTMETA_INSTRUCTION_SETS "baseline"
#endif
#define FASTMETA_INLINE __attribute__((always_inline)) inline

namespace fastmeta {

// Lanes are queries: a tile row holds one number for each of kLanes queries, 64 bytes in all.
template <typename T> inline constexpr int kLanes = 64 / sizeof(T);

template <typename T> struct FloatFormat;
template <> struct FloatFormat<float> {
  using Integer = int32_t;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;  // Taylor on |r| <= ln 2 / 2: the next term is 5e-9
  static constexpr float kLowest = -87.3f;                       // exp() of less is subnormal
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts: n * high is exact
};
template <> struct FloatFormat<double> {
  using Integer = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;  // the next term is 4e-18
  static constexpr double kLowest = -708.3;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

// exp(x) for x that is not large, 2^n exp(r) with x = n ln 2 + r; 0 where it would be subnormal, NaN for NaN. No branch and no
// call, so that a loop over it becomes vector code.
template <typename T> FASTMETA_INLINE T exp_nonpositive(T x) {
  using Format = FloatFormat<T>;
  using Integer = typename Format::Integer;
  constexpr T kRound = T(1.5) * T(Integer(1) << Format::kMantissa);  // adding it leaves n in the lowest bits
  const T y = x < Format::kLowest ? Format::kLowest : x;
  const T shifted = y * T(1.4426950408889634074) + kRound;
  const T n = shifted - kRound;
  const T r = (y - n * Format::kLn2High) - n * Format::kLn2Low;
  T coefficient = 1;
#pragma GCC unroll 16
  for (int i = 2; i <= Format::kTerms; ++i) coefficient /= T(i);
  T p = coefficient;
#pragma GCC unroll 16
  for (int i = Format::kTerms; i > 0; --i) {
    coefficient *= T(i);
    p = p * r + coefficient;
  }
  Integer bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = Integer((uint64_t(bits) << Format::kMantissa) + (uint64_t(Format::kBias) << Format::kMantissa));
  T power;
  std::memcpy(&power, &bits, sizeof power);
  return x < Format::kLowest ? T(0) : p * power;
}

// The generic vectors of GCC and clang: only sums and products of them, which are cut to the width that the instruction set has.
template <typename T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(64))); };
template <typename T> using Vector = typename VectorOf<T>::type;

template <typename T> FASTMETA_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, 64);
  return v;
}

template <typename T> FASTMETA_INLINE void store(T* p, Vector<T> v) { std::memcpy(p, &v, 64); }

// How the left factor of a product lies in memory: element (m, k) at a[m * ld + k], or at a[k * ld + m].
enum class Left { kRows, kColumns };

inline constexpr int kTileRows = 6;  // 6 x 64 bytes of sums fill 12 of the 16 registers of AVX2

template <typename T, Left kLeft, int kRows>
FASTMETA_INLINE void product_tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  Vector<T> sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = add ? load(c + r * ldc) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> right = load(b + k * ldb);
    for (int r = 0; r < kRows; ++r) sums[r] += (kLeft == Left::kRows ? a[r * lda + k] : a[k * lda + r]) * right;
  }
  for (int r = 0; r < kRows; ++r) store(c + r * ldc, sums[r]);
}

// c[m][lanes] = (add ? c : 0) + sum_k a(m, k) b[k][lanes], for m < rows and k < depth.
template <typename T, Left kLeft>
FASTMETA_INLINE void product(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  const int64_t step = kLeft == Left::kRows ? lda : 1;
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    product_tile<T, kLeft, kTileRows>(depth, a + m * step, lda, b, ldb, c + m * ldc, ldc, add);
  a += m * step;
  c += m * ldc;
  switch (rows - m) {
    case 5: product_tile<T, kLeft, 5>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 4: product_tile<T, kLeft, 4>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 3: product_tile<T, kLeft, 3>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 2: product_tile<T, kLeft, 2>(depth, a, lda, b, ldb, c, ldc, add); break;
    case 1: product_tile<T, kLeft, 1>(depth, a, lda, b, ldb, c, ldc, add); break;
  }
}

}  // namespace fastmeta
