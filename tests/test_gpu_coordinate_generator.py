"""coordinate_mlp and coordinate_lstm as Triton makes them, executed on the PTX machine: against float64 in three orders of blocks and warps.

Small enough to be run on every deliberate fault of ``mutations.py``. So that programs have several blocks of coordinates, there are at most three.
"""

import math
import subprocess
from typing import NamedTuple
from unittest import mock

import emulation
import pytest
import torch
from helpers import finish, spawn_python
from test_gpu_lrua_memory import SEEDS, check_on_machine
from test_mann_operations import values_and_gradients

from fastmeta import _backend, functional, reference

MLP, LSTM = "coordinate_mlp", "coordinate_lstm"
NAMES = {MLP: ("gradients", "weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3"),
         LSTM: ("gradients", "weight_ih", "weight_hh", "bias", "output_weight", "output_bias")}
BORDER = math.exp(-reference.coordinate_generator.PREPROCESSING_P)  # where the channels have their kinks


class Case(NamedTuple):
    name: str
    sizes: tuple[int, ...]  # M, W or T, M, W
    dtype: str = "float32"
    strided: bool = False
    wanted: str = "all"  # gradients

    def __str__(self):
        options = [f"{k}={getattr(self, k)}" for k, default in self._field_defaults.items() if getattr(self, k) != default]
        return f"{self.name} {self.sizes} {' '.join(options)}".strip()


CASES = [
    # one of everything; the published width about the ends of a block of 16 coordinates; four, five and three blocks for the three programs
    Case(MLP, (1, 1)), Case(LSTM, (1, 1, 1)), *(Case(MLP, (m, 20)) for m in (15, 16, 17, 64, 77)),
    Case(LSTM, (1, 15, 20)), Case(LSTM, (2, 16, 20)), Case(LSTM, (5, 17, 20)), Case(LSTM, (2, 77, 20)), Case(LSTM, (5, 64, 5)), Case(MLP, (33, 5)),
    Case(LSTM, (2, 37, 1)), Case(MLP, (37, 1)), Case(MLP, (19, 32)), Case(MLP, (19, 33)),
    # no coordinates
    Case(MLP, (0, 20)), Case(LSTM, (2, 0, 5)),
    # several warps, which have units of their own
    Case(MLP, (77, 70)), Case(LSTM, (2, 65, 70)),
    Case(MLP, (37, 5), strided=True), Case(LSTM, (2, 37, 5), strided=True),
    # one gradient alone
    *(Case(MLP, (19, 5), wanted=name) for name in NAMES[MLP]), *(Case(LSTM, (2, 19, 5), wanted=name) for name in NAMES[LSTM]),
    # float64, in blocks of 8
    Case(MLP, (37, 20), "float64"), Case(MLP, (9, 1), "float64", True), Case(LSTM, (2, 37, 5), "float64"), Case(LSTM, (5, 9, 20), "float64", True),
]


def inputs(case: Case):
    """Tensors by name, and options. Gradients on both sides of the kinks, and weights of the size that they begin with."""
    torch.manual_seed(hash(case.sizes) % 2**31)
    *shape, width = case.sizes
    dtype = getattr(torch, case.dtype)
    shapes = ((width, 2), (width,), (width, width), (width,), (1, width), (1,)) if case.name == MLP else \
        ((4 * width, 2), (4 * width, width), (4 * width,), (1, width), (1,))
    tensors = [BORDER * torch.randn(*shape, dtype=dtype) * torch.randn(*shape, dtype=dtype).mul(2).exp(),
               *((torch.rand(*s, dtype=dtype) * 2 - 1) * width**-0.5 for s in shapes)]
    if case.strided:
        tensors = [torch.stack([t, torch.full_like(t, 77)]).movedim(0, -1).mT[..., 0, :] if t.dim() == 1 else
                   torch.stack([t.mT, torch.full_like(t.mT, 77)], -1)[..., 0].mT for t in tensors]
    return {name: t.requires_grad_(case.wanted in ("all", name)) for name, t in zip(NAMES[case.name], tensors, strict=True)}, {}


def check(case: Case, emulator, backend: str, seeds=SEEDS):
    import fastmeta.triton

    # In the operation's own module, which may be one with a deliberate fault.
    with mock.patch.dict(fastmeta.triton.coordinate_mlp.__globals__, PROGRAMS=3), mock.patch.dict(fastmeta.triton.coordinate_lstm.__globals__, PROGRAMS=3):
        return check_on_machine(str(case), case.name, *inputs(case), emulator, backend, seeds)


@pytest.fixture(autouse=True)
def triton():
    if missing := emulation.triton_is_missing():
        pytest.skip(missing)


# Without tl.dot the architectures have nearly the same PTX: the second one is tried on one size.
@pytest.mark.parametrize("case, architecture", [*((case, 80) for case in CASES), (Case(MLP, (77, 20)), 120), (Case(LSTM, (2, 77, 20)), 120)], ids=str)
def test_triton(case, architecture):
    forward, backward = check(case, lambda seed: emulation.TritonEmulator(seed, architecture), "triton")
    sums = case.wanted != "gradients"
    assert [len(call.launches) for call in (forward, backward)] == ([1, 1 + sums] if case.sizes[-2] else [0, 1])
    assert all(launch.grid[0] <= 3 for launch in (*forward.launches, *backward.launches) if launch.kernel != "sum_kernel")


def run(name, tensors, weight, functions=functional):
    """Result and gradients on the machine, or by the reference."""
    with emulation.emulated("triton", emulation.TritonEmulator()):
        return values_and_gradients(functions, name, tensors, {}, [weight])


def test_more_coordinates_than_programs():
    """As many as programs have, and one more: sums of two blocks in one program, of one in the others."""
    tensors, _ = inputs(Case(MLP, (16 * 1024 + 1, 1)))
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    ours, exact = (run(MLP, t, torch.ones(16 * 1024 + 1), functions) for functions, t in ((functional, tensors), (reference, exact)))
    for name, a, b in zip(("result", *NAMES[MLP]), ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(1, b.abs().max().item()), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", (MLP, LSTM))
def test_extreme_gradients(name, dtype):
    """Values of gradients that are nothing, huge, infinite or no number; and what belongs to the others is as without them."""
    info = torch.finfo(dtype)
    extreme = [0.0, -0.0, BORDER, -BORDER, 1e30, -1e30, info.max, -info.max, info.tiny, info.tiny / 8, torch.inf, -torch.inf, torch.nan, 1.0, -1.0]
    tensors, _ = inputs(Case(name, (16, 5) if name == MLP else (2, 16, 5), str(dtype).removeprefix("torch.")))
    with torch.no_grad():
        tensors["gradients"][..., :15] = torch.tensor(extreme, dtype=dtype)
    # A weight on the finite ones alone: NaN and infinity are in every sum over coordinates.
    weight = torch.randn(16, dtype=torch.float64)
    ours, eager = run(name, tensors, weight), run(name, tensors, weight, reference)
    rounding = 64 * info.eps
    torch.testing.assert_close(ours[0], eager[0], rtol=rounding, atol=rounding, equal_nan=True)
    # On which side of a kink a gradient at BORDER lies is a matter of the last bit.
    torch.testing.assert_close(ours[1][..., 4:], eager[1][..., 4:], rtol=rounding, atol=rounding * eager[1].nan_to_num().abs().max().item(), equal_nan=True)
    for a, b in zip(ours[2:], eager[2:], strict=True):
        torch.testing.assert_close(a.isnan(), b.isnan())
