// What the kernels of all operations share.
#pragma once

#include <cstdint>

#include "common/cosine.h"

namespace fastmeta {

// Hands out memory from the front.
class Arena {
 public:
  FASTMETA_EVERYWHERE explicit Arena(unsigned char* memory = nullptr) : memory_(memory) {}
  template <typename X> FASTMETA_EVERYWHERE X* take(int64_t count) {
    X* at = reinterpret_cast<X*>(memory_ + used_);
    used_ += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
    return at;
  }
  FASTMETA_EVERYWHERE int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

#ifdef __CUDACC__

extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
template <typename T> __device__ __forceinline__ T infinity() { return T(INFINITY); }

template <typename T> __device__ __forceinline__ T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// exp(x - shift), where nothing was summed yet 0: both are then -infinity.
template <typename T> __device__ __forceinline__ T exp_about(T x, T shift) { return x == shift ? T(1) : exp(x - shift); }

// The power of two that brings a number near 1.
template <typename T> __device__ __forceinline__ T power_near(T largest) {
  constexpr int kMost = std::numeric_limits<T>::max_exponent - 2;
  return scalbn(T(1), -max(-kMost, min(kMost, ilogb(largest))));
}

#endif

}  // namespace fastmeta
