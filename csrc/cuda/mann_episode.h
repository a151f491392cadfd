// The kernels of mann_episode, and their parameters: what csrc/cuda/mann_episode.cpp fills in and csrc/cuda/mann_episode.cu reads.
#pragma once

#include "cuda/lrua_memory.h"

namespace fastmeta {

// A product down the columns of a weight: a warp has kSpan of them, and where there are more warps than spans the rows are split among them.
constexpr int kSpan = 128;
FASTMETA_EVERYWHERE int splits_of(int columns) {
  const int spans = (columns + kSpan - 1) / kSpan, splits = spans ? kRowWarps / spans : 1;
  return splits > 1 ? splits : 1;
}

template <typename T> struct MannState {
  T *hidden, *cell, *read, *read_weights, *usage, *memory;  // [B, ...], contiguous
};

// A line of the tape is one row at one step: x, r, h, which entered the controller; i, f, g, o; c; k, a, s, strength; wr [R][N].
template <typename T> struct MannEpisode {
  Lrua<T> lrua;
  int32_t steps, batch, inputs, hidden, heads;  // T, B, I, H, P
  bool own_add, learned_strength;
  unsigned char* scratch;  // as of LruaStep
  int64_t scratch_size;
  const int64_t* lengths;        // [B], or null
  const T *weight, *head_weight;  // [4H][I + R M + H], [P][H]
  MannState<const T> from;
  T* tape;                       // [T][B][line]; null where no gradient will be wanted
  int64_t* slots;                // [T][B][R]
  T* checkpoints;                // [ceil(T / kSegment)][B][M][N]: the memory before the first step of a segment

  FASTMETA_EVERYWHERE int32_t carried() const { return lrua.reads() + hidden; }  // [r, h]: what enters the controller beside the input
  FASTMETA_EVERYWHERE int32_t entering() const { return inputs + carried(); }
  FASTMETA_EVERYWHERE int32_t gates_at() const { return entering(); }
  FASTMETA_EVERYWHERE int32_t cell_at() const { return gates_at() + 4 * hidden; }
  FASTMETA_EVERYWHERE int32_t heads_at() const { return cell_at() + hidden; }
  FASTMETA_EVERYWHERE int32_t weights_at() const { return heads_at() + heads; }
  FASTMETA_EVERYWHERE int32_t line() const { return weights_at() + lrua.heads * lrua.slots; }
  // The parts of the heads.
  FASTMETA_EVERYWHERE int32_t add_at() const { return own_add ? lrua.reads() : 0; }
  FASTMETA_EVERYWHERE int32_t gate_at() const { return lrua.reads() * (1 + own_add); }
  FASTMETA_EVERYWHERE int32_t strength_at() const { return gate_at() + lrua.heads; }
};

template <typename T> struct MannForward : MannEpisode<T> {
  const T *given, *projected, *bias, *head_bias;  // given: inputs [T][B][I]; projected [T][B][4H]: the inputs by their weights
  T* outputs;                                     // [T][B][H + R M]
  MannState<T> to;
};

template <typename T> struct MannBackward : MannEpisode<T> {
  const T* grad_outputs;
  MannState<const T> grad_to;  // of the final state
  MannState<T> grad_from;      // of the initial one
  T *grad_gates, *grad_heads;  // [T][B][4H], [T][B][P]: of the sums, before any nonlinearity
};

// The sums over rows of grad_gates and grad_heads: the gradients of the biases.
template <typename T> struct MannBiases {
  int64_t rows;
  int32_t gates, heads;  // 4H, P
  const T *grad_gates, *grad_heads;
  T *of_bias, *of_head_bias;  // null where they are not wanted
};

template <typename T> struct MannForwardMemory {
  T *memory, *usage, *weights, *next_weights, *written, *carry, *cell, *gates, *heads;
  int* chosen;
  ScoreSums<T> sums;
  FASTMETA_EVERYWHERE MannForwardMemory(Arena& arena, const MannEpisode<T>& e)
      : memory(arena.take<T>(e.lrua.memory_size())), usage(arena.take<T>(e.lrua.slots)), weights(arena.take<T>(e.lrua.weights_size())),
        next_weights(arena.take<T>(e.lrua.weights_size())), written(arena.take<T>(e.lrua.weights_size())),
        carry(arena.take<T>(e.carried())), cell(arena.take<T>(e.hidden)),
        gates(arena.take<T>(4 * e.hidden)), heads(arena.take<T>(e.heads)), chosen(arena.take<int>(e.lrua.heads)), sums(arena, e.lrua) {}
};

template <typename T> struct MannBackwardMemory {
  T *memory, *of_memory, *of_weights, *weights, *before;
  T *written, *heads;  // of a segment: the write weights, what the heads said,
  int* chosen;         // and the least used slots
  T *cell, *of_carry, *of_cell, *of_gates, *of_heads, *parts;
  Addressed<T> addressed;
  GradientSums<T> sums;
  static FASTMETA_EVERYWHERE int parts_size(const MannEpisode<T>& e) {
    const int of_hidden = splits_of(e.hidden) * e.hidden, of_carry = splits_of(e.carried()) * e.carried();
    return of_hidden > of_carry ? of_hidden : of_carry;
  }
  FASTMETA_EVERYWHERE MannBackwardMemory(Arena& arena, const MannEpisode<T>& e)
      : memory(arena.take<T>(e.lrua.memory_size())), of_memory(arena.take<T>(e.lrua.memory_size())), of_weights(arena.take<T>(e.lrua.weights_size())),
        weights(arena.take<T>(e.lrua.weights_size())), before(arena.take<T>(e.lrua.weights_size())),
        written(arena.take<T>(kSegment * e.lrua.weights_size())), heads(arena.take<T>(kSegment * e.heads)),
        chosen(arena.take<int>(kSegment * e.lrua.heads)), cell(arena.take<T>(e.hidden)), of_carry(arena.take<T>(e.carried())),
        of_cell(arena.take<T>(e.hidden)), of_gates(arena.take<T>(4 * e.hidden)), of_heads(arena.take<T>(e.heads)),
        parts(arena.take<T>(parts_size(e))), addressed(arena, e.lrua), sums(arena, e.lrua) {}
};

}  // namespace fastmeta

#define FASTMETA_DECLARE_MANN(place, suffix, T)                                \
  void mann_episode_forward_##place##suffix(const fastmeta::MannForward<T>);   \
  void mann_episode_backward_##place##suffix(const fastmeta::MannBackward<T>);
#ifndef __CUDACC__
extern "C" {
FASTMETA_DECLARE_MANN(, float, float)
FASTMETA_DECLARE_MANN(, double, double)
FASTMETA_DECLARE_MANN(large_, float, float)
FASTMETA_DECLARE_MANN(large_, double, double)
void mann_episode_biases_float(const fastmeta::MannBiases<float>);
void mann_episode_biases_double(const fastmeta::MannBiases<double>);
}
#endif
