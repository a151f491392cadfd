// The cosine as every kernel computes it. Nothing here belongs to a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define FASTMETA_EVERYWHERE __host__ __device__ __forceinline__
#else
#define FASTMETA_EVERYWHERE __attribute__((always_inline)) inline
#endif

namespace fastmeta {

// The positions in fastmeta.reference.cosine_attention.NORMALIZE and EPS_MODES.
enum Normalize : int64_t { kNone, kSupport, kBoth };
enum EpsMode : int64_t { kClamp, kAdd, kSqrt };
// The gradients that a backward is asked for, bit by bit.
enum Needs : int64_t { kNeedsQuery = 1, kNeedsSupport = 2, kNeedsValues = 4, kNeedsScales = 8 };

// Rows whose sum of squares is between the square of this and its inverse are divided by their norm as they are; others, by their largest element first.
template <typename T> inline constexpr T kSmallestNorm = sizeof(T) == 4 ? T(1e-15) : T(1e-150);

// u of a query and a support: their cosine over the product of the rows divided by a', for `add` and `sqrt`. `norms` is the product of
// |x| / a' of both rows, `inverses` that of 1 / a'.
template <typename T> FASTMETA_EVERYWHERE T cosine_factor(int64_t eps_mode, T eps, T norms, T inverses) {
  constexpr T kLeast = std::numeric_limits<T>::min();
  const T g = eps_mode == kAdd ? norms + eps * inverses : std::sqrt(norms * norms + eps * inverses * inverses);
  return T(1) / (g > kLeast ? g : kLeast);
}

// v: what the derivative of u makes of the part of a gradient along the row itself.
template <typename T> FASTMETA_EVERYWHERE T radial_factor(int64_t eps_mode, T u) { return eps_mode == kAdd ? u * u : u * u * u; }

}  // namespace fastmeta
