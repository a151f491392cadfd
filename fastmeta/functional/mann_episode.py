"""A whole episode of MANN as one operation: Santoro et al. (2016), section 3.2 and appendix A.1."""

import functools

import torch
from torch import Tensor

from .. import _backend, reference, schemas
from ..reference.cosine_attention import EPS_MODES
from ..reference.lrua_memory import LEAST_USED
from ..reference.mann_episode import MANNState
from ._arguments import INTEGERS, prepare, restore, without_autocast
from ._autograd import differentiable
from .lrua_memory import check_heads, check_step_options, lrua_step, split_strength

_operation = differentiable(schemas.mann_episode)


def mann_episode(inputs: Tensor, state: MANNState, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, head_weight: Tensor,
                 head_bias: Tensor, *, lengths: Tensor | None = None, own_add: bool = True, strength: float | str | None = None,
                 least_used: str = "per_head", read_before_write: bool = False, eps_mode: str = "sqrt", eps: float = 1e-6,
                 usage_decay: float = 0.95, backend: str | None = None) -> tuple[Tensor, MANNState]:
    """An LSTM that writes to and reads from an external memory at each step, for all the steps of a batch of episodes.

    ::

        i, f, g, o = [x_t, r_{t-1}] weight_ih^T + h_{t-1} weight_hh^T + bias     gates in torch's order
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);   h_t = sigmoid(o) tanh(c_t)
        k, a, s, strength = h_t head_weight^T + head_bias, through tanh, tanh, sigmoid, 1 + softplus
        r_t, memory, usage, read_weights = lrua_step(...)

    Args:
        inputs: ``[T, B, I]``, float32, float64, float16 or bfloat16; any strides. ``T`` may be 0.
        state: a :class:`fastmeta.reference.MANNState`: hidden, cell ``[B, H]``, read ``[B, R, M]``, read_weights ``[B, R, N]``, usage ``[B, N]``, memory
            ``[B, N, M]``, same dtype; gradients flow into all but the usage. It is not changed.
        weight_ih, weight_hh, bias: ``[4H, I + R M]``, ``[4H, H]``, ``[4H]``.
        head_weight, head_bias: ``[P, H]``, ``[P]``; rows: the keys (R M), the add vectors (R M, with ``own_add``), the gates (R), the
            strengths (R, with ``strength="learned"``).
        lengths: integer ``[B]`` in [0, T]: from its end on an episode keeps its state and its outputs are 0, whatever its inputs hold. One out
            of range is a ValueError; but the CUDA C++ kernels cannot tell without waiting for the device: there, outputs and state of its
            episode are NaN.
        own_add: whether the heads have add vectors; else the keys are written.
        strength: factor on the cosine: None for 1, a number, or ``"learned"``, one of each head and step.
        least_used, read_before_write, eps_mode, eps, usage_decay: as in :func:`lrua_step`.
        backend: as in :func:`memory_read`, and so is all that is said there of dtypes, autocast and errors. The second derivative
            runs the reference.

    Returns:
        ``(outputs [T, B, H + R M], state)``: ``[h_t, r_t]`` of each step, and the state after the last. Running the first t steps and then
        the others from the state in between gives the same.
    """
    name = "mann_episode"
    if not isinstance(state, tuple) or len(state) != 6:
        raise TypeError(f"{name}: state must be a MANNState of six tensors, got {type(state).__name__}")
    state = MANNState(*state)
    arguments = {"inputs": (inputs, "T B I"), "hidden": (state.hidden, "B H"), "cell": (state.cell, "B H"), "read": (state.read, "B R M"),
                 "read_weights": (state.read_weights, "B R N"), "usage": (state.usage, "B N"), "memory": (state.memory, "B N M")}
    learned = strength == "learned" if isinstance(strength, str) else False
    if isinstance(strength, str) and not learned:
        raise ValueError(f"{name}: strength must be None, a number or 'learned', got {strength!r}")
    if isinstance(strength, Tensor):
        raise TypeError(f"{name}: strength must be None, a number or 'learned', got a tensor")
    number, _ = split_strength(name, None if learned else strength)
    check_step_options(name, least_used, read_before_write, eps_mode, eps, usage_decay)
    if not isinstance(own_add, bool):
        raise TypeError(f"{name}: own_add must be a bool, got {type(own_add).__name__}")

    given = prepare(name, arguments)
    check_heads(name, given.sizes)
    steps, batch, features, hidden_size, heads, width = (given.sizes[letter] for letter in "TBIHRM")
    rows = heads * (width * (1 + own_add) + 1 + learned)
    wanted = {"4H": 4 * hidden_size, "I+RM": features + heads * width, "H": hidden_size, "P": rows}
    weights = prepare(name, {"inputs": (inputs, "T B I"), "weight_ih": (weight_ih, "4H I+RM"), "weight_hh": (weight_hh, "4H H"),
                             "bias": (bias, "4H"), "head_weight": (head_weight, "P H"), "head_bias": (head_bias, "P")}, wanted)
    inputs, *state = given.tensors
    weight_ih, weight_hh, bias, head_weight, head_bias = weights.tensors[1:]
    if lengths is not None:
        lengths = _check_lengths(name, lengths, inputs, batch)
    chosen = _backend.select(backend, inputs.device.type, name, "lrua_step")
    if chosen != "cpp":  # step by step; on Triton, the memory's part of a step is one launch
        step = reference.lrua_step if chosen == "reference" else functools.partial(lrua_step, backend=chosen)
        if lengths is not None:
            _check_lengths_in_range(name, lengths, steps)
        with without_autocast(given.autocast, inputs.device.type):
            outputs, state = reference.mann_episode(
                inputs, MANNState(*state), weight_ih, weight_hh, bias, head_weight, head_bias, lengths=lengths, own_add=own_add,
                strength="learned" if learned else number, least_used=least_used, read_before_write=read_before_write,
                eps_mode=eps_mode, eps=eps, usage_decay=usage_decay, lrua_step=step)
    else:
        outputs, *state = _operation(
            inputs, torch.cat([weight_ih, weight_hh], 1), bias, head_weight, head_bias, *state, lengths, own_add, learned, number,
            LEAST_USED.index(least_used), read_before_write, EPS_MODES.index(eps_mode), float(eps), float(usage_decay))
    outputs, *state = restore((outputs, *state), given.dtype)
    return outputs, MANNState(*state)


def _check_lengths(name: str, lengths: Tensor, inputs: Tensor, batch: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        given = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name}: lengths must be an integer tensor, got {given}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: lengths must be [B] with B = {batch}, got shape {list(lengths.shape)}")
    if lengths.device != inputs.device:
        raise ValueError(f"{name}: lengths must be on the device of inputs, {inputs.device}, got {lengths.device}")
    return lengths.long()


def _check_lengths_in_range(name: str, lengths: Tensor, steps: int) -> None:
    """What the compiled kernel checks for itself. It reads the lengths, so it is left out where they have no values yet."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or lengths.is_meta:
        return
    wrong = lengths[(lengths < 0) | (lengths > steps)]
    if len(wrong):
        raise ValueError(f"{name}: lengths must be in [0, {steps}], got {wrong[0].item()}")
