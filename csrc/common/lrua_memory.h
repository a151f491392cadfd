// What every implementation of the memory with least-recently-used access shares. Nothing here belongs to a device.
#pragma once

#include <cstdint>

#include "common/cosine.h"

namespace fastmeta {

// The positions in fastmeta.reference.lrua_memory.LEAST_USED.
enum LeastUsed : int64_t { kPerHead, kShared };

// The memory is kept on the tape before every kSegment-th step of an episode, and the writes in between are done again. Taking them back instead
// would lose what rounding lost: slots begin at 1e-6 and get writes of size 1.
constexpr int64_t kSegment = 8;

// Usual sizes of squares: neither they nor their products leave the range of normal numbers.
template <typename T> FASTMETA_EVERYWHERE bool usual(T square) {
  constexpr T kSmall = sizeof(T) == 4 ? T(1e-18) : T(1e-150), kLarge = sizeof(T) == 4 ? T(1e12) : T(1e100);
  return square == 0 || (square > kSmall && square < kLarge);
}
// An epsilon below which nothing is usual.
template <typename T> inline constexpr T kSmallEps = T(1e-9);

}  // namespace fastmeta
