// mann_episode, forward and backward. The mathematics is in fastmeta/reference/mann_episode.py, the contract of the operation in
// fastmeta/schemas/mann_episode.py.
//
// The rows of a batch are independent until the gradients of the weights, so a thread takes a group of rows through all the steps and never waits
// for another. What does not depend on the step before is one large product of the library for the whole episode: the
// inputs by their weights before the first step, the gradients of the weights after the last. In between stand small products, on weights
// packed once, and the memory, which lrua_memory.h works on row by row.
//
// For the backward each step leaves a line on the tape (what entered the controller, gates, cell, heads, read weights) and its least used
// slots. The memory itself would be N M numbers a step: it is kept every kSegment steps, and the writes in between are done again,
// to the same bits.
//
// Nothing of a row depends on how rows are grouped: the bits of the forward do not depend on the number of threads, nor, but for the
// library's products, do those of the backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/lrua_memory.h"
#include "cpu/lstm.h"

namespace fastmeta {
namespace {

template <typename T> struct Episode {
  Lrua<T> lrua;
  int64_t steps, batch, inputs, hidden, heads;  // T, B, I, H, P
  bool own_add, learned_strength;
  const int64_t* lengths;

  int64_t reads() const { return lrua.heads * lrua.width; }        // R M
  int64_t carried() const { return reads() + hidden; }             // [r, h]: what enters the controller beside the input
  int64_t entering() const { return inputs + carried(); }
  int64_t line() const { return entering() + 5 * hidden + heads + lrua.heads * lrua.slots; }
  int64_t segments() const { return ceil_divide(steps, kSegment); }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : steps; }

  // The parts of the heads.
  int64_t add_at() const { return own_add ? reads() : 0; }
  int64_t gate_at() const { return reads() * (1 + own_add); }
  int64_t strength_at() const { return gate_at() + lrua.heads; }
};

// A line of the tape: one row at one step.
template <typename T> struct Line {
  Line(const Episode<T>& e, T* tape, int64_t t, int64_t b)
      : entering(tape + (t * e.batch + b) * e.line()), gates(entering + e.entering()), cell(gates + 4 * e.hidden), heads(cell + e.hidden),
        weights(heads + e.heads) {}
  T *entering, *gates, *cell, *heads, *weights;  // x, r, h; i, f, g, o; c; k, a, s, strength; wr [R][N]
};

template <typename T> struct Tape {
  T* lines;              // [T][B]; null where no gradient will be wanted
  int64_t* slots;        // [T][B][R]
  T* checkpoints;        // [ceil(T / kSegment)][B][M][N]: the memory before the first step of a segment

  int64_t* slots_of(const Episode<T>& e, int64_t t, int64_t b) const { return slots + (t * e.batch + b) * e.lrua.heads; }
  T* checkpoint(const Episode<T>& e, int64_t t, int64_t b) const {
    return checkpoints + (t / kSegment * e.batch + b) * e.lrua.width * e.lrua.slots;
  }

  // After the end of an episode: zeros, as the products over all lines want them.
  void leave_blank(const Episode<T>& e, int64_t t, int64_t b) const {
    std::fill_n(lines + (t * e.batch + b) * e.line(), e.line(), T(0));
    std::fill_n(slots_of(e, t, b), e.lrua.heads, int64_t(0));
    if (t % kSegment == 0) std::fill_n(checkpoint(e, t, b), e.lrua.width * e.lrua.slots, T(0));
  }
};

// Rows of state, [B][...], as the caller has them.
template <typename T> struct State {
  T *hidden, *cell, *read, *read_weights, *usage, *memory;
};

// ---- weights packed for product_with_panels -----------------------------------------------------------------------------------------------

template <typename T> struct Panels {
  int64_t count, depth;
  Buffer<T> data;
  int64_t columns() const { return count * kLanes<T>; }
};

enum class Packed { kRows, kColumns };  // the rows of the matrix go to lanes, or its columns

template <typename T, Packed kPacked> FASTMETA_INLINE void pack_panel(int64_t rows, int64_t columns, const T* from, int64_t ld, int64_t i, T* to) {
  constexpr int64_t L = kLanes<T>;
  if (kPacked == Packed::kRows) {
    const int64_t lanes = std::min(L, rows - i * L);
    if (lanes < L) std::fill_n(to, columns * L, T(0));
    transpose_any(lanes, columns, from + i * L * ld, ld, to, L);
  } else {
    pad_rows(rows, std::min(L, columns - i * L), from + i * L, ld, to, L);
  }
}

FASTMETA_CLONES void run_pack_rows(int64_t rows, int64_t columns, const float* from, int64_t ld, int64_t i, float* to) {
  pack_panel<float, Packed::kRows>(rows, columns, from, ld, i, to);
}
FASTMETA_CLONES void run_pack_rows(int64_t rows, int64_t columns, const double* from, int64_t ld, int64_t i, double* to) {
  pack_panel<double, Packed::kRows>(rows, columns, from, ld, i, to);
}

template <typename T, Packed kPacked> Panels<T> pack(int64_t rows, int64_t columns, const T* from, int64_t ld) {
  const int64_t lanes = kPacked == Packed::kRows ? rows : columns, depth = kPacked == Packed::kRows ? columns : rows;
  const int64_t count = ceil_divide(lanes, kLanes<T>);
  Panels<T> panels{count, depth, Buffer<T>(count * depth * kLanes<T>)};
  torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* to = panels.data.get() + i * depth * kLanes<T>;
      if constexpr (kPacked == Packed::kRows)
        run_pack_rows(rows, columns, from, ld, i, to);
      else
        pack_panel<T, kPacked>(rows, columns, from, ld, i, to);
    }
  });
  return panels;
}

// ---- a group of rows ---------------------------------------------------------------------------------------------------------------

// The forward runs `projected`, [T][B][4H], the inputs by their weights.
template <typename T> struct Forward {
  Episode<T> e;
  const T *inputs, *projected, *bias, *head_bias;
  const Panels<T>*recurrent, *heads;
  State<const T> from;
  T* outputs;  // [T][B][H + R M]
  State<T> to;
  Tape<T> tape;
};

// `heads`, as the product leaves them, to keys, add vectors, gates and strengths, in place.
template <typename T> FASTMETA_INLINE void activate_heads(const Episode<T>& e, T* heads) {
#pragma omp simd
  for (int64_t i = 0; i < e.gate_at(); ++i) heads[i] = tanh_of(heads[i]);
  for (int64_t j = 0; j < e.lrua.heads; ++j) heads[e.gate_at() + j] = sigmoid_of(heads[e.gate_at() + j]);
  if (e.learned_strength)
    for (int64_t i = e.strength_at(); i < e.heads; ++i) heads[i] = 1 + std::max(heads[i], T(0)) + std::log1p(std::exp(-std::abs(heads[i])));
}

template <typename T> FASTMETA_INLINE void forward_group(const Forward<T>& f, int64_t begin, int64_t end) {
  const Episode<T>& e = f.e;
  const Lrua<T>& p = e.lrua;
  const int64_t rows = end - begin, carried = e.carried(), reads = e.reads(), weights_count = p.heads * p.slots;
  const int64_t gates_ld = f.recurrent->columns(), heads_ld = f.heads->columns();
  const Buffer<T> carry(rows * carried), cell(rows * e.hidden), squashed(e.hidden), gates(rows * gates_ld), heads(rows * heads_ld);
  const Buffer<T> memory(rows * p.memory_size()), usage(rows * p.padded), weights(rows * p.weights_size()), written(p.weights_size());
  const Buffer<int64_t> slots(p.heads);
  Scratch<T> scratch(p);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t b = begin + i;
    std::copy_n(f.from.read + b * reads, reads, carry.get() + i * carried);
    std::copy_n(f.from.hidden + b * e.hidden, e.hidden, carry.get() + i * carried + reads);
    std::copy_n(f.from.cell + b * e.hidden, e.hidden, cell.get() + i * e.hidden);
    to_lanes(p, f.from.memory + b * p.width * p.slots, memory.get() + i * p.memory_size());
    pad_rows(1, p.slots, f.from.usage + b * p.slots, p.slots, usage.get() + i * p.padded, p.padded);
    pad_rows(p.heads, p.slots, f.from.read_weights + b * weights_count, p.slots, weights.get() + i * p.weights_size(), p.padded);
  }
  std::fill_n(gates.get(), rows * gates_ld, T(0)), std::fill_n(heads.get(), rows * heads_ld, T(0));
  for (int64_t t = 0; t < e.steps; ++t) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = f.projected + (t * e.batch + begin + i) * 4 * e.hidden;
      T* to = gates.get() + i * gates_ld;
#pragma omp simd
      for (int64_t h = 0; h < 4 * e.hidden; ++h) to[h] = from[h] + f.bias[h];
      std::copy_n(f.head_bias, e.heads, heads.get() + i * heads_ld);
    }
    product_with_panels(rows, carried, carry.get(), carried, f.recurrent->data.get(), f.recurrent->count, gates.get(), gates_ld, true);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = begin + i;
      T *row = carry.get() + i * carried, *row_gates = gates.get() + i * gates_ld, *row_cell = cell.get() + i * e.hidden;
      if (t >= e.length(b)) {
        if (f.tape.lines) f.tape.leave_blank(e, t, b);
        continue;
      }
      if (f.tape.lines) {
        const Line<T> line(e, f.tape.lines, t, b);
        std::copy_n(f.inputs + (t * e.batch + b) * e.inputs, e.inputs, line.entering);
        std::copy_n(row, carried, line.entering + e.inputs);
      }
      activate_gates(e.hidden, row_gates, row_cell, row_cell, squashed.get(), row + reads);
      if (f.tape.lines) {
        const Line<T> line(e, f.tape.lines, t, b);
        std::copy_n(row_gates, 4 * e.hidden, line.gates);
        std::copy_n(row_cell, e.hidden, line.cell);
      }
    }
    product_with_panels(rows, e.hidden, carry.get() + reads, carried, f.heads->data.get(), f.heads->count, heads.get(), heads_ld, true);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = begin + i;
      T* output = f.outputs + (t * e.batch + b) * carried;
      if (t >= e.length(b)) {
        std::fill_n(output, carried, T(0));
        continue;
      }
      T *row = carry.get() + i * carried, *row_heads = heads.get() + i * heads_ld, *row_memory = memory.get() + i * p.memory_size();
      T *row_weights = weights.get() + i * p.weights_size(), *row_usage = usage.get() + i * p.padded;
      activate_heads(e, row_heads);
      const T *keys = row_heads, *add = row_heads + e.add_at(), *gate = row_heads + e.gate_at();
      const T* strengths = e.learned_strength ? row_heads + e.strength_at() : nullptr;
      if (f.tape.lines && t % kSegment == 0)
        copy_rows(p.width, p.slots, row_memory, p.padded, f.tape.checkpoint(e, t, b), p.slots);
      choose_least_used(p, row_usage, scratch.lanes, slots.get());
      write_weights(p, row_weights, gate, slots.get(), written.get());
      if (p.read_before_write) address(p, row_memory, keys, strengths, row_weights, scratch);
      write(p, written.get(), add, slots.get(), row_memory);
      if (!p.read_before_write) address(p, row_memory, keys, strengths, row_weights, scratch);
      product_over_slots(p, row_weights, row_memory, row);
      update_usage(p, p.padded, row_weights, written.get(), row_usage);
      std::copy_n(row + reads, e.hidden, output);
      std::copy_n(row, reads, output + e.hidden);
      if (f.tape.lines) {
        const Line<T> line(e, f.tape.lines, t, b);
        std::copy_n(row_heads, e.heads, line.heads);
        copy_rows(p.heads, p.slots, row_weights, p.padded, line.weights, p.slots);
        std::copy_n(slots.get(), p.heads, f.tape.slots_of(e, t, b));
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t b = begin + i;
    std::copy_n(carry.get() + i * carried, reads, f.to.read + b * reads);
    std::copy_n(carry.get() + i * carried + reads, e.hidden, f.to.hidden + b * e.hidden);
    std::copy_n(cell.get() + i * e.hidden, e.hidden, f.to.cell + b * e.hidden);
    from_lanes(p, memory.get() + i * p.memory_size(), f.to.memory + b * p.width * p.slots);
    std::copy_n(usage.get() + i * p.padded, p.slots, f.to.usage + b * p.slots);
    copy_rows(p.heads, p.slots, weights.get() + i * p.weights_size(), p.padded, f.to.read_weights + b * weights_count, p.slots);
  }
}

template <typename T> struct Backward {
  Episode<T> e;
  const Panels<T>*recurrent, *heads;
  State<const T> from;             // the initial state
  const T* grad_outputs;
  State<const T> grad_to;          // gradients of the final state
  State<T> grad_from;              // and of the initial one
  Tape<T> tape;
  T *grad_gates, *grad_heads;      // [T][B][4H], [T][B][P]: of the sums, before any nonlinearity
};

template <typename T> FASTMETA_INLINE void backward_group(const Backward<T>& g, int64_t begin, int64_t end) {
  const Episode<T>& e = g.e;
  const Lrua<T>& p = e.lrua;
  const int64_t rows = end - begin, carried = e.carried(), reads = e.reads(), weights_count = p.heads * p.slots;
  const int64_t hidden_ld = g.heads->columns(), carry_ld = g.recurrent->columns();
  const int64_t segment_size = (std::min(kSegment, e.steps) + 1) * p.memory_size();
  const Buffer<T> carry(rows * carry_ld), cell(rows * e.hidden), hidden(rows * hidden_ld);  // gradients
  const Buffer<T> memory(rows * p.memory_size()), weights(rows * p.weights_size());         // gradients
  const Buffer<T> segment(rows * segment_size);  // the memory before each step, and after the last
  const Buffer<T> now(p.weights_size()), before(p.weights_size()), written(p.weights_size()), of_keys(reads), of_add(reads), of_gates(p.heads), squashed(e.hidden),
      of_strengths(p.heads), step_carry(rows * carry_ld);
  Scratch<T> scratch(p);
  // Of the read weights before step t.
  auto weights_before = [&](int64_t t, int64_t b, T* to) FASTMETA_INLINE_LAMBDA {
    pad_rows(p.heads, p.slots, t ? Line<T>(e, g.tape.lines, t - 1, b).weights : g.from.read_weights + b * weights_count, p.slots, to, p.padded);
  };
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t b = begin + i;
    std::copy_n(g.grad_to.read + b * reads, reads, carry.get() + i * carry_ld);
    std::copy_n(g.grad_to.hidden + b * e.hidden, e.hidden, carry.get() + i * carry_ld + reads);
    std::copy_n(g.grad_to.cell + b * e.hidden, e.hidden, cell.get() + i * e.hidden);
    to_lanes(p, g.grad_to.memory + b * p.width * p.slots, memory.get() + i * p.memory_size());
    pad_rows(p.heads, p.slots, g.grad_to.read_weights + b * weights_count, p.slots, weights.get() + i * p.weights_size(), p.padded);
  }
  for (int64_t t = e.steps - 1; t >= 0; --t) {
    const int64_t first = t / kSegment * kSegment;
    T *grad_heads = g.grad_heads + (t * e.batch + begin) * e.heads, *grad_gates = g.grad_gates + (t * e.batch + begin) * 4 * e.hidden;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = begin + i, length = e.length(b);
      T* of_heads = grad_heads + i * e.heads;
      if (t >= length) {
        std::fill_n(of_heads, e.heads, T(0));
        continue;
      }
      T* memories = segment.get() + i * segment_size;
      if (t == length - 1 || t == first + kSegment - 1) {
        for (int64_t m = 0; m < p.width; ++m)
          pad_rows(1, p.slots, g.tape.checkpoint(e, first, b) + m * p.slots, p.slots, memories + m * p.padded, p.padded);
        for (int64_t s = first; s <= t; ++s) {
          T* next = memories + (s - first + 1) * p.memory_size();
          const Line<T> line(e, g.tape.lines, s, b);
          weights_before(s, b, before.get());
          std::copy_n(next - p.memory_size(), p.memory_size(), next);
          write_weights(p, before.get(), line.heads + e.gate_at(), g.tape.slots_of(e, s, b), written.get());
          write(p, written.get(), line.heads + e.add_at(), g.tape.slots_of(e, s, b), next);
        }
      }
      const Line<T> line(e, g.tape.lines, t, b);
      const T *old_memory = memories + (t - first) * p.memory_size(), *new_memory = old_memory + p.memory_size();
      const T *keys = line.heads, *add = line.heads + e.add_at(), *gate = line.heads + e.gate_at();
      const T* strengths = e.learned_strength ? line.heads + e.strength_at() : nullptr;
      const int64_t* slots = g.tape.slots_of(e, t, b);
      T *row = carry.get() + i * carry_ld, *of_memory = memory.get() + i * p.memory_size(), *of_weights = weights.get() + i * p.weights_size();
      const T* of_output = g.grad_outputs + (t * e.batch + b) * carried;
      for (int64_t h = 0; h < e.hidden; ++h) row[reads + h] += of_output[h];
      for (int64_t m = 0; m < reads; ++m) row[m] += of_output[e.hidden + m];
      pad_rows(p.heads, p.slots, line.weights, p.slots, now.get(), p.padded);
      weights_before(t, b, before.get());
      write_weights(p, before.get(), gate, slots, written.get());

      read_backward(p, new_memory, now.get(), row, of_weights, of_memory);
      auto address_to = [&](const T* addressed) FASTMETA_INLINE_LAMBDA {
        address_backward(p, addressed, keys, strengths, now.get(), of_weights, of_keys.get(), of_memory, of_strengths.get(), scratch);
      };
      if (p.read_before_write) {
        // The order of the steps: the gradient by wr is used up before its place takes that by wr_{t-1}, the memory's passes the write first.
        T* of_before = scratch.before;
        write_backward(p, before.get(), gate, add, slots, written.get(), (const T*)nullptr, of_memory, of_before, of_add.get(), of_gates.get());
        address_to(old_memory);
        std::copy_n(of_before, p.weights_size(), of_weights);
      } else {
        address_to(new_memory);
        write_backward(p, before.get(), gate, add, slots, written.get(), (const T*)nullptr, of_memory, of_weights, of_add.get(), of_gates.get());
      }
      for (int64_t m = 0; m < reads; ++m) {
        const T by_key = e.own_add ? of_keys.get()[m] : of_keys.get()[m] + of_add.get()[m];
        of_heads[m] = by_key * (1 - keys[m] * keys[m]);
        if (e.own_add) of_heads[reads + m] = of_add.get()[m] * (1 - add[m] * add[m]);
      }
      for (int64_t j = 0; j < p.heads; ++j) {
        of_heads[e.gate_at() + j] = of_gates.get()[j] * gate[j] * (1 - gate[j]);
        if (e.learned_strength) of_heads[e.strength_at() + j] = of_strengths.get()[j] * -std::expm1(1 - strengths[j]);
      }
    }
    product_with_panels(rows, e.heads, grad_heads, e.heads, g.heads->data.get(), g.heads->count, hidden.get(), hidden_ld, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = begin + i;
      T* of_gates = grad_gates + i * 4 * e.hidden;
      if (t >= e.length(b)) {
        std::fill_n(of_gates, 4 * e.hidden, T(0));
        continue;
      }
      const Line<T> line(e, g.tape.lines, t, b);
      const T* cell_before = t ? Line<T>(e, g.tape.lines, t - 1, b).cell : g.from.cell + b * e.hidden;
      T* of_hidden = hidden.get() + i * hidden_ld;
      for (int64_t h = 0; h < e.hidden; ++h) of_hidden[h] += carry.get()[i * carry_ld + reads + h];
#pragma omp simd
      for (int64_t h = 0; h < e.hidden; ++h) squashed.get()[h] = tanh_of(line.cell[h]);
      gates_backward(e.hidden, line.gates, squashed.get(), cell_before, of_hidden, cell.get() + i * e.hidden, of_gates);
    }
    product_with_panels(rows, 4 * e.hidden, grad_gates, 4 * e.hidden, g.recurrent->data.get(), g.recurrent->count, step_carry.get(), carry_ld, false);
    for (int64_t i = 0; i < rows; ++i)
      if (t < e.length(begin + i)) std::copy_n(step_carry.get() + i * carry_ld, carried, carry.get() + i * carry_ld);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t b = begin + i;
    std::copy_n(carry.get() + i * carry_ld, reads, g.grad_from.read + b * reads);
    std::copy_n(carry.get() + i * carry_ld + reads, e.hidden, g.grad_from.hidden + b * e.hidden);
    std::copy_n(cell.get() + i * e.hidden, e.hidden, g.grad_from.cell + b * e.hidden);
    from_lanes(p, memory.get() + i * p.memory_size(), g.grad_from.memory + b * p.width * p.slots);
    copy_rows(p.heads, p.slots, weights.get() + i * p.weights_size(), p.padded, g.grad_from.read_weights + b * weights_count, p.slots);
  }
}

// ---- one function for each type, compiled for each instruction set --------------------------------------------------------------------

FASTMETA_CLONES void run_forward(const Forward<float>& f, int64_t begin, int64_t end) { forward_group(f, begin, end); }
FASTMETA_CLONES void run_forward(const Forward<double>& f, int64_t begin, int64_t end) { forward_group(f, begin, end); }
FASTMETA_CLONES void run_backward(const Backward<float>& g, int64_t begin, int64_t end) { backward_group(g, begin, end); }
FASTMETA_CLONES void run_backward(const Backward<double>& g, int64_t begin, int64_t end) { backward_group(g, begin, end); }

// Groups as large as leave each thread one, so that a thread reads the weights as rarely as can be.
template <typename Run> void for_each_group(int64_t batch, const Run& run) {
  const int64_t size = std::clamp<int64_t>(ceil_divide(batch, torch::stable::get_num_threads()), 1, 16);
  for_each_task(ceil_divide(batch, size), 1, [&](int64_t i) { run(i * size, std::min(batch, (i + 1) * size)); });
}

// ---- the operation ------------------------------------------------------------------------------------------------------------------

struct Arguments {
  Tensor inputs, weight, bias, head_weight, head_bias, hidden, cell, read, read_weights, usage, memory;
  Optional lengths;

  template <typename T>
  Episode<T> episode(bool own_add, bool learned_strength, double strength, int64_t least_used, bool read_before_write, int64_t eps_mode, double eps,
                     double usage_decay) const {
    const Lrua<T> lrua{memory.size(1), memory.size(2), read.size(1), eps_mode, T(eps), T(strength), least_used, read_before_write, T(usage_decay)};
    Episode<T> e{lrua, inputs.size(0), inputs.size(1), inputs.size(2), hidden.size(1), head_bias.size(0), own_add, learned_strength, nullptr};
    if (lengths) {
      e.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
      for (int64_t b = 0; b < e.batch; ++b)
        if (e.lengths[b] < 0 || e.lengths[b] > e.steps)
          throw std::runtime_error("mann_episode: lengths must be in [0, " + std::to_string(e.steps) + "], got " + std::to_string(e.lengths[b]));
    }
    return e;
  }
};

template <typename T> struct StateRows {
  Rows<T> hidden, cell, read, read_weights, usage, memory;

  static StateRows make(const Episode<T>& e) {
    const Lrua<T>& p = e.lrua;
    using R = Rows<T>;
    return {R::make({e.batch, e.hidden}),           R::make({e.batch, e.hidden}),  R::make({e.batch, p.heads, p.width}),
            R::make({e.batch, p.heads, p.slots}), R::make({e.batch, p.slots}), R::make({e.batch, p.slots, p.width})};
  }
  State<T> state() const { return {hidden[0], cell[0], read[0], read_weights[0], usage[0], memory[0]}; }
  State<const T> given() const { return {hidden[0], cell[0], read[0], read_weights[0], usage[0], memory[0]}; }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T> Outputs forward(const Episode<T>& e, const Arguments& a, bool save) {
  const Lrua<T>& p = e.lrua;
  const Rows<T> inputs(a.inputs), weight(a.weight), bias(a.bias), head_weight(a.head_weight), head_bias(a.head_bias);
  const StateRows<T> from{Rows<T>(a.hidden), Rows<T>(a.cell), Rows<T>(a.read), Rows<T>(a.read_weights), Rows<T>(a.usage), Rows<T>(a.memory)};
  const StateRows<T> to = StateRows<T>::make(e);
  using Sizes = std::vector<int64_t>;
  const Rows<T> outputs = Rows<T>::make({e.steps, e.batch, e.carried()});
  const Rows<T> lines = Rows<T>::make(save ? Sizes{e.steps, e.batch, e.line()} : Sizes{0});
  const Tensor slots = empty(save ? Sizes{e.steps, e.batch, p.heads} : Sizes{0}, ScalarType::Long);
  const Rows<T> checkpoints = Rows<T>::make(save ? Sizes{e.segments(), e.batch, p.width, p.slots} : Sizes{0});
  const Tape<T> tape{save ? lines[0] : nullptr, static_cast<int64_t*>(slots.mutable_data_ptr()), checkpoints[0]};

  Tensor weights = columns(weight.tensor(), e.entering(), e.inputs);
  const Rows<T> projected(torch::stable::matmul(columns(inputs.tensor(), e.inputs, e.inputs), torch::stable::transpose(weights, 0, 1)));
  const auto recurrent = pack<T, Packed::kRows>(4 * e.hidden, e.carried(), weight[0] + e.inputs, e.entering());
  const auto heads = pack<T, Packed::kRows>(e.heads, e.hidden, head_weight[0], e.hidden);
  const Forward<T> f{e, inputs[0], projected[0], bias[0], head_bias[0], &recurrent, &heads, from.given(), outputs[0], to.state(), tape};
  for_each_group(e.batch, [&](int64_t begin, int64_t end) { run_forward(f, begin, end); });
  return {outputs.tensor(), to.hidden.tensor(), to.cell.tensor(), to.read.tensor(), to.read_weights.tensor(),
          to.usage.tensor(), to.memory.tensor(), lines.tensor(), slots, checkpoints.tensor()};
}

// The sum over the rows of a contiguous [rows][count].
template <typename T> Tensor sum_of_rows(const T* from, int64_t rows, int64_t count) {
  const Rows<T> sum = Rows<T>::make({count});
  T* to = sum[0];
  std::fill_n(to, count, T(0));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < count; ++n) to[n] += from[i * count + n];
  return sum.tensor();
}

template <typename T>
Outputs backward(const Episode<T>& e, const Arguments& a, int64_t needs, const StateRows<T>& grad_to, const Tensor& grad_outputs,
                 const Tensor& outputs, const Tensor& lines, const Tensor& slots, const Tensor& checkpoints) {
  const Rows<T> weight(a.weight), head_weight(a.head_weight), of_outputs(grad_outputs), tape_lines(lines), tape_checkpoints(checkpoints);
  const StateRows<T> from{{}, Rows<T>(a.cell), {}, Rows<T>(a.read_weights), {}, {}};
  const StateRows<T> to = StateRows<T>::make(e);
  const Rows<T> of_gates = Rows<T>::make({e.steps * e.batch, 4 * e.hidden}), of_heads = Rows<T>::make({e.steps * e.batch, e.heads});
  const Tape<T> tape{tape_lines[0], static_cast<int64_t*>(const_cast<void*>(slots.const_data_ptr())), tape_checkpoints[0]};
  const auto recurrent = pack<T, Packed::kColumns>(4 * e.hidden, e.carried(), weight[0] + e.inputs, e.entering());
  const auto heads = pack<T, Packed::kColumns>(e.heads, e.hidden, head_weight[0], e.hidden);
  const Backward<T> g{e, &recurrent, &heads, from.given(), of_outputs[0], grad_to.given(), to.state(), tape, of_gates[0], of_heads[0]};
  for_each_group(e.batch, [&](int64_t begin, int64_t end) { run_backward(g, begin, end); });

  auto when = [&](int bit, auto&& make) { return needs >> bit & 1 ? Tensor(make()) : empty({0}, kScalarType<T>); };
  Tensor gates = of_gates.tensor(), head_gradients = of_heads.tensor();
  const int64_t rows = e.steps * e.batch;
  using torch::stable::matmul, torch::stable::transpose;
  return {when(0, [&] { return torch::stable::view(matmul(gates, columns(weight.tensor(), e.entering(), e.inputs)), {e.steps, e.batch, e.inputs}); }),
          when(1, [&] { return matmul(transpose(gates, 0, 1), columns(tape_lines.tensor(), e.line(), e.entering())); }),
          when(2, [&] { return sum_of_rows(of_gates[0], rows, 4 * e.hidden); }),
          when(3, [&] { return matmul(transpose(head_gradients, 0, 1), columns(as_contiguous(outputs), e.carried(), e.hidden)); }),
          when(4, [&] { return sum_of_rows(of_heads[0], rows, e.heads); }),
          when(5, [&] { return to.hidden.tensor(); }),
          when(6, [&] { return to.cell.tensor(); }),
          when(7, [&] { return to.read.tensor(); }),
          when(8, [&] { return to.read_weights.tensor(); }),
          when(9, [&] { return to.memory.tensor(); })};
}

Outputs mann_episode(Tensor inputs, Tensor weight, Tensor bias, Tensor head_weight, Tensor head_bias, Tensor hidden, Tensor cell, Tensor read,
                     Tensor read_weights, Tensor usage, Tensor memory, Optional lengths, bool own_add, bool learned_strength, double strength,
                     int64_t least_used, bool read_before_write, int64_t eps_mode, double eps, double usage_decay, bool save) {
  if (lengths) lengths = as_contiguous(*lengths);
  const Arguments a{inputs, weight, bias, head_weight, head_bias, hidden, cell, read, read_weights, usage, memory, lengths};
  return for_dtype(inputs, [&](auto zero) {
    using T = decltype(zero);
    return forward(a.episode<T>(own_add, learned_strength, strength, least_used, read_before_write, eps_mode, eps, usage_decay), a, save);
  });
}

Outputs mann_episode_backward(Tensor grad_outputs, Tensor grad_hidden, Tensor grad_cell, Tensor grad_read, Tensor grad_read_weights,
                              Tensor grad_memory, int64_t needs, Tensor inputs, Tensor weight, Tensor bias, Tensor head_weight, Tensor head_bias,
                              Tensor hidden, Tensor cell, Tensor read, Tensor read_weights, Tensor usage, Tensor memory, Optional lengths,
                              bool own_add, bool learned_strength, double strength, int64_t least_used, bool read_before_write, int64_t eps_mode,
                              double eps, double usage_decay, Tensor outputs, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor lines,
                              Tensor slots, Tensor checkpoints) {
  if (lengths) lengths = as_contiguous(*lengths);
  const Arguments a{inputs, weight, bias, head_weight, head_bias, hidden, cell, read, read_weights, usage, memory, lengths};
  slots = as_contiguous(slots);
  return for_dtype(inputs, [&](auto zero) {
    using T = decltype(zero);
    const StateRows<T> grad_to{Rows<T>(grad_hidden), Rows<T>(grad_cell), Rows<T>(grad_read), Rows<T>(grad_read_weights), {}, Rows<T>(grad_memory)};
    return backward(a.episode<T>(own_add, learned_strength, strength, least_used, read_before_write, eps_mode, eps, usage_decay), a, needs, grad_to,
                    grad_outputs, outputs, lines, slots, checkpoints);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, module) {
  module.impl("mann_episode", TORCH_BOX(&mann_episode));
  module.impl("mann_episode_backward", TORCH_BOX(&mann_episode_backward));
}

}  // namespace fastmeta
