// The kernels of cosine_attention and matching_log_probs, and their parameters: what csrc/cuda/cosine_attention.cpp fills in and
// csrc/cuda/cosine_attention.cu reads.
#pragma once

#include <cstdint>

#include "common/cosine.h"
#include "cuda/kernel.h"

namespace fastmeta {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// How a block of kThreads cuts its work: a tile is the scores of kOwn rows of one side (queries or supports), which are the block's own, and
// of kOther rows of the other side; each thread has kRows x kRows of them.
template <typename T> struct Tile {
  static constexpr int kRows = sizeof(T) == 4 ? 4 : 2;
  static constexpr int kOwn = 8 * kRows, kOther = 16 * kRows;
  static constexpr int kVector = 16 / sizeof(T);  // numbers in the widest access
  // Rows in shared memory are 16 bytes longer than a multiple of 128, so that eight threads that read 16 bytes of eight rows meet every bank once.
  static constexpr int kChunk = 32, kChunkStride = kChunk + kVector;  // features staged at a time for scores
  static constexpr int kColumns = 16 * kRows, kColumnStride = kColumns + 2 * kVector;  // columns of a product at a time
  static constexpr int kScoreStride = kOther + kVector;
  static constexpr int kStrip = 2 * kOther, kStripStride = kStrip + kVector;  // scores that a backward keeps, for one product with all their rows
  static constexpr int kStage = (kOwn + kOther) * kChunkStride > kOther * kColumnStride ? (kOwn + kOther) * kChunkStride : kOther * kColumnStride;
  // An episode that is one block's alone: supports are its own rows, and rows are this long at most.
  static constexpr int kEpisodeColumns = 2 * kColumns, kEpisodeClasses = 128;
  static constexpr FASTMETA_EVERYWHERE int class_stride(int classes) { return classes | 1; }
  static constexpr FASTMETA_EVERYWHERE int episode_stride(int columns) { return (columns + 31) / 32 * 32 + kVector; }
};

enum Element : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

// Three dimensions, strides in elements.
struct View {
  const void* data;
  int64_t strides[3];
};

template <typename T> struct Attention {
  int32_t batch, queries, supports, features, columns;  // B, Q, S, D, C
  int32_t normalize, eps_mode;
  Element element;  // of query, support, values, grad, result
  View query, support, third;  // third: values [B, S, C], or labels int64 [B, S]
  View mask;  // bool [B, S]; data is null where there is none
  const T* scales;
  int64_t scales_stride;
  T scale, eps;
};

// Numbers of one block in `state`, where it is not in shared memory: for labels the largest score and the sum of exponentials about it, of each
// class and query; for values the weighted values, and both numbers of each query.
template <typename T> constexpr int64_t state_size(bool values, int64_t columns) {
  return Tile<T>::kOwn * (values ? columns + 2 : 2 * columns);
}

template <typename T> struct Forward : Attention<T> {
  int32_t query_tiles, parts;  // the supports are cut into `parts`, whose states are merged
  T* state;                    // [B, query_tiles, parts, state_size], or null: in shared memory
  void* result;                // [B, Q, C]
  T* log_sums;                 // [B, Q], or for labels [B, Q, C]
};

// A gradient [B, rows, columns].
template <typename T> struct Gradient {
  void* to;    // null where it is not wanted
  T* parts;    // [parts, B, rows, columns]: what each part of the stream gives; null where there is one part
  T* between;  // [B, rows, columns]: the sums between one strip of the stream and the next of a single part; may be `to`; null where one strip is all
};

template <typename T> struct Backward : Attention<T> {
  View grad, result;
  const T* log_sums;
  int32_t query_tiles, support_parts;  // blocks whose own rows are queries, and the parts that the supports are cut into for them
  int32_t support_tiles, query_parts;  // the same the other way round
  Gradient<T> of_query, of_support, of_values;
  T* scale_parts;  // [B, query_tiles, support_parts]; null where the gradient of the scales is not wanted
  T* to_scales;    // [B]: where an episode is one block's alone
};

// Adds up what blocks left.
template <typename T> struct Reduce {
  int64_t batch, scale_parts;
  const T* scales;
  T* to_scales;
  Element element;
  struct Sum {
    const T* parts;
    void* to;
    int64_t count, size;
  } sums[3];
};

// ---- shared memory: one description for the host, which asks for it, and the device, which uses it ------------------------------------------

// What is known of the rows of a tile. `unit` is what turns a staged row into one of norm 1 at most, x^, and `inverse` 1 / a' for the row as it
// came; the names are those of csrc/cpu/cosine_attention.cpp.
template <typename T> struct Rows {
  int* index;  // in the tensor, or negative
  T *factor, *unit, *inverse, *norm, *active;

  FASTMETA_EVERYWHERE Rows(int* index, T* at, int count)
      : index(index), factor(at), unit(at + count), inverse(at + 2 * count), norm(at + 3 * count), active(at + 4 * count) {}
  FASTMETA_EVERYWHERE Rows(Arena& arena, int count) : Rows(arena.take<int>(count), arena.take<T>(5 * count), count) {}
  FASTMETA_EVERYWHERE Rows from(int row) const {
    Rows rows = *this;
    rows.index += row, rows.factor += row, rows.unit += row, rows.inverse += row, rows.norm += row, rows.active += row;
    return rows;
  }
};

// The real supports of a tile at its front, with labels in their order: segment s, rows first[s] to first[s + 1], is all of class label[s].
struct Chosen {
  int *index, *keys, *sorted, *first, *label;
  int* counts;  // rows, segments

  FASTMETA_EVERYWHERE Chosen(Arena& arena, int count, int* index)
      : index(index), keys(arena.take<int>(count)), sorted(arena.take<int>(count)), first(arena.take<int>(count + 1)), label(arena.take<int>(count)),
        counts(arena.take<int>(2)) {}
};

// What the backward knows of a query before it sees a support: log-sum of all scores, and the sum of the gradients of the classes that are there,
// or for values the product of gradient and result.
template <typename T> struct Incoming {
  T *log, *total;
  FASTMETA_EVERYWHERE Incoming(Arena& arena, int count) : log(arena.take<T>(count)), total(arena.take<T>(count)) {}
};

template <typename T, bool kValues> struct ForwardMemory {
  using S = Tile<T>;
  static constexpr int kStride = kValues ? S::kScoreStride : S::kOther + 1;  // with labels threads side by side read down the columns
  T *stage, *scores;
  Rows<T> rows;
  Chosen chosen;
  T *peak, *sum, *shrink, *state;
  FASTMETA_EVERYWHERE ForwardMemory(Arena& arena, const Forward<T>& p)
      : stage(arena.take<T>(S::kStage)), scores(arena.take<T>(S::kOwn * kStride)), rows(arena, S::kOwn + S::kOther),
        chosen(arena, S::kOther, rows.index + S::kOwn), peak(arena.take<T>(S::kOwn)), sum(arena.take<T>(S::kOwn)), shrink(arena.take<T>(S::kOwn)),
        state(p.state ? p.state : arena.take<T>(kValues ? S::kOwn * p.columns : 2 * (S::kOwn + 1) * p.columns)) {}
};

template <typename T> struct MergeMemory {
  T* work;
  FASTMETA_EVERYWHERE explicit MergeMemory(Arena& arena) : work(arena.take<T>(2 * (kThreads + Tile<T>::kOwn))) {}
};

template <typename T, bool kValues> struct BackwardMemory {
  using S = Tile<T>;
  T *stage, *flow, *weights;
  Rows<T> rows;
  int* strip_index;
  T* strip_factor;
  T *radial, *across;
  Incoming<T> incoming;
  int* labels;  // of the supports of a tile
  FASTMETA_EVERYWHERE explicit BackwardMemory(Arena& arena)
      : stage(arena.take<T>(S::kStage)), flow(arena.take<T>(S::kOwn * S::kStripStride)), weights(arena.take<T>(kValues ? S::kOwn * S::kStripStride : 0)),
        rows(arena, S::kOwn + S::kOther), strip_index(arena.take<int>(S::kStrip)), strip_factor(arena.take<T>(S::kStrip)),
        radial(arena.take<T>(S::kOwn)), across(arena.take<T>(kWarps)), incoming(arena, S::kOther), labels(arena.take<int>(kValues ? 0 : S::kOther)) {}
};

template <typename T, bool kValues> struct EpisodeForwardMemory {
  using S = Tile<T>;
  T *supports, *queries, *scores, *values;
  Rows<T> rows;
  Chosen chosen;
  T *top, *total;
  int* segment_of;
  // For values the result is made where the queries were.
  FASTMETA_EVERYWHERE EpisodeForwardMemory(Arena& arena, int stride, int value_stride)
      : supports(arena.take<T>(S::kOwn * stride)), queries(arena.take<T>(S::kOther * (kValues && value_stride > stride ? value_stride : stride))),
        scores(arena.take<T>(S::kOwn * S::kScoreStride)), values(arena.take<T>(kValues ? S::kOwn * value_stride : 0)), rows(arena, S::kOwn + S::kOther),
        chosen(arena, S::kOwn, rows.index), top(arena.take<T>(S::kOther)), total(arena.take<T>(S::kOther)),
        segment_of(arena.take<int>(S::kEpisodeClasses)) {}
};

// `third_stride`: of the rows of values and of gradients; with labels, of gradients and log-sums by class, which no two threads side by side are to read in
// the same bank.
template <typename T, bool kValues> struct EpisodeBackwardMemory {
  using S = Tile<T>;
  T *supports, *queries, *flow, *weights, *values, *grads, *logs;
  Rows<T> rows;
  Incoming<T> incoming;
  T *radial, *radial_parts, *across, *whole;
  int* labels;
  FASTMETA_EVERYWHERE EpisodeBackwardMemory(Arena& arena, int stride, int third_stride)
      : supports(arena.take<T>(S::kOwn * stride)), queries(arena.take<T>(S::kOther * stride)), flow(arena.take<T>(S::kOwn * S::kScoreStride)),
        weights(arena.take<T>(kValues ? S::kOwn * S::kScoreStride : 0)), values(arena.take<T>(kValues ? S::kOwn * third_stride : 0)),
        grads(arena.take<T>(S::kOther * third_stride)), logs(arena.take<T>(kValues ? 0 : S::kOther * third_stride)), rows(arena, S::kOwn + S::kOther),
        incoming(arena, S::kOther),
        radial(arena.take<T>(S::kOwn)), radial_parts(arena.take<T>(kWarps * S::kOther)), across(arena.take<T>(kWarps)),
        whole(arena.take<T>(kValues ? S::kOther : 0)), labels(arena.take<int>(kValues ? 0 : S::kOwn)) {}
};

}  // namespace fastmeta

// names: operation, what, accumulation type; _tensor_core: for half types, on sm_80 and newer.
#define FASTMETA_DECLARE(suffix, T)                                                           \
  void cosine_attention_episode_forward_##suffix(const fastmeta::Forward<T>);                 \
  void cosine_attention_episode_backward_##suffix(const fastmeta::Backward<T>);               \
  void matching_log_probs_episode_forward_##suffix(const fastmeta::Forward<T>);               \
  void matching_log_probs_episode_backward_##suffix(const fastmeta::Backward<T>);             \
  void cosine_attention_merge_##suffix(const fastmeta::Forward<T>);                           \
  void matching_log_probs_merge_##suffix(const fastmeta::Forward<T>);                         \
  void cosine_attention_reduce_##suffix(const fastmeta::Reduce<T>);
#define FASTMETA_DECLARE_TILES(suffix, T)                                                     \
  void cosine_attention_forward_##suffix(const fastmeta::Forward<T>);                         \
  void cosine_attention_backward_##suffix(const fastmeta::Backward<T>);                       \
  void matching_log_probs_forward_##suffix(const fastmeta::Forward<T>);                       \
  void matching_log_probs_backward_##suffix(const fastmeta::Backward<T>);
#ifndef __CUDACC__
extern "C" {
FASTMETA_DECLARE(float, float)
FASTMETA_DECLARE(double, double)
FASTMETA_DECLARE_TILES(float, float)
FASTMETA_DECLARE_TILES(double, double)
FASTMETA_DECLARE_TILES(tensor_core, float)
}
#endif
