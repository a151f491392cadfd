"""What is asked of arguments before anything is computed, with one wording of the errors."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_HALVES = (torch.float16, torch.bfloat16)


class Prepared(NamedTuple):
    """``tensors`` in the dtype to compute in, and ``dtype``, that of the results; ``sizes`` by letter; ``autocast``: it is on."""

    tensors: list[Tensor | None]
    dtype: torch.dtype
    sizes: dict[str, int]
    autocast: bool


def prepare(function: str, arguments: dict[str, tuple[Tensor | None, str]], sizes: dict[str, int] | None = None) -> Prepared:
    """Check floating tensors against their shapes, written in letters: ``{"memory": (memory, "B N M"), ...}``; one may be None after "?".

    The first tensor gives dtype and device. A letter has the size of its first appearance, or the one in ``sizes``; a digit is itself.
    float16 and bfloat16 are computed in float32; inside autocast everything is float32.
    Raises ``TypeError`` for what is no dense tensor or has the wrong dtype, ``ValueError`` for shapes and devices.
    """
    sizes = dict(sizes or {})
    names = list(arguments)
    for name, (t, letters) in arguments.items():
        if t is None and letters.startswith("?"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got {t.layout}")
    lead = arguments[names[0]][0]
    autocast = not lead.is_meta and torch.is_autocast_enabled(lead.device.type)
    dtype = torch.float32 if autocast and lead.dtype in _HALVES else lead.dtype
    if dtype not in FLOATS:
        raise TypeError(f"{function}: {names[0]} must be float32, float64, float16 or bfloat16, got {dtype}")
    compute = torch.float32 if dtype in _HALVES else dtype
    tensors = []
    for name, (t, letters) in arguments.items():
        if t is None:
            tensors.append(None)
            continue
        if t.dtype != dtype and not (autocast and t.dtype in _HALVES):
            raise TypeError(f"{function}: {name} must have the dtype of {names[0]}, {dtype}, got {t.dtype}")
        if t.device != lead.device:
            raise ValueError(f"{function}: {name} must be on the device of {names[0]}, {lead.device}, got {t.device}")
        expected = letters.lstrip("? ").split()
        shape = t.shape
        if len(shape) != len(expected) or any(size != (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
                                              for letter, size in zip(expected, shape)):
            known = [f"{letter} = {sizes[letter]}" for letter in dict.fromkeys(expected) if letter in sizes] if len(shape) == len(expected) else []
            raise ValueError(f"{function}: {name} must be [{', '.join(expected)}]{' with ' if known else ''}{', '.join(known)}, "
                             f"got shape {list(shape)}")
        tensors.append(t if t.dtype == compute else t.to(compute))
    return Prepared(tensors, dtype, sizes, autocast)


def without_autocast(autocast: bool, device_type: str):
    """A context in which PyTorch computes in the dtype it is given; ``autocast``: whether there is any to leave."""
    return torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext()


def restore(tensors, dtype: torch.dtype):
    """Results in the dtype of the arguments."""
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in tensors)


def check_choice(function: str, name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_eps(function: str, eps) -> None:
    if not is_number(eps):
        raise TypeError(f"{function}: eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{function}: eps must be positive and finite, got {eps}")
