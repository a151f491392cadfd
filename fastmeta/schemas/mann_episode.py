"""``fastmeta::mann_episode``, forward and backward.

Arguments as those of ``reference.mann_episode``, float32 or float64, with ``weight = [weight_ih, weight_hh]`` ``[4H, I + R M + H]`` and lengths
int64. ``learned_strength`` says that the last R rows of ``head_weight`` are the strengths, else the factor on the cosine is ``strength``.
Hidden results, for the backward: tape ``[T, B, (I + R M + H) + 5 H + P + R N]``, of each step the controller's input, its gates and cell, the
heads and the read weights; slots int64 ``[T, B, R]``, the least used ones; checkpoints ``[ceil(T / 8), B, M, N]``, the memory before every eighth step.
"""

import torch

from .. import reference
from ..reference.cosine_attention import EPS_MODES
from ..reference.lrua_memory import LEAST_USED
from .operation import Operation

CHECKPOINT_EVERY = 8  # kSegment of csrc/common/lrua_memory.h


def _by_reference(inputs, weight, bias, head_weight, head_bias, hidden, cell, read, read_weights, usage, memory, lengths, own_add,
                  learned_strength, strength, least_used, read_before_write, eps_mode, eps, usage_decay):
    weight_ih, weight_hh = weight.split([weight.shape[1] - hidden.shape[1], hidden.shape[1]], 1)
    outputs, state = reference.mann_episode(
        inputs, reference.MANNState(hidden, cell, read, read_weights, usage, memory), weight_ih, weight_hh, bias, head_weight, head_bias,
        lengths=lengths, own_add=own_add, strength="learned" if learned_strength else strength, least_used=LEAST_USED[least_used],
        read_before_write=read_before_write, eps_mode=EPS_MODES[eps_mode], eps=eps, usage_decay=usage_decay)
    return outputs, *state


def _fake(inputs, weight, bias, head_weight, head_bias, hidden, cell, read, read_weights, usage, memory, *rest):
    steps, batch, _ = inputs.shape
    heads, slots = read_weights.shape[1:]
    width, hidden_size = memory.shape[2], hidden.shape[1]
    row = weight.shape[1] + 5 * hidden_size + head_bias.shape[0] + heads * slots
    state = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (hidden, cell, read, read_weights, usage, memory))
    return (inputs.new_empty(steps, batch, hidden_size + heads * width), *state, inputs.new_empty(steps, batch, row),
            inputs.new_empty(steps, batch, heads, dtype=torch.int64),
            inputs.new_empty((steps + CHECKPOINT_EVERY - 1) // CHECKPOINT_EVERY, batch, width, slots))


mann_episode = Operation(
    "mann_episode",
    "Tensor inputs, Tensor weight, Tensor bias, Tensor head_weight, Tensor head_bias, Tensor hidden, Tensor cell, Tensor read, "
    "Tensor read_weights, Tensor usage, Tensor memory, Tensor? lengths, bool own_add, bool learned_strength, float strength, int least_used, "
    "bool read_before_write, int eps_mode, float eps, float usage_decay",
    tensors=12, gradients=(0, 1, 2, 3, 4, 5, 6, 7, 8, 10), results=10, visible=7, undifferentiable=(5,), reference=_by_reference, fake=_fake,
    saves=True, calls_torch=True, folds=False)
