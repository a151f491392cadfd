"""An external memory with least-recently-used access: MANN (Santoro et al., 2016), sections 3.1 and 3.2."""

import math

from torch import Tensor

from .. import _backend, reference, schemas
from ..reference.cosine_attention import EPS_MODES
from ..reference.lrua_memory import LEAST_USED
from ._arguments import check_choice, check_eps, is_number, prepare, restore, without_autocast
from ._autograd import differentiable_on_all

_operations = differentiable_on_all(schemas.memory_read, schemas.lrua_write, schemas.lrua_step)


def memory_read(memory: Tensor, keys: Tensor, *, strength: float | Tensor | None = None, eps_mode: str = "sqrt", eps: float = 1e-6,
                backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Read by content: ``w^j = softmax_i(strength^j * c(k^j, M(i)))`` and ``r^j = sum_i w^j(i) M(i)`` (equations 2 to 4).

    Also the content addressing of the Neural Turing Machine and of the Differentiable Neural Computer.

    Args:
        memory: ``[B, N, M]``, float32, float64, float16 or bfloat16; any strides.
        keys: ``[B, R, M]``, same dtype.
        strength: factor on the cosine: a number, ``[B, R]`` (it may want a gradient), or None for 1, as the paper has it.
        eps_mode, eps: of the cosine, as in :func:`cosine_attention`; ``eps > 0``.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for :func:`fastmeta.use_backend`, ``FASTMETA_BACKEND``, or the fastest that can run.

    Returns:
        ``(read [B, R, M], weights [B, R, N])`` in the dtype of ``memory``; computed in float32 at least. Inside autocast it runs in
        float32.

    Raises:
        TypeError: what is not a tensor, or has the wrong dtype.
        ValueError: shapes that do not fit, unknown options.
        RuntimeError: an explicit backend that cannot run.
    """
    name = "memory_read"
    number, strengths = split_strength(name, strength)
    given = prepare(name, {"memory": (memory, "B N M"), "keys": (keys, "B R M"), "strength": (strengths, "? B R")})
    check_choice(name, "eps_mode", eps_mode, EPS_MODES)
    check_eps(name, eps)
    memory, keys, strengths = given.tensors
    chosen = _backend.select(backend, memory.device.type, name)
    if chosen == "reference":
        with without_autocast(given.autocast, memory.device.type):
            results = reference.memory_read(memory, keys, strength=number if strengths is None else strengths, eps_mode=eps_mode, eps=eps)
    else:
        results = _operations[chosen, name](memory, keys, strengths, number, EPS_MODES.index(eps_mode), float(eps))
    return restore(results, given.dtype)


def lrua_write(memory: Tensor, usage: Tensor, read_weights: Tensor, add: Tensor, gate: Tensor, *, least_used: str = "per_head",
               backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Write to where was read last, or to the least used slots: ``ww^j = gate^j wr^j + (1 - gate^j) wlu^j`` (section 3.2, equations 6 to 8).

    The single least used slot is set to 0, then ``sum_j ww^j(i) add^j`` is added to each slot i.

    Args:
        memory: ``[B, N, M]``, float32, float64, float16 or bfloat16; any strides. It is not changed.
        usage: ``[B, N]``. It chooses slots, ties by the lowest index, and so has no gradient. NaN counts as the largest.
        read_weights: ``[B, R, N]``, those of the step before; ``R <= N``.
        add: ``[B, R, M]``, what each head writes.
        gate: ``[B, R]`` in [0, 1] (not checked).
        least_used: ``"per_head"``: wlu of head j marks the j-th least used slot; ``"shared"``: that of every head marks all R of them.
        backend: as in :func:`memory_read`, and so is all that is said there of dtypes, autocast and errors.

    Returns:
        ``(memory [B, N, M], write_weights [B, R, N])``.
    """
    name = "lrua_write"
    given = prepare(name, {"memory": (memory, "B N M"), "usage": (usage, "B N"), "read_weights": (read_weights, "B R N"),
                           "add": (add, "B R M"), "gate": (gate, "B R")})
    check_heads(name, given.sizes)
    check_choice(name, "least_used", least_used, LEAST_USED)
    chosen = _backend.select(backend, memory.device.type, name)
    if chosen == "reference":
        with without_autocast(given.autocast, memory.device.type):
            results = reference.lrua_write(*given.tensors, least_used=least_used)
    else:
        results = _operations[chosen, name](*given.tensors, LEAST_USED.index(least_used))
    return restore(results, given.dtype)


def lrua_step(memory: Tensor, usage: Tensor, read_weights: Tensor, keys: Tensor, add: Tensor, gate: Tensor, *,
              strength: float | Tensor | None = None, least_used: str = "per_head", read_before_write: bool = False, eps_mode: str = "sqrt",
              eps: float = 1e-6, usage_decay: float = 0.95, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the memory as one operation: :func:`lrua_write`, :func:`memory_read`, and the usage (section 3.2, equations 5 to 8).

    ``usage' = usage_decay * usage + sum_j wr^j + sum_j ww^j``.

    Args:
        memory, usage, read_weights, add, gate, least_used: as in :func:`lrua_write`.
        keys, strength, eps_mode, eps: as in :func:`memory_read`.
        read_before_write: compute the read weights on the memory as it came in; what is read is the memory after the write either way.
        usage_decay: gamma of equation 5, in [0, 1].
        backend: as in :func:`memory_read`, and so is all that is said there of dtypes, autocast and errors.

    Returns:
        ``(read [B, R, M], memory [B, N, M], usage [B, N], read_weights [B, R, N])``; usage has no gradient.
    """
    name = "lrua_step"
    number, strengths = split_strength(name, strength)
    given = prepare(name, {"memory": (memory, "B N M"), "usage": (usage, "B N"), "read_weights": (read_weights, "B R N"),
                           "keys": (keys, "B R M"), "add": (add, "B R M"), "gate": (gate, "B R"), "strength": (strengths, "? B R")})
    check_heads(name, given.sizes)
    check_step_options(name, least_used, read_before_write, eps_mode, eps, usage_decay)
    *tensors, strengths = given.tensors
    chosen = _backend.select(backend, memory.device.type, name)
    if chosen == "reference":
        with without_autocast(given.autocast, memory.device.type):
            results = reference.lrua_step(*tensors, strength=number if strengths is None else strengths, least_used=least_used,
                                          read_before_write=read_before_write, eps_mode=eps_mode, eps=eps, usage_decay=usage_decay)
    else:
        results = _operations[chosen, name](*tensors, strengths, number, LEAST_USED.index(least_used), read_before_write,
                                    EPS_MODES.index(eps_mode), float(eps), float(usage_decay))
    return restore(results, given.dtype)


def split_strength(name: str, strength) -> tuple[float, Tensor | None]:
    """A strength as the operations take it: ``(number, tensor or None)``."""
    if isinstance(strength, Tensor):
        return 1.0, strength
    if strength is None:
        return 1.0, None
    if not is_number(strength):
        raise TypeError(f"{name}: strength must be a number, a tensor or None, got {type(strength).__name__}")
    if not math.isfinite(strength):
        raise ValueError(f"{name}: strength must be finite, got {strength}")
    return float(strength), None


def check_heads(name: str, sizes: dict[str, int]) -> None:
    if not 1 <= sizes["R"] <= sizes["N"]:
        raise ValueError(f"{name}: there must be at least one head, and a slot for each, got R = {sizes['R']} heads, N = {sizes['N']} slots")


def check_step_options(name, least_used, read_before_write, eps_mode, eps, usage_decay) -> None:
    check_choice(name, "least_used", least_used, LEAST_USED)
    check_choice(name, "eps_mode", eps_mode, EPS_MODES)
    check_eps(name, eps)
    if not isinstance(read_before_write, bool):
        raise TypeError(f"{name}: read_before_write must be a bool, got {type(read_before_write).__name__}")
    if not is_number(usage_decay):
        raise TypeError(f"{name}: usage_decay must be a number, got {type(usage_decay).__name__}")
    if not 0 <= usage_decay <= 1:
        raise ValueError(f"{name}: usage_decay must be in [0, 1], got {usage_decay}")
