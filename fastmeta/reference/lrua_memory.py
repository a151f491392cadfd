"""An external memory with least-recently-used access, in plain PyTorch: MANN (Santoro et al., 2016), sections 3.1 and 3.2.

With a head j of R, a slot i of N, and vectors of width M::

    ww^j  = s^j * wr_{t-1}^j + (1 - s^j) * wlu_{t-1}^j            write weights; wlu marks the least used slots (equation 6)
    M~    = M_{t-1} with the least used slot set to 0
    M_t   = M~ + sum_j ww^j a^j                                   (equation 8)
    wr^j  = softmax_i(strength^j * c(k^j, M(i)))                  (equations 2 and 3)
    r^j   = sum_i wr^j(i) M_t(i)                                  (equation 4)
    wu_t  = usage_decay * wu_{t-1} + sum_j wr^j + sum_j ww^j      (equation 5)

Usage enters through the choice of slots only, so it has no gradient. Slots of equal usage come in the order of their index.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cosine_attention import cosine_scores

LEAST_USED = ("per_head", "shared")


class LRUAState(NamedTuple):
    """What an :class:`LRUAMemory` remembers: memory ``[B, N, M]``, usage ``[B, N]``, read_weights ``[B, R, N]``."""

    memory: Tensor
    usage: Tensor
    read_weights: Tensor


def read_weights_of(memory: Tensor, keys: Tensor, strength, eps_mode: str, eps: float) -> Tensor:
    """``wr``: ``[B, N, M], [B, R, M] -> [B, R, N]``."""
    scores = cosine_scores(keys, memory, eps_mode=eps_mode, eps=eps)
    if strength is not None:
        scores = scores * (strength.unsqueeze(-1) if isinstance(strength, Tensor) else strength)
    return scores.softmax(-1)


def least_used_slots(usage: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` slots of least usage, the least first, ties by the lowest index: ``[B, N] -> [B, count]``."""
    return usage.argsort(dim=-1, stable=True)[..., :count]


def memory_read(memory: Tensor, keys: Tensor, *, strength: float | Tensor | None = None, eps_mode: str = "sqrt",
                eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``r`` and ``wr``: ``[B, N, M], [B, R, M] -> [B, R, M], [B, R, N]``; ``strength`` is a number or ``[B, R]``, None for 1."""
    weights = read_weights_of(memory, keys, strength, eps_mode, eps)
    return weights @ memory, weights


def lrua_write(memory: Tensor, usage: Tensor, read_weights: Tensor, add: Tensor, gate: Tensor, *,
               least_used: str = "per_head") -> tuple[Tensor, Tensor]:
    """``M_t`` and ``ww``: ``[B, N, M], [B, N], [B, R, N], [B, R, M], [B, R] -> [B, N, M], [B, R, N]``.

    ``least_used="per_head"`` gives head j the j-th least used slot, ``"shared"`` gives every head all R of them.
    """
    heads, slots = read_weights.shape[-2:]
    marks = least_used_slots(usage, heads).unsqueeze(-1) == torch.arange(slots, device=usage.device)  # [B, R, N]
    least = (marks if least_used == "per_head" else marks.any(-2, keepdim=True)).to(gate.dtype)
    gate = gate.unsqueeze(-1)
    write_weights = gate * read_weights + (1 - gate) * least
    kept = memory.masked_fill(marks[..., 0, :, None], 0.0)
    return kept + write_weights.mT @ add, write_weights


def lrua_step(memory: Tensor, usage: Tensor, read_weights: Tensor, keys: Tensor, add: Tensor, gate: Tensor, *,
              strength: float | Tensor | None = None, least_used: str = "per_head", read_before_write: bool = False,
              eps_mode: str = "sqrt", eps: float = 1e-6, usage_decay: float = 0.95) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write, read and usage of one time step: ``(read [B, R, M], memory, usage, read_weights)``.

    ``read_before_write`` computes ``wr`` on ``M_{t-1}``, before the erase and the write; what is read is ``M_t`` either way.
    """
    written, write_weights = lrua_write(memory, usage, read_weights, add, gate, least_used=least_used)
    weights = read_weights_of(memory if read_before_write else written, keys, strength, eps_mode, eps)
    usage = usage_decay * usage.detach() + (weights.sum(-2) + write_weights.sum(-2)).detach()
    return weights @ written, written, usage, weights


class LRUAMemory(nn.Module):
    """The memory alone, for any controller: ``forward(keys [B, R, M], add [B, R, M], gate [B, R], state=None, strength=None)
    -> (read [B, R, M], state)`` with ``gate`` in [0, 1], ``strength`` ``[B, R]`` or a number, and ``state`` an :class:`LRUAState`
    (None: :meth:`initial_state`). No parameters.

    Args:
        memory_slots, memory_width, read_heads: N, M, R; ``R <= N``.
        usage_decay, least_used, read_before_write, eps_mode, eps: as in :func:`fastmeta.functional.lrua_step`.
    """

    lrua_step = staticmethod(lrua_step)

    def __init__(self, memory_slots: int = 128, memory_width: int = 40, read_heads: int = 4, *, usage_decay: float = 0.95,
                 least_used: str = "per_head", read_before_write: bool = False, eps_mode: str = "sqrt", eps: float = 1e-6):
        super().__init__()
        for name, value in (("memory_slots", memory_slots), ("memory_width", memory_width), ("read_heads", read_heads)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        if read_heads > memory_slots:
            raise ValueError(f"{type(self).__name__}: read_heads must be at most memory_slots = {memory_slots}, got {read_heads}")
        if least_used not in LEAST_USED:
            raise ValueError(f"{type(self).__name__}: least_used must be one of {', '.join(map(repr, LEAST_USED))}, got {least_used!r}")
        self.memory_slots, self.memory_width, self.read_heads = memory_slots, memory_width, read_heads
        self.usage_decay, self.least_used, self.read_before_write = usage_decay, least_used, read_before_write
        self.eps_mode, self.eps = eps_mode, eps

    def options(self) -> dict:
        return dict(usage_decay=self.usage_decay, least_used=self.least_used, read_before_write=self.read_before_write,
                    eps_mode=self.eps_mode, eps=self.eps)

    def initial_state(self, batch_size: int, *, dtype: torch.dtype | None = None, device=None) -> LRUAState:
        """``M`` 1e-6 everywhere; usage and the read weights of every head on slot 0."""
        new = dict(dtype=dtype, device=device)
        on_slot_0 = torch.zeros(batch_size, self.memory_slots, **new)
        on_slot_0[:, 0] = 1
        return LRUAState(torch.full((batch_size, self.memory_slots, self.memory_width), 1e-6, **new), on_slot_0,
                         on_slot_0.unsqueeze(1).repeat(1, self.read_heads, 1))

    def forward(self, keys: Tensor, add: Tensor, gate: Tensor, state: LRUAState | None = None,
                strength: float | Tensor | None = None) -> tuple[Tensor, LRUAState]:
        if state is None:
            state = self.initial_state(len(keys), dtype=keys.dtype, device=keys.device)
        read, *state = self.lrua_step(*state, keys, add, gate, strength=strength, **self.options())
        return read, LRUAState(*state)

    def extra_repr(self) -> str:
        return f"memory_slots={self.memory_slots}, memory_width={self.memory_width}, read_heads={self.read_heads}, " + \
            ", ".join(f"{name}={value!r}" for name, value in self.options().items())
