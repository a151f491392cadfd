// memory_read, lrua_write and lrua_step on CUDA tensors: one launch each, forward and backward. The kernels are in lrua_memory.cu.

#include "cuda/lrua_memory.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/row.h"

namespace fastmeta {
namespace {

struct Kernels {
  Kernel forward, backward;
};
template <typename T> Kernels kernels_for(bool large) {
#define FASTMETA_LRUA_KERNELS(suffix) {FASTMETA_KERNEL(lrua_memory_forward_##suffix), FASTMETA_KERNEL(lrua_memory_backward_##suffix)}
  if constexpr (sizeof(T) == 8)
    return large ? Kernels FASTMETA_LRUA_KERNELS(large_double) : Kernels FASTMETA_LRUA_KERNELS(double);
  else
    return large ? Kernels FASTMETA_LRUA_KERNELS(large_float) : Kernels FASTMETA_LRUA_KERNELS(float);
}

struct Options {
  double strength = 1;
  int64_t least_used = kPerHead;
  bool read_before_write = false;
  int64_t eps_mode = kSqrt;
  double eps = 1, usage_decay = 0;
};

// The tensors of a call, contiguous on its device.
struct Arguments {
  Device device;
  Tensor memory;
  Optional usage, read_weights, keys, add, gate, strengths;
  Options options;

  Arguments(const Tensor& memory, const Optional& usage, const Optional& read_weights, const Optional& keys, const Optional& add, const Optional& gate,
            const Optional& strengths, const Options& options)
      : device(memory), memory(device.contiguous(memory)), usage(device.contiguous(usage)), read_weights(device.contiguous(read_weights)), keys(device.contiguous(keys)),
        add(device.contiguous(add)), gate(device.contiguous(gate)), strengths(device.contiguous(strengths)), options(options) {}

  int64_t batch() const { return memory.size(0); }
  int64_t heads() const { return (keys ? *keys : *add).size(1); }

  template <typename T> void describe(LruaStep<T>& p) const {
    p.lrua = lrua<T>(memory.size(1), memory.size(2), heads(), options.eps_mode, options.eps, options.strength, options.least_used,
                     options.read_before_write, options.usage_decay);
    p.memory = data<T>(memory), p.usage = data<T>(usage), p.before = data<T>(read_weights), p.keys = data<T>(keys), p.add = data<T>(add);
    p.gate = data<T>(gate), p.strengths = data<T>(strengths);
  }
};

struct Results {
  Optional read, memory, usage, weights, written;
};

template <typename T> Results forward(const Arguments& a) {
  LruaForward<T> p{};
  a.describe(p);
  const int64_t batch = a.batch(), slots = p.lrua.slots, width = p.lrua.width, heads = p.lrua.heads;
  auto make = [&](bool wanted, std::vector<int64_t> sizes) { return wanted ? Optional(a.device.empty(sizes, kScalarType<T>)) : Optional(); };
  const bool reads = a.keys.has_value(), writes = a.gate.has_value();
  Results out{make(reads, {batch, heads, width}), make(writes, {batch, slots, width}), make(reads && writes, {batch, slots}),
              make(reads, {batch, heads, slots}), make(writes && !reads, {batch, heads, slots})};
  p.read = data<T>(out.read), p.to_memory = data<T>(out.memory), p.to_usage = data<T>(out.usage), p.to_weights = data<T>(out.weights);
  p.to_written = data<T>(out.written);
  launch_rows<LruaForwardMemory<T>>(a.device, [](bool large) { return kernels_for<T>(large).forward; }, p, p.lrua, batch);
  return out;
}

struct Gradients {
  Tensor memory, read_weights, keys, add, gate, strengths;
};

struct Wanted {
  bool memory, read_weights, keys, add, gate, strengths;
};

template <typename T>
Gradients backward(const Arguments& a, const Results& result, const Results& grad, const Wanted& wanted) {
  LruaBackward<T> p{};
  a.describe(p);
  const int64_t batch = a.batch(), slots = p.lrua.slots, width = p.lrua.width, heads = p.lrua.heads;
  auto make = [&](bool is_wanted, std::vector<int64_t> sizes) { return a.device.empty(is_wanted ? sizes : std::vector<int64_t>{0}, kScalarType<T>); };
  Gradients out{make(wanted.memory, {batch, slots, width}), make(wanted.read_weights, {batch, heads, slots}), make(wanted.keys, {batch, heads, width}),
                make(wanted.add, {batch, heads, width}),    make(wanted.gate, {batch, heads}),                make(wanted.strengths, {batch, heads})};
  const Optional after = a.device.contiguous(result.memory), weights = a.device.contiguous(result.weights), grad_read = a.device.contiguous(grad.read);
  const Optional grad_memory = a.device.contiguous(grad.memory), grad_weights = a.device.contiguous(grad.weights), grad_written = a.device.contiguous(grad.written);
  p.after = data<T>(after), p.weights = data<T>(weights), p.grad_read = data<T>(grad_read), p.grad_memory = data<T>(grad_memory);
  p.grad_weights = data<T>(grad_weights), p.grad_written = data<T>(grad_written);
  p.of_memory = data<T>(out.memory), p.of_before = data<T>(out.read_weights), p.of_keys = data<T>(out.keys), p.of_add = data<T>(out.add);
  p.of_gate = data<T>(out.gate), p.of_strengths = data<T>(out.strengths);
  launch_rows<LruaBackwardMemory<T>>(a.device, [](bool large) { return kernels_for<T>(large).backward; }, p, p.lrua, batch);
  return out;
}

// ---- the operations ---------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> memory_read(Tensor memory, Tensor keys, Optional strengths, double strength, int64_t eps_mode, double eps) {
  const Arguments a(memory, {}, {}, keys, {}, {}, strengths, {strength, kPerHead, false, eps_mode, eps});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    const auto out = forward<decltype(zero)>(a);
    return {*out.read, *out.weights};
  });
}

std::tuple<Tensor, Tensor, Tensor> memory_read_backward(Tensor grad_read, Tensor grad_weights, int64_t needs, Tensor memory, Tensor keys,
                                                        Optional strengths, double strength, int64_t eps_mode, double eps, Tensor, Tensor weights) {
  const Arguments a(memory, {}, {}, keys, {}, {}, strengths, {strength, kPerHead, false, eps_mode, eps});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = backward<T>(a, {{}, {}, {}, weights, {}}, {grad_read, {}, {}, grad_weights, {}},
                                 {bool(needs & 1), false, bool(needs & 2), false, false, bool(needs & 4)});
    return {out.memory, out.keys, out.strengths};
  });
}

std::tuple<Tensor, Tensor> lrua_write(Tensor memory, Tensor usage, Tensor read_weights, Tensor add, Tensor gate, int64_t least_used) {
  const Arguments a(memory, usage, read_weights, {}, add, gate, {}, {1, least_used});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    const auto out = forward<decltype(zero)>(a);
    return {*out.memory, *out.written};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_write_backward(Tensor grad_memory, Tensor grad_write_weights, int64_t needs, Tensor memory,
                                                               Tensor usage, Tensor read_weights, Tensor add, Tensor gate, int64_t least_used,
                                                               Tensor, Tensor) {
  const Arguments a(memory, usage, read_weights, {}, add, gate, {}, {1, least_used});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = backward<T>(a, {}, {{}, grad_memory, {}, {}, grad_write_weights},
                                 {bool(needs & 1), bool(needs & 2), false, bool(needs & 4), bool(needs & 8), false});
    return {out.memory, out.read_weights, out.add, out.gate};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_step(Tensor memory, Tensor usage, Tensor read_weights, Tensor keys, Tensor add, Tensor gate,
                                                     Optional strengths, double strength, int64_t least_used, bool read_before_write,
                                                     int64_t eps_mode, double eps, double usage_decay) {
  const Arguments a(memory, usage, read_weights, keys, add, gate, strengths, {strength, least_used, read_before_write, eps_mode, eps, usage_decay});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    const auto out = forward<decltype(zero)>(a);
    return {*out.read, *out.memory, *out.usage, *out.weights};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_step_backward(
    Tensor grad_read, Tensor grad_memory, Tensor grad_read_weights, int64_t needs, Tensor memory, Tensor usage, Tensor read_weights, Tensor keys,
    Tensor add, Tensor gate, Optional strengths, double strength, int64_t least_used, bool read_before_write, int64_t eps_mode, double eps,
    double usage_decay, Tensor, Tensor written, Tensor, Tensor weights) {
  const Arguments a(memory, usage, read_weights, keys, add, gate, strengths, {strength, least_used, read_before_write, eps_mode, eps, usage_decay});
  return for_dtype(memory, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto out = backward<T>(a, {{}, written, {}, weights, {}}, {grad_read, grad_memory, {}, grad_read_weights, {}},
                                 {bool(needs & 1), bool(needs & 2), bool(needs & 4), bool(needs & 8), bool(needs & 16), bool(needs & 32)});
    return {out.memory, out.read_weights, out.keys, out.add, out.gate, out.strengths};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CUDA, module) {
  module.impl("memory_read", TORCH_BOX(&memory_read));
  module.impl("memory_read_backward", TORCH_BOX(&memory_read_backward));
  module.impl("lrua_write", TORCH_BOX(&lrua_write));
  module.impl("lrua_write_backward", TORCH_BOX(&lrua_write_backward));
  module.impl("lrua_step", TORCH_BOX(&lrua_step));
  module.impl("lrua_step_backward", TORCH_BOX(&lrua_step_backward));
}

}  // namespace fastmeta
