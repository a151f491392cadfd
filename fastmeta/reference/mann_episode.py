"""An episode of MANN (Santoro et al., 2016), section 3.2 and appendix A.1, in plain PyTorch: an LSTM that writes and reads at each step.

::

    i, f, g, o = [x_t, r_{t-1}] W_ih^T + h_{t-1} W_hh^T + b           gates in torch's order
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)                 h_t = sigmoid(o) * tanh(c_t)
    k = tanh(h_t W_key^T + b)    a = tanh(h_t W_add^T + b)            s = sigmoid(h_t W_gate^T + b)
    strength = 1 + softplus(h_t W_strength^T + b)                     where it is learned
    r_t, memory, usage, wr = lrua_step(...)
    output_t = [h_t, r_t]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .lrua_memory import lrua_step


class MANNState(NamedTuple):
    """What is carried from step to step: hidden, cell ``[B, H]``, read ``[B, R, M]``, read_weights ``[B, R, N]``, usage ``[B, N]``, memory
    ``[B, N, M]``."""

    hidden: Tensor
    cell: Tensor
    read: Tensor
    read_weights: Tensor
    usage: Tensor
    memory: Tensor


def mann_episode(inputs: Tensor, state: MANNState, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, head_weight: Tensor,
                 head_bias: Tensor, *, lengths: Tensor | None = None, own_add: bool = True, strength: float | str | None = None,
                 least_used: str = "per_head", read_before_write: bool = False, eps_mode: str = "sqrt", eps: float = 1e-6,
                 usage_decay: float = 0.95, lrua_step: Callable = lrua_step) -> tuple[Tensor, MANNState]:
    """All the steps of a batch of episodes: ``(outputs [T, B, H + R M], state)``.

    ``inputs [T, B, I]``; ``weight_ih [4H, I + R M]``, ``weight_hh [4H, H]``, ``bias [4H]``; ``head_weight [P, H]``, ``head_bias [P]``, whose
    rows are the keys (R M), the add vectors (R M; with ``own_add=False`` there are none, and the keys are written), the gates (R), and with
    ``strength="learned"`` the strengths (R). ``lengths`` int ``[B]``: from its end on an episode keeps its state and its outputs are 0.
    ``lrua_step``: what does the memory's part of a step.
    """
    heads, width = state.read.shape[-2:]
    sizes = [heads * width, heads * width * own_add, heads, heads * (strength == "learned")]
    outputs = []
    for t, x in enumerate(inputs):
        hidden, cell, read, read_weights, usage, memory = state
        if lengths is not None:
            running = (t < lengths)
            x = torch.where(running[:, None], x, 0.0)  # what stands in the padding reaches nothing
        i, f, g, o = (linear(torch.cat([x, read.flatten(1)], -1), weight_ih, bias) + linear(hidden, weight_hh)).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        key, add, gate, learned = linear(hidden, head_weight, head_bias).split(sizes, -1)
        key = key.tanh().unflatten(-1, (heads, width))
        add = add.tanh().unflatten(-1, (heads, width)) if own_add else key
        read, memory, usage, read_weights = lrua_step(
            memory, usage, read_weights, key, add, gate.sigmoid(), strength=1 + torch.logaddexp(learned, learned.new_zeros(())) if strength == "learned" else strength,
            least_used=least_used, read_before_write=read_before_write, eps_mode=eps_mode, eps=eps, usage_decay=usage_decay)
        output = torch.cat([hidden, read.flatten(1)], -1)
        after = MANNState(hidden, cell, read, read_weights, usage, memory)
        if lengths is not None:
            output = torch.where(running[:, None], output, 0.0)
            after = MANNState(*(torch.where(running.view(-1, *(1,) * (new.dim() - 1)), new, old) for new, old in zip(after, state)))
        outputs.append(output)
        state = after
    if not outputs:
        return inputs.new_zeros(0, inputs.shape[1], state.hidden.shape[-1] + heads * width), state
    return torch.stack(outputs), state
