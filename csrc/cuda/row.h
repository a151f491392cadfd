// What the host code of operations has in common that give each episode's row of memory a block of its own.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "cuda/launch.h"
#include "cuda/lrua_memory.h"

namespace fastmeta {

template <typename T> T* data(const Optional& t) { return t ? data<T>(*t) : nullptr; }

template <typename T>
Lrua<T> lrua(int64_t slots, int64_t width, int64_t heads, int64_t eps_mode, double eps, double strength, int64_t least_used, bool read_before_write,
             double usage_decay) {
  const Lrua<T> p{small(slots), small(width), small(heads), int32_t(eps_mode), int32_t(least_used), read_before_write,
                  std::max(T(eps), std::numeric_limits<T>::min()), T(strength), T(usage_decay)};
  small((slots + 40) * width), small((slots + 40) * heads), small(heads * width);  // the kernels index a row with 32 bits
  return p;
}

// Launches a block for each of `batch` rows; `of` is what its memory is made of. Where shared memory is too small for it, global memory serves.
template <typename Memory, typename Choose, typename Parameters, typename Of>
void launch_rows(const Device& device, const Choose& kernel, Parameters& p, const Of& of, int64_t batch) {
  Arena arena;
  Memory(arena, of);
  const bool large = arena.used() > device.shared_limit();
  std::optional<Tensor> scratch;
  if (large) {
    scratch = device.empty({batch * arena.used() / 8}, ScalarType::Double);  // its size is a multiple of 16 bytes
    p.scratch = data<unsigned char>(*scratch), p.scratch_size = arena.used();
  }
  device.launch(kernel(large), batch, kRowThreads, large ? 0 : arena.used(), p);
}

}  // namespace fastmeta
