// memory_read, lrua_write and lrua_step, forward and backward: a task is one episode. The contract of the operations is in
// fastmeta/schemas/lrua_memory.py.
#include "cpu/lrua_memory.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace fastmeta {
namespace {

// ---- one episode, with all that it reads and sets; null for what there is not, or is not needed ------------------------------------------

template <typename T> struct Given {
  const T *memory, *usage, *read_weights, *keys, *add, *gate, *strengths;
};

template <typename T> struct Step {
  T *read, *memory, *usage, *read_weights, *write_weights;
};

template <typename T> struct Incoming {
  const T *read, *memory, *read_weights, *write_weights;
};

template <typename T> struct Outgoing {
  T *memory, *read_weights, *keys, *add, *gate, *strengths;
};

// With keys it reads, with a gate it writes.
template <typename T> FASTMETA_INLINE void step_row(const Lrua<T>& p, const Given<T>& in, const Step<T>& out) {
  const Buffer<T> memory(p.memory_size()), before(p.weights_size()), written(p.weights_size()), weights(p.weights_size());
  const Buffer<int64_t> chosen(p.heads);
  Scratch<T> scratch(p);
  to_lanes(p, in.memory, memory.get());
  if (in.keys && (p.read_before_write || !in.gate)) address(p, memory.get(), in.keys, in.strengths, weights.get(), scratch);
  if (in.gate) {
    pad_rows(p.heads, p.slots, in.read_weights, p.slots, before.get(), p.padded);
    choose_least_used(p, in.usage, scratch.lanes, chosen.get());
    write_weights(p, before.get(), in.gate, chosen.get(), written.get());
    write(p, written.get(), in.add, chosen.get(), memory.get());
    from_lanes(p, memory.get(), out.memory);
    if (in.keys && !p.read_before_write) address(p, memory.get(), in.keys, in.strengths, weights.get(), scratch);
    if (out.write_weights) copy_rows(p.heads, p.slots, written.get(), p.padded, out.write_weights, p.slots);
  }
  if (!in.keys) return;
  product_over_slots(p, weights.get(), memory.get(), out.read);
  copy_rows(p.heads, p.slots, weights.get(), p.padded, out.read_weights, p.slots);
  if (out.usage) {
    std::copy_n(in.usage, p.slots, out.usage);
    update_usage(p, p.slots, weights.get(), written.get(), out.usage);
  }
}

template <typename T>
FASTMETA_INLINE void step_backward_row(const Lrua<T>& p, const Given<T>& in, const Step<T>& result, const Incoming<T>& grad,
                                       const Outgoing<T>& out) {
  const Buffer<T> given(p.memory_size()), memory(p.memory_size()), grad_memory(p.memory_size());
  const Buffer<T> weights(p.weights_size()), grad_weights(p.weights_size());
  const Buffer<T> before(p.weights_size()), written(p.weights_size()), grad_written(p.weights_size()), grad_before(p.weights_size());
  const Buffer<int64_t> chosen(p.heads);
  Scratch<T> scratch(p);
  if (!in.gate || p.read_before_write) to_lanes(p, in.memory, given.get());
  if (in.gate && in.keys) to_lanes(p, result.memory, memory.get());
  const T* read_from = in.gate ? memory.get() : given.get();
  if (grad.memory)
    to_lanes(p, grad.memory, grad_memory.get());
  else
    std::fill_n(grad_memory.get(), p.memory_size(), T(0));
  auto address_to = [&](const T* addressed) FASTMETA_INLINE_LAMBDA {
    address_backward(p, addressed, in.keys, in.strengths, weights.get(), grad_weights.get(), out.keys, grad_memory.get(), out.strengths, scratch);
  };
  if (in.keys) {
    pad_rows(p.heads, p.slots, result.read_weights, p.slots, weights.get(), p.padded);
    pad_rows(p.heads, p.slots, grad.read_weights, p.slots, grad_weights.get(), p.padded);
    read_backward(p, read_from, weights.get(), grad.read, grad_weights.get(), grad_memory.get());
    if (!p.read_before_write) address_to(read_from);
  }
  if (in.gate) {
    pad_rows(p.heads, p.slots, in.read_weights, p.slots, before.get(), p.padded);
    if (grad.write_weights) pad_rows(p.heads, p.slots, grad.write_weights, p.slots, grad_written.get(), p.padded);
    choose_least_used(p, in.usage, scratch.lanes, chosen.get());
    write_weights(p, before.get(), in.gate, chosen.get(), written.get());
    write_backward(p, before.get(), in.gate, in.add, chosen.get(), written.get(), grad.write_weights ? grad_written.get() : nullptr,
                   grad_memory.get(), grad_before.get(), out.add, out.gate);
    copy_rows(p.heads, p.slots, grad_before.get(), p.padded, out.read_weights, p.slots);
    if (in.keys && p.read_before_write) address_to(given.get());
  }
  from_lanes(p, grad_memory.get(), out.memory);
}

// ---- one function for each type, compiled for each instruction set --------------------------------------------------------------------

FASTMETA_CLONES void run_step(const Lrua<float>& p, const Given<float>& in, const Step<float>& out) { step_row(p, in, out); }
FASTMETA_CLONES void run_step(const Lrua<double>& p, const Given<double>& in, const Step<double>& out) { step_row(p, in, out); }
FASTMETA_CLONES void run_step_backward(const Lrua<float>& p, const Given<float>& in, const Step<float>& result, const Incoming<float>& grad,
                                       const Outgoing<float>& out) {
  step_backward_row(p, in, result, grad, out);
}
FASTMETA_CLONES void run_step_backward(const Lrua<double>& p, const Given<double>& in, const Step<double>& result,
                                       const Incoming<double>& grad, const Outgoing<double>& out) {
  step_backward_row(p, in, result, grad, out);
}

// ---- all episodes -----------------------------------------------------------------------------------------------------------------

struct Arguments {
  Optional memory, usage, read_weights, keys, add, gate, strengths;

  template <typename T> Lrua<T> problem(double strength, int64_t least_used, bool read_before_write, int64_t eps_mode, double eps,
                                        double usage_decay) const {
    const Tensor& heads = keys ? *keys : *add;
    return {memory->size(1), memory->size(2), heads.size(1), eps_mode, T(eps), T(strength), least_used, read_before_write, T(usage_decay)};
  }
};

template <typename T> struct GivenRows {
  explicit GivenRows(const Arguments& a)
      : memory(a.memory), usage(a.usage), read_weights(a.read_weights), keys(a.keys), add(a.add), gate(a.gate), strengths(a.strengths) {}
  Given<T> operator[](int64_t b) const { return {memory[b], usage[b], read_weights[b], keys[b], add[b], gate[b], strengths[b]}; }
  Rows<T> memory, usage, read_weights, keys, add, gate, strengths;
};

template <typename T> struct StepRows {
  Step<T> operator[](int64_t b) const { return {read[b], memory[b], usage[b], read_weights[b], write_weights[b]}; }
  Rows<T> read, memory, usage, read_weights, write_weights;
};

// A fork and join of threads costs some microseconds: not for work of that size.
template <typename T> int64_t grain(const Lrua<T>& p) { return 1 + 200000 / (p.slots * p.width * (p.heads + 4)); }

template <typename T> StepRows<T> forward(const Lrua<T>& p, const Arguments& a) {
  const int64_t batch = a.memory->size(0);
  const GivenRows<T> given(a);
  StepRows<T> out;
  if (a.keys) out.read = Rows<T>::make({batch, p.heads, p.width}), out.read_weights = Rows<T>::make({batch, p.heads, p.slots});
  if (a.gate) out.memory = Rows<T>::make({batch, p.slots, p.width});
  if (a.gate && a.keys) out.usage = Rows<T>::make({batch, p.slots});
  if (a.gate && !a.keys) out.write_weights = Rows<T>::make({batch, p.heads, p.slots});
  for_each_task(batch, grain(p), [&](int64_t b) { run_step(p, given[b], out[b]); });
  return out;
}

template <typename T> struct Gradients {
  Rows<T> memory, read_weights, keys, add, gate, strengths;
  Tensor only(const Rows<T>& rows, int64_t needs, int bit) const {
    return needs >> bit & 1 ? rows.tensor() : Rows<T>::make({0}).tensor();
  }
};

template <typename T>
Gradients<T> backward(const Lrua<T>& p, const Arguments& a, const StepRows<T>& result, const Optional& grad_read, const Optional& grad_memory,
                      const Optional& grad_read_weights, const Optional& grad_write_weights) {
  const int64_t batch = a.memory->size(0);
  const GivenRows<T> given(a);
  const Rows<T> read(grad_read), memory(grad_memory), read_weights(grad_read_weights), write_weights(grad_write_weights);
  Gradients<T> out;
  out.memory = Rows<T>::make({batch, p.slots, p.width});
  if (a.keys) out.keys = Rows<T>::make({batch, p.heads, p.width}), out.strengths = Rows<T>::make({batch, p.heads});
  if (a.gate)
    out.read_weights = Rows<T>::make({batch, p.heads, p.slots}), out.add = Rows<T>::make({batch, p.heads, p.width}),
    out.gate = Rows<T>::make({batch, p.heads});
  for_each_task(batch, grain(p) / 2 + 1, [&](int64_t b) {
    run_step_backward(p, given[b], result[b], {read[b], memory[b], read_weights[b], write_weights[b]},
                      {out.memory[b], out.read_weights[b], out.keys[b], out.add[b], out.gate[b], out.strengths[b]});
  });
  return out;
}

// ---- the operations -----------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> memory_read(Tensor memory, Tensor keys, Optional strengths, double strength, int64_t eps_mode, double eps) {
  const Arguments a{memory, {}, {}, keys, {}, {}, strengths};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = forward(a.problem<T>(strength, kPerHead, false, eps_mode, eps, 0), a);
    return {out.read.tensor(), out.read_weights.tensor()};
  });
}

std::tuple<Tensor, Tensor, Tensor> memory_read_backward(Tensor grad_read, Tensor grad_weights, int64_t needs, Tensor memory, Tensor keys,
                                                        Optional strengths, double strength, int64_t eps_mode, double eps, Tensor,
                                                        Tensor weights) {
  const Arguments a{memory, {}, {}, keys, {}, {}, strengths};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    StepRows<T> result;
    result.read_weights = Rows<T>(weights);
    const auto out = backward(a.problem<T>(strength, kPerHead, false, eps_mode, eps, 0), a, result, grad_read, {}, grad_weights, {});
    return {out.only(out.memory, needs, 0), out.only(out.keys, needs, 1), out.only(out.strengths, needs, 2)};
  });
}

std::tuple<Tensor, Tensor> lrua_write(Tensor memory, Tensor usage, Tensor read_weights, Tensor add, Tensor gate, int64_t least_used) {
  const Arguments a{memory, usage, read_weights, {}, add, gate, {}};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = forward(a.problem<T>(1, least_used, false, kSqrt, 1, 0), a);
    return {out.memory.tensor(), out.write_weights.tensor()};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_write_backward(Tensor grad_memory, Tensor grad_write_weights, int64_t needs, Tensor memory,
                                                               Tensor usage, Tensor read_weights, Tensor add, Tensor gate, int64_t least_used,
                                                               Tensor, Tensor) {
  const Arguments a{memory, usage, read_weights, {}, add, gate, {}};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = backward(a.problem<T>(1, least_used, false, kSqrt, 1, 0), a, {}, {}, grad_memory, {}, grad_write_weights);
    return {out.only(out.memory, needs, 0), out.only(out.read_weights, needs, 1), out.only(out.add, needs, 2), out.only(out.gate, needs, 3)};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_step(Tensor memory, Tensor usage, Tensor read_weights, Tensor keys, Tensor add, Tensor gate,
                                                     Optional strengths, double strength, int64_t least_used, bool read_before_write,
                                                     int64_t eps_mode, double eps, double usage_decay) {
  const Arguments a{memory, usage, read_weights, keys, add, gate, strengths};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = forward(a.problem<T>(strength, least_used, read_before_write, eps_mode, eps, usage_decay), a);
    return {out.read.tensor(), out.memory.tensor(), out.usage.tensor(), out.read_weights.tensor()};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_step_backward(
    Tensor grad_read, Tensor grad_memory, Tensor grad_read_weights, int64_t needs, Tensor memory, Tensor usage, Tensor read_weights, Tensor keys,
    Tensor add, Tensor gate, Optional strengths, double strength, int64_t least_used, bool read_before_write, int64_t eps_mode, double eps,
    double usage_decay, Tensor, Tensor written, Tensor, Tensor weights) {
  const Arguments a{memory, usage, read_weights, keys, add, gate, strengths};
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    StepRows<T> result;
    result.memory = Rows<T>(written), result.read_weights = Rows<T>(weights);
    const auto out = backward(a.problem<T>(strength, least_used, read_before_write, eps_mode, eps, usage_decay), a, result, grad_read,
                              grad_memory, grad_read_weights, {});
    return {out.only(out.memory, needs, 0), out.only(out.read_weights, needs, 1), out.only(out.keys, needs, 2), out.only(out.add, needs, 3),
            out.only(out.gate, needs, 4), out.only(out.strengths, needs, 5)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, module) {
  module.impl("memory_read", TORCH_BOX(&memory_read));
  module.impl("memory_read_backward", TORCH_BOX(&memory_read_backward));
  module.impl("lrua_write", TORCH_BOX(&lrua_write));
  module.impl("lrua_write_backward", TORCH_BOX(&lrua_write_backward));
  module.impl("lrua_step", TORCH_BOX(&lrua_step));
  module.impl("lrua_step_backward", TORCH_BOX(&lrua_step_backward));
}

}  // namespace fastmeta
