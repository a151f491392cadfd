"""``fastmeta::memory_read``, ``fastmeta::lrua_write`` and ``fastmeta::lrua_step``, forward and backward.

memory ``[B, N, M]``, usage ``[B, N]``, read_weights and write_weights ``[B, R, N]``, keys, add and read ``[B, R, M]``, gate and strengths
``[B, R]``; float32 or float64, any strides. The factor on the cosine is ``strength * strengths``. ``eps_mode`` and ``least_used`` are positions
in ``reference.cosine_attention.EPS_MODES`` and ``reference.lrua_memory.LEAST_USED``. Usage has no gradient.
"""

import torch

from .. import reference
from ..reference.cosine_attention import EPS_MODES
from ..reference.lrua_memory import LEAST_USED
from .operation import Operation


def _strength(strengths, strength):
    return strength if strengths is None else strength * strengths


def _read(memory, keys, strengths, strength, eps_mode, eps):
    return reference.memory_read(memory, keys, strength=_strength(strengths, strength), eps_mode=EPS_MODES[eps_mode], eps=eps)


def _write(memory, usage, read_weights, add, gate, least_used):
    return reference.lrua_write(memory, usage, read_weights, add, gate, least_used=LEAST_USED[least_used])


def _step(memory, usage, read_weights, keys, add, gate, strengths, strength, least_used, read_before_write, eps_mode, eps, usage_decay):
    return reference.lrua_step(memory, usage, read_weights, keys, add, gate, strength=_strength(strengths, strength),
                               least_used=LEAST_USED[least_used], read_before_write=read_before_write, eps_mode=EPS_MODES[eps_mode],
                               eps=eps, usage_decay=usage_decay)


def _like(*tensors):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _fake_read(memory, keys, *rest):
    return *_like(keys), keys.new_empty(*keys.shape[:-1], memory.shape[-2])


memory_read = Operation(
    "memory_read", "Tensor memory, Tensor keys, Tensor? strengths, float strength, int eps_mode, float eps",
    tensors=3, gradients=(0, 1, 2), results=2, visible=2, reference=_read, fake=_fake_read)
lrua_write = Operation(
    "lrua_write", "Tensor memory, Tensor usage, Tensor read_weights, Tensor add, Tensor gate, int least_used",
    tensors=5, gradients=(0, 2, 3, 4), results=2, visible=2, reference=_write,
    fake=lambda memory, usage, read_weights, *rest: _like(memory, read_weights))
lrua_step = Operation(
    "lrua_step", "Tensor memory, Tensor usage, Tensor read_weights, Tensor keys, Tensor add, Tensor gate, Tensor? strengths, "
    "float strength, int least_used, bool read_before_write, int eps_mode, float eps, float usage_decay",
    tensors=7, gradients=(0, 2, 3, 4, 5, 6), results=4, visible=4, undifferentiable=(2,), reference=_step,
    fake=lambda memory, usage, read_weights, keys, *rest: _like(keys, memory, usage, read_weights))
