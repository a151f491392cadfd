// mann_episode on CUDA tensors, whatever the number of steps: forward a product of the library and one launch, backward one launch, one that sums the
// gradients of the biases, and three products. The kernels are in mann_episode.cu.

#include "cuda/mann_episode.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/row.h"

namespace fastmeta {
namespace {

struct Kernels {
  Kernel forward, backward, biases;
};
template <typename T> Kernels kernels_for(bool large) {
#define FASTMETA_MANN_KERNELS(place, type) \
  {FASTMETA_KERNEL(mann_episode_forward_##place##type), FASTMETA_KERNEL(mann_episode_backward_##place##type), FASTMETA_KERNEL(mann_episode_biases_##type)}
  if constexpr (sizeof(T) == 8)
    return large ? Kernels FASTMETA_MANN_KERNELS(large_, double) : Kernels FASTMETA_MANN_KERNELS(, double);
  else
    return large ? Kernels FASTMETA_MANN_KERNELS(large_, float) : Kernels FASTMETA_MANN_KERNELS(, float);
}

struct State {
  Optional hidden, cell, read, read_weights, usage, memory;

  template <typename T> MannState<T> rows() const {
    return {data<T>(hidden), data<T>(cell), data<T>(read), data<T>(read_weights), data<T>(usage), data<T>(memory)};
  }
  template <typename T> MannState<const T> given() const {
    const MannState<T> s = rows<T>();
    return {s.hidden, s.cell, s.read, s.read_weights, s.usage, s.memory};
  }
};

// The tensors of a call, contiguous on its device, and its sizes.
struct Arguments {
  Device device;
  Tensor inputs, weight, bias, head_weight, head_bias;
  State state;
  Optional lengths;
  bool own_add, learned_strength;
  double strength;
  int64_t least_used;
  bool read_before_write;
  int64_t eps_mode;
  double eps, usage_decay;

  struct Weights {
    const Tensor &inputs, &weight, &bias, &head_weight, &head_bias;
  };
  Arguments(const Weights& w, const State& s, const Optional& lengths, bool own_add, bool learned_strength, double strength, int64_t least_used,
            bool read_before_write, int64_t eps_mode, double eps, double usage_decay)
      : device(w.inputs), inputs(device.contiguous(w.inputs)), weight(device.contiguous(w.weight)), bias(device.contiguous(w.bias)),
        head_weight(device.contiguous(w.head_weight)), head_bias(device.contiguous(w.head_bias)), state(contiguous(s)),
        lengths(device.contiguous(lengths)), own_add(own_add), learned_strength(learned_strength), strength(strength),
        least_used(least_used), read_before_write(read_before_write), eps_mode(eps_mode), eps(eps), usage_decay(usage_decay) {}

  State contiguous(const State& s) const {
    return {device.contiguous(s.hidden),       device.contiguous(s.cell),  device.contiguous(s.read),
            device.contiguous(s.read_weights), device.contiguous(s.usage), device.contiguous(s.memory)};
  }
  template <typename T> State make_state(const MannEpisode<T>& e, bool usage) const {
    auto rows = [&](std::vector<int64_t> sizes) { return Optional(device.empty(sizes, kScalarType<T>)); };
    const int64_t batch = e.batch, heads = e.lrua.heads, slots = e.lrua.slots, width = e.lrua.width;
    return {rows({batch, e.hidden}), rows({batch, e.hidden}), rows({batch, heads, width}), rows({batch, heads, slots}),
            usage ? rows({batch, slots}) : Optional(), rows({batch, slots, width})};
  }
  template <typename T> void describe(MannEpisode<T>& e) const {
    const Tensor& memory = *state.memory;
    e.lrua = lrua<T>(memory.size(1), memory.size(2), state.read->size(1), eps_mode, eps, strength, least_used, read_before_write, usage_decay);
    e.steps = small(inputs.size(0)), e.batch = small(inputs.size(1)), e.inputs = small(inputs.size(2)), e.hidden = small(state.hidden->size(1));
    e.heads = small(head_bias.size(0)), e.own_add = own_add, e.learned_strength = learned_strength;
    e.lengths = data<int64_t>(lengths), e.weight = data<T>(weight), e.head_weight = data<T>(head_weight), e.from = state.given<T>();
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T> Outputs forward(const Arguments& a, bool save) {
  const Device& device = a.device;
  MannForward<T> e{};
  a.describe(e);
  const int64_t steps = e.steps, batch = e.batch, slots = e.lrua.slots, width = e.lrua.width;
  using Sizes = std::vector<int64_t>;
  const Tensor outputs = device.empty({steps, batch, e.carried()}, kScalarType<T>);
  const State to = a.make_state(e, true);
  const Tensor tape = device.empty(save ? Sizes{steps, batch, e.line()} : Sizes{0}, kScalarType<T>);
  const Tensor chosen = device.empty(save ? Sizes{steps, batch, e.lrua.heads} : Sizes{0}, ScalarType::Long);
  const Tensor checkpoints = device.empty(save ? Sizes{ceil_divide(steps, kSegment), batch, width, slots} : Sizes{0}, kScalarType<T>);
  e.tape = data<T>(tape), e.slots = data<int64_t>(chosen), e.checkpoints = data<T>(checkpoints);

  Tensor input_weight = columns(a.weight, e.entering(), e.inputs);
  const Tensor projected = device.product(columns(a.inputs, e.inputs, e.inputs), torch::stable::transpose(input_weight, 0, 1));
  e.given = data<T>(a.inputs), e.projected = data<T>(projected), e.bias = data<T>(a.bias), e.head_bias = data<T>(a.head_bias);
  e.outputs = data<T>(outputs), e.to = to.rows<T>();
  launch_rows<MannForwardMemory<T>>(device, [](bool large) { return kernels_for<T>(large).forward; }, e, e, batch);
  return {outputs, *to.hidden, *to.cell, *to.read, *to.read_weights, *to.usage, *to.memory, tape, chosen, checkpoints};
}

template <typename T>
Outputs backward(const Arguments& a, int64_t needs, const State& given_grad, const Tensor& given_grad_outputs, const Tensor& given_outputs,
                 const Tensor& given_tape, const Tensor& given_slots, const Tensor& given_checkpoints) {
  const Device& device = a.device;
  MannBackward<T> e{};
  a.describe(e);
  const int64_t rows = int64_t(e.steps) * e.batch;
  const State grad_to = a.contiguous(given_grad), grad_from = a.make_state(e, false);
  const Tensor grad_outputs = device.contiguous(given_grad_outputs), outputs = device.contiguous(given_outputs), tape = device.contiguous(given_tape);
  const Tensor slots = device.contiguous(given_slots), checkpoints = device.contiguous(given_checkpoints);
  Tensor gates = device.empty({rows, 4 * int64_t(e.hidden)}, kScalarType<T>), heads = device.empty({rows, e.heads}, kScalarType<T>);
  e.tape = data<T>(tape), e.slots = data<int64_t>(slots), e.checkpoints = data<T>(checkpoints);
  e.grad_outputs = data<T>(grad_outputs), e.grad_to = grad_to.given<T>(), e.grad_from = grad_from.rows<T>();
  e.grad_gates = data<T>(gates), e.grad_heads = data<T>(heads);
  launch_rows<MannBackwardMemory<T>>(device, [](bool large) { return kernels_for<T>(large).backward; }, e, e, e.batch);

  auto wanted = [&](int bit) { return bool(needs >> bit & 1); };
  auto make = [&](bool is_wanted, int64_t size) { return device.empty({is_wanted ? size : 0}, kScalarType<T>); };
  const Tensor of_bias = make(wanted(2), 4 * int64_t(e.hidden)), of_head_bias = make(wanted(4), e.heads);
  const MannBiases<T> biases{rows, 4 * e.hidden, e.heads, e.grad_gates, e.grad_heads, data<T>(of_bias), data<T>(of_head_bias)};
  device.launch(kernels_for<T>(false).biases, ceil_divide(of_bias.numel(), 32) + ceil_divide(of_head_bias.numel(), 32), kRowThreads,
                kRowThreads * sizeof(T), biases);
  auto when = [&](int bit, auto&& product) { return wanted(bit) ? Tensor(product()) : device.empty({0}, kScalarType<T>); };
  auto only = [&](int bit, const Optional& t) { return wanted(bit) ? *t : device.empty({0}, kScalarType<T>); };
  using torch::stable::transpose;
  return {when(0, [&] {
            const Tensor product = device.product(gates, columns(a.weight, e.entering(), e.inputs));
            return torch::stable::view(product, {e.steps, e.batch, e.inputs});
          }),
          when(1, [&] { return device.product(transpose(gates, 0, 1), columns(tape, e.line(), e.entering())); }),
          of_bias,
          when(3, [&] { return device.product(transpose(heads, 0, 1), columns(outputs, e.carried(), e.hidden)); }),
          of_head_bias,
          only(5, grad_from.hidden),
          only(6, grad_from.cell),
          only(7, grad_from.read),
          only(8, grad_from.read_weights),
          only(9, grad_from.memory)};
}

Outputs mann_episode(Tensor inputs, Tensor weight, Tensor bias, Tensor head_weight, Tensor head_bias, Tensor hidden, Tensor cell, Tensor read,
                     Tensor read_weights, Tensor usage, Tensor memory, Optional lengths, bool own_add, bool learned_strength, double strength,
                     int64_t least_used, bool read_before_write, int64_t eps_mode, double eps, double usage_decay, bool save) {
  const Arguments a({inputs, weight, bias, head_weight, head_bias}, {hidden, cell, read, read_weights, usage, memory}, lengths, own_add, learned_strength,
                    strength, least_used, read_before_write, eps_mode, eps, usage_decay);
  return for_dtype(inputs, [&](auto zero) { return forward<decltype(zero)>(a, save); });
}

Outputs mann_episode_backward(Tensor grad_outputs, Tensor grad_hidden, Tensor grad_cell, Tensor grad_read, Tensor grad_read_weights,
                              Tensor grad_memory, int64_t needs, Tensor inputs, Tensor weight, Tensor bias, Tensor head_weight, Tensor head_bias,
                              Tensor hidden, Tensor cell, Tensor read, Tensor read_weights, Tensor usage, Tensor memory, Optional lengths,
                              bool own_add, bool learned_strength, double strength, int64_t least_used, bool read_before_write, int64_t eps_mode,
                              double eps, double usage_decay, Tensor outputs, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor tape,
                              Tensor slots, Tensor checkpoints) {
  const Arguments a({inputs, weight, bias, head_weight, head_bias}, {hidden, cell, read, read_weights, usage, memory}, lengths, own_add, learned_strength,
                    strength, least_used, read_before_write, eps_mode, eps, usage_decay);
  return for_dtype(inputs, [&](auto zero) {
    return backward<decltype(zero)>(a, needs, {grad_hidden, grad_cell, grad_read, grad_read_weights, {}, grad_memory}, grad_outputs, outputs, tape,
                                    slots, checkpoints);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CUDA, module) {
  module.impl("mann_episode", TORCH_BOX(&mann_episode));
  module.impl("mann_episode_backward", TORCH_BOX(&mann_episode_backward));
}

}  // namespace fastmeta
