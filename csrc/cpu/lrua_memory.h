// One row of a memory with least-recently-used access: choose, write, address, read, and their derivatives. The mathematics is in
// fastmeta/reference/lrua_memory.py. A row is one episode; what works on it is one thread.
//
// Lanes are slots: the memory of a row lies as [M][padded], a slot a column, so that similarities, norms, softmax, the write and every
// weight over slots are vector code without a horizontal sum. Columns from N to `padded` are zeros, and stay zeros.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "common/lrua_memory.h"
#include "cpu/simd.h"
#include "cpu/tensor.h"

namespace fastmeta {

template <typename T> struct Lrua {
  int64_t slots, width, heads;  // N, M, R
  int64_t eps_mode;
  T eps, strength;
  int64_t least_used = kPerHead;
  bool read_before_write = false;
  T usage_decay = 0;
  int64_t padded = ceil_divide(slots, kLanes<T>) * kLanes<T>;

  int64_t memory_size() const { return width * padded; }
  int64_t weights_size() const { return heads * padded; }
};

// to[j][i] = from[i][j] for i < rows and j < columns.
template <typename T> FASTMETA_INLINE void transpose_any(int64_t rows, int64_t columns, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  constexpr int kSize = Square<T>::kSize;
  const int64_t square_rows = rows / kSize * kSize, square_columns = columns / kSize * kSize;
  transpose(square_rows, square_columns, from, from_ld, to, to_ld);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < square_rows ? square_columns : 0; j < columns; ++j) to[j * to_ld + i] = from[i * from_ld + j];
}

// `rows` rows of `count` numbers, from rows `from_ld` apart to rows `to_ld` apart, zeros from there up to to_ld.
template <typename T> FASTMETA_INLINE void pad_rows(int64_t rows, int64_t count, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * from_ld, count, to + i * to_ld);
    std::fill(to + i * to_ld + count, to + (i + 1) * to_ld, T(0));
  }
}

template <typename T> FASTMETA_INLINE void copy_rows(int64_t rows, int64_t count, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_ld, count, to + i * to_ld);
}

// A memory [N][M] as a caller has it, to lanes and back.
template <typename T> FASTMETA_INLINE void to_lanes(const Lrua<T>& p, const T* from, T* to) {
  transpose_any(p.slots, p.width, from, p.width, to, p.padded);
  for (int64_t m = 0; m < p.width; ++m) std::fill(to + m * p.padded + p.slots, to + (m + 1) * p.padded, T(0));
}

template <typename T> FASTMETA_INLINE void from_lanes(const Lrua<T>& p, const T* from, T* to) {
  transpose_any(p.width, p.slots, from, p.padded, to, p.width);
}

// ---- products over slots ------------------------------------------------------------------------------------------------------------

// c[j][lanes] = (add ? c : 0) + sum_m a[j][m] b[m][lanes]: [rows][depth] and [depth][padded].
template <typename T>
FASTMETA_INLINE void product_to_slots(const Lrua<T>& p, int64_t rows, int64_t depth, const T* a, const T* b, T* c, bool add) {
  for (int64_t n = 0; n < p.padded; n += kLanes<T>) product<T, Left::kRows>(rows, depth, a, depth, b + n, p.padded, c + n, p.padded, add);
}

// c[m][lanes] += sum_j a[j][m] b[j][lanes]: [depth][M] and [depth][padded].
template <typename T> FASTMETA_INLINE void add_outer(const Lrua<T>& p, int64_t depth, const T* a, const T* b, T* c) {
  for (int64_t n = 0; n < p.padded; n += kLanes<T>)
    product<T, Left::kColumns>(p.width, depth, a, p.width, b + n, p.padded, c + n, p.padded, true);
}

template <typename T, int kRows>
FASTMETA_INLINE void over_slots_tile(int64_t padded, const T* a, const T* first, const T* second, T* sums) {
  Vector<T> tile[kRows][2] = {};
  for (int64_t n = 0; n < padded; n += kLanes<T>) {
    const Vector<T> left = load(first + n), right = load(second + n);
    for (int j = 0; j < kRows; ++j) {
      const Vector<T> x = load(a + j * padded + n);
      tile[j][0] += x * left, tile[j][1] += x * right;
    }
  }
  for (int j = 0; j < kRows; ++j) store(sums + j * kLanes<T> * kLanes<T>, tile[j][0]), store(sums + (j * kLanes<T> + 1) * kLanes<T>, tile[j][1]);
}

// c[j][m] = sum_n a[j][n] b[m][n]: sums over lanes, kLanes of them at a time by a transpose.
template <typename T> FASTMETA_INLINE void product_over_slots(const Lrua<T>& p, const T* a, const T* b, T* c) {
  constexpr int L = kLanes<T>;
  alignas(64) T sums[4 * L * L], across[L * L];
  for (int64_t j = 0; j < p.heads; j += 4) {
    const int64_t rows = std::min<int64_t>(4, p.heads - j);
    for (int64_t m = 0; m < p.width; m += L) {
      const int64_t columns = std::min<int64_t>(L, p.width - m);
      if (columns < L) std::fill_n(sums, 4 * L * L, T(0));
      for (int64_t i = 0; i < columns; i += 2) {
        const T *left = a + j * p.padded, *first = b + (m + i) * p.padded, *second = i + 1 < columns ? first + p.padded : first;
        switch (rows) {
          case 4: over_slots_tile<T, 4>(p.padded, left, first, second, sums + i * L); break;
          case 3: over_slots_tile<T, 3>(p.padded, left, first, second, sums + i * L); break;
          case 2: over_slots_tile<T, 2>(p.padded, left, first, second, sums + i * L); break;
          default: over_slots_tile<T, 1>(p.padded, left, first, second, sums + i * L);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        transpose(L, L, sums + r * L * L, L, across, L);
        Vector<T> total{};
        for (int i = 0; i < L; ++i) total += load(across + i * L);
        std::memcpy(c + (j + r) * p.width + m, &total, size_t(columns) * sizeof(T));
      }
    }
  }
}

template <typename T> FASTMETA_INLINE T sum_of_lanes(Vector<T> v) {
  T lanes[kLanes<T>], sum = 0;
  store(lanes, v);
  for (int l = 0; l < kLanes<T>; ++l) sum += lanes[l];
  return sum;
}

// ---- scratch -----------------------------------------------------------------------------------------------------------------------

// What the functions below need beside their arguments; one for each thread at work.
template <typename T> class Scratch {
 public:
  explicit Scratch(const Lrua<T>& p) : data_(3 * p.padded + 4 * p.weights_size() + p.memory_size() + p.heads * p.width + 3 * p.heads) {
    T* at = data_.get();
    auto take = [&](int64_t count) FASTMETA_INLINE_LAMBDA { return std::exchange(at, at + count); };
    squares = take(p.padded), inverse_scale = take(p.padded), lanes = take(p.padded);
    cosines = take(p.weights_size()), inverse = take(p.weights_size()), flow = take(p.weights_size()), before = take(p.weights_size());
    scaled = take(p.memory_size());
    keys = take(p.heads * p.width);
    key_squares = take(p.heads), key_inverse_scale = take(p.heads), key_radial = take(p.heads);
  }
  T *squares, *inverse_scale, *lanes;                     // [padded]: |m|^2 and 1/t of each slot, with m = t m'
  T *cosines, *inverse, *flow, *before;                   // [R][padded]
  T* scaled;                                              // [M][padded]
  T* keys;                                                // [R][M]
  T *key_squares, *key_inverse_scale, *key_radial;        // [R]

 private:
  Buffer<T> data_;
};

// ---- forward -----------------------------------------------------------------------------------------------------------------------

// The R slots of least usage, the least first, ties by the lowest index. `left`: [padded] scratch.
template <typename T> FASTMETA_INLINE void choose_least_used(const Lrua<T>& p, const T* usage, T* left, int64_t* chosen) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::copy_n(usage, p.slots, left);
  std::fill(left + p.slots, left + p.padded, kInfinity);
  for (int64_t j = 0; j < p.heads; ++j) {
    T least = kInfinity;
#pragma omp simd reduction(min : least)
    for (int64_t n = 0; n < p.padded; ++n) least = left[n] < least ? left[n] : least;
    int64_t n = 0;
    while (n < p.slots - 1 && left[n] != least) ++n;
    left[n] = kInfinity, chosen[j] = n;
  }
}

// ww = s wr_{t-1} + (1 - s) wlu
template <typename T> FASTMETA_INLINE void write_weights(const Lrua<T>& p, const T* before, const T* gate, const int64_t* chosen, T* to) {
  for (int64_t j = 0; j < p.heads; ++j) {
    const T s = gate[j];
    const T* from = before + j * p.padded;
    T* row = to + j * p.padded;
    for (int64_t n = 0; n < p.padded; n += kLanes<T>) store(row + n, s * load(from + n));
    if (p.least_used == kPerHead)
      row[chosen[j]] += 1 - s;
    else
      for (int64_t i = 0; i < p.heads; ++i) row[chosen[i]] += 1 - s;
  }
}

// M_t from M_{t-1}, in place.
template <typename T> FASTMETA_INLINE void write(const Lrua<T>& p, const T* weights, const T* add, const int64_t* chosen, T* memory) {
  for (int64_t m = 0; m < p.width; ++m) memory[m * p.padded + chosen[0]] = 0;
  add_outer(p, p.heads, add, weights, memory);
}

// Rows m = t m' and keys k = s k', whose largest element is 1.
template <typename T> FASTMETA_INLINE void scale_by_largest(const Lrua<T>& p, const T* memory, const T* keys, Scratch<T>& to) {
  constexpr T kSmallest = std::numeric_limits<T>::min();
  std::fill_n(to.inverse_scale, p.padded, T(0));
  for (int64_t m = 0; m < p.width; ++m)
    for (int64_t n = 0; n < p.padded; ++n) to.inverse_scale[n] = std::max(to.inverse_scale[n], std::abs(memory[m * p.padded + n]));
  for (int64_t n = 0; n < p.padded; ++n) to.inverse_scale[n] = to.inverse_scale[n] > 0 ? 1 / std::max(to.inverse_scale[n], kSmallest) : 1;
  for (int64_t m = 0; m < p.width; ++m)
    for (int64_t n = 0; n < p.padded; ++n) to.scaled[m * p.padded + n] = memory[m * p.padded + n] * to.inverse_scale[n];
  for (int64_t j = 0; j < p.heads; ++j) {
    T largest = 0;
    for (int64_t m = 0; m < p.width; ++m) largest = std::max(largest, std::abs(keys[j * p.width + m]));
    to.key_inverse_scale[j] = largest > 0 ? 1 / std::max(largest, kSmallest) : 1;
    for (int64_t m = 0; m < p.width; ++m) to.keys[j * p.width + m] = keys[j * p.width + m] * to.key_inverse_scale[j];
  }
}

template <typename T> FASTMETA_INLINE void squares_of(const Lrua<T>& p, const T* memory, const T* keys, Scratch<T>& to) {
  for (int64_t n = 0; n < p.padded; n += kLanes<T>) {
    Vector<T> sums{};
    for (int64_t m = 0; m < p.width; ++m) {
      const Vector<T> x = load(memory + m * p.padded + n);
      sums += x * x;
    }
    store(to.squares + n, sums);
  }
  for (int64_t j = 0; j < p.heads; ++j) {
    T sum = 0;
    for (int64_t m = 0; m < p.width; ++m) sum += keys[j * p.width + m] * keys[j * p.width + m];
    to.key_squares[j] = sum;
  }
}

// c(k^j, M(i)) and 1 / g of every head and slot, both with memory and keys scaled where their squares are not of usual size; these two come back.
template <typename T> struct Factors {
  const T *memory, *keys;
  bool scaled;
};

template <typename T> FASTMETA_INLINE Factors<T> cosines(const Lrua<T>& p, const T* memory, const T* keys, Scratch<T>& to) {
  constexpr int L = kLanes<T>;
  squares_of(p, memory, keys, to);
  bool all_usual = p.eps > kSmallEps<T>;
  for (int64_t n = 0; n < p.padded; ++n) all_usual &= usual(to.squares[n]);
  for (int64_t j = 0; j < p.heads; ++j) all_usual &= usual(to.key_squares[j]);
  if (all_usual) {
    std::fill_n(to.inverse_scale, p.padded, T(1));
    std::fill_n(to.key_inverse_scale, p.heads, T(1));
  } else {
    scale_by_largest(p, memory, keys, to);
    memory = to.scaled, keys = to.keys;
    squares_of(p, memory, keys, to);
  }
  product_to_slots(p, p.heads, p.width, keys, memory, to.cosines, false);
  const T root = std::sqrt(p.eps);
  for (int64_t j = 0; j < p.heads; ++j) {
    const T square = to.key_squares[j], scale = to.key_inverse_scale[j], norm = std::sqrt(square);
    for (int64_t n = 0; n < p.padded; n += L) {
      const T *squares = to.squares + n, *scales = to.inverse_scale + n;
      T *c = to.cosines + j * p.padded + n, *inverse = to.inverse + j * p.padded + n;
      T g[L];
      if (p.eps_mode == kSqrt) {
        FASTMETA_EACH_LANE {
          const T least = root * scale * scales[l];
          g[l] = std::sqrt(square * squares[l] + least * least);
        }
      } else if (p.eps_mode == kAdd) {
        FASTMETA_EACH_LANE g[l] = norm * std::sqrt(squares[l]) + p.eps * scale * scales[l];
      } else {
        const T a = std::max(norm, p.eps * scale);
        FASTMETA_EACH_LANE {
          const T b = std::sqrt(squares[l]), least = p.eps * scales[l];
          g[l] = a * (b < least ? least : b);
        }
      }
      constexpr T kTiny = std::numeric_limits<T>::min();
      FASTMETA_EACH_LANE {
        inverse[l] = T(1) / (g[l] < kTiny ? kTiny : g[l]);
        c[l] *= inverse[l];
      }
    }
  }
  return {memory, keys, !all_usual};
}

// wr = softmax(strength * cosine). `strengths` [R], or null.
template <typename T>
FASTMETA_INLINE void address(const Lrua<T>& p, const T* memory, const T* keys, const T* strengths, T* weights, Scratch<T>& scratch) {
  constexpr int L = kLanes<T>;
  cosines(p, memory, keys, scratch);
  for (int64_t j = 0; j < p.heads; ++j) {
    const T strength = strengths ? p.strength * strengths[j] : p.strength;
    const T* c = scratch.cosines + j * p.padded;
    T* to = weights + j * p.padded;
    T largest = -std::numeric_limits<T>::infinity(), sums[L] = {};
#pragma omp simd reduction(max : largest)
    for (int64_t n = 0; n < p.slots; ++n) {
      to[n] = strength * c[n];
      largest = to[n] > largest ? to[n] : largest;
    }
    std::fill(to + p.slots, to + p.padded, -std::numeric_limits<T>::infinity());
    for (int64_t n = 0; n < p.padded; n += L) FASTMETA_EACH_LANE {
        to[n + l] = exp_nonpositive(to[n + l] - largest);
        sums[l] += to[n + l];
      }
    T sum = 0;
    for (int l = 0; l < L; ++l) sum += sums[l];
    const T inverse = T(1) / sum;
    for (int64_t n = 0; n < p.padded; n += L) store(to + n, inverse * load(to + n));
  }
}

// wu_t from wu_{t-1}, in place, for the first `count` slots.
template <typename T> FASTMETA_INLINE void update_usage(const Lrua<T>& p, int64_t count, const T* read, const T* written, T* usage) {
  for (int64_t n = 0; n < count; ++n) {
    T sum = p.usage_decay * usage[n];
    for (int64_t j = 0; j < p.heads; ++j) sum += read[j * p.padded + n];
    for (int64_t j = 0; j < p.heads; ++j) sum += written[j * p.padded + n];
    usage[n] = sum;
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------

// r = wr M: adds the gradients by wr and by M.
template <typename T>
FASTMETA_INLINE void read_backward(const Lrua<T>& p, const T* memory, const T* weights, const T* grad_read, T* grad_weights, T* grad_memory) {
  product_to_slots(p, p.heads, p.width, grad_read, memory, grad_weights, true);
  add_outer(p, p.heads, grad_read, weights, grad_memory);
}

// Gradients by the keys (set), the memory (added) and strengths [R] (set; may be null), from that by wr.
template <typename T>
FASTMETA_INLINE void address_backward(const Lrua<T>& p, const T* memory, const T* given_keys, const T* strengths, const T* weights,
                                      const T* grad_weights, T* grad_keys, T* grad_memory, T* grad_strengths, Scratch<T>& scratch) {
  constexpr int L = kLanes<T>;
  const Factors<T> factors = cosines(p, memory, given_keys, scratch);
  T *flow = scratch.flow, *radial = scratch.lanes;
  std::fill_n(radial, p.padded, T(0));
  for (int64_t j = 0; j < p.heads; ++j) {
    const T strength = strengths ? p.strength * strengths[j] : p.strength;
    const T *w = weights + j * p.padded, *grad = grad_weights + j * p.padded;
    const T *cosine = scratch.cosines + j * p.padded, *inverse = scratch.inverse + j * p.padded;
    T* q = flow + j * p.padded;
    Vector<T> mean_sums{};
    for (int64_t n = 0; n < p.padded; n += L) mean_sums += load(w + n) * load(grad + n);
    const T mean = sum_of_lanes<T>(mean_sums);
    const T square = scratch.key_squares[j], norm = std::sqrt(square);
    const T inverse_square = square > 0 ? 1 / square : 0, inverse_norm = norm > 0 ? 1 / norm : 0;
    const bool active = norm > p.eps * scratch.key_inverse_scale[j];  // of `clamp`
    T by_strength[L] = {}, by_key[L] = {};
    for (int64_t n = 0; n < p.padded; n += L) {
      const T* squares = scratch.squares + n;
      FASTMETA_EACH_LANE {
        const T by_score = w[n + l] * (grad[n + l] - mean);
        by_strength[l] += by_score * cosine[n + l];
        q[n + l] = strength * by_score;
      }
      // c = d / g: beside d / dk the share of g, along k and along m.
      if (p.eps_mode == kSqrt) {
        FASTMETA_EACH_LANE {
          const T along = q[n + l] * cosine[n + l] * inverse[n + l] * inverse[n + l];
          by_key[l] += along * squares[l];
          radial[n + l] += along * square;
        }
      } else if (p.eps_mode == kAdd) {
        FASTMETA_EACH_LANE {
          const T along = q[n + l] * cosine[n + l] * inverse[n + l], b = std::sqrt(squares[l]);
          by_key[l] += along * b * inverse_norm;
          radial[n + l] += b > 0 ? along * norm / b : T(0);
        }
      } else {
        FASTMETA_EACH_LANE {
          const T along = q[n + l] * cosine[n + l], least = p.eps * scratch.inverse_scale[n + l];
          by_key[l] += active ? along * inverse_square : T(0);
          radial[n + l] += squares[l] > least * least ? along / squares[l] : T(0);
        }
      }
      FASTMETA_EACH_LANE q[n + l] *= inverse[n + l];
    }
    T sum = 0, strength_sum = 0;
    for (int l = 0; l < L; ++l) sum += by_key[l], strength_sum += by_strength[l];
    scratch.key_radial[j] = sum;
    if (grad_strengths) grad_strengths[j] = p.strength * strength_sum;
  }
  product_over_slots(p, flow, factors.memory, grad_keys);
  for (int64_t j = 0; j < p.heads; ++j)
    for (int64_t m = 0; m < p.width; ++m)
      grad_keys[j * p.width + m] = scratch.key_inverse_scale[j] * (grad_keys[j * p.width + m] - scratch.key_radial[j] * factors.keys[j * p.width + m]);
  // The gradient of the memory: sum_j q^j k^j - radial m, for the row as scaled.
  if (factors.scaled) {
    for (int64_t j = 0; j < p.heads; ++j)
      for (int64_t n = 0; n < p.padded; ++n) flow[j * p.padded + n] *= scratch.inverse_scale[n];
    for (int64_t n = 0; n < p.padded; ++n) radial[n] *= scratch.inverse_scale[n];
  }
  for (int64_t m = 0; m < p.width; ++m)
    for (int64_t n = 0; n < p.padded; n += L) {
      T* to = grad_memory + m * p.padded + n;
      store(to, load(to) - load(radial + n) * load(factors.memory + m * p.padded + n));
    }
  add_outer(p, p.heads, factors.keys, flow, grad_memory);
}

// From the gradients by M_t (made that by M~, in place) and by ww (null for none): those by the add vectors (set), the gates (set) and wr_{t-1} (set).
template <typename T>
FASTMETA_INLINE void write_backward(const Lrua<T>& p, const T* before, const T* gate, const T* add, const int64_t* chosen, const T* weights,
                                    const T* grad_weights, T* grad_memory, T* grad_before, T* grad_add, T* grad_gate) {
  if (grad_weights)
    std::copy_n(grad_weights, p.weights_size(), grad_before);
  product_to_slots(p, p.heads, p.width, add, grad_memory, grad_before, grad_weights != nullptr);
  product_over_slots(p, weights, grad_memory, grad_add);
  for (int64_t j = 0; j < p.heads; ++j) {
    T* row = grad_before + j * p.padded;
    Vector<T> sums{};
    T least = 0;
    if (p.least_used == kPerHead)
      least = row[chosen[j]];
    else
      for (int64_t i = 0; i < p.heads; ++i) least += row[chosen[i]];
    for (int64_t n = 0; n < p.padded; n += kLanes<T>) {
      const Vector<T> grad = load(row + n);
      sums += grad * load(before + j * p.padded + n);
      store(row + n, gate[j] * grad);
    }
    grad_gate[j] = sum_of_lanes<T>(sums) - least;
  }
  for (int64_t m = 0; m < p.width; ++m) grad_memory[m * p.padded + chosen[0]] = 0;
}

}  // namespace fastmeta
