"""coordinate_mlp and coordinate_lstm as Triton makes them, executed on the PTX machine: against float64 in three orders of blocks and warps.

Small enough to be run on every deliberate fault of ``mutations.py``. So that programs have several blocks of coordinates, there are at most three.
"""

import contextlib
import math
import subprocess
from typing import NamedTuple

import emulation
import pytest
import torch
from helpers import finish, spawn_python
from test_gpu_lrua_memory import SEEDS, check_on_machine
from test_mann_operations import values_and_gradients

from fastmeta import functional, reference

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
    # several warps, which have units of their own; without the gradient of the gradients, where they also meet in sums
    Case(MLP, (77, 70)), Case(LSTM, (2, 65, 33)), Case(MLP, (77, 33), wanted="weight_1"), Case(LSTM, (2, 17, 33), wanted="bias"),
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


@contextlib.contextmanager
def programs(name, count):
    """Inside, there are at most so many programs of the operation."""
    import fastmeta.triton

    module = getattr(fastmeta.triton, name).__globals__  # of its own module, which may be one with a deliberate fault
    before = module["PROGRAMS"]
    module["PROGRAMS"] = count
    try:
        yield
    finally:
        module["PROGRAMS"] = before


def check(case: Case, emulator, backend: str, seeds=SEEDS):
    with programs(case.name, 3):
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


def small(name, dtype, gradients):
    """A case of width 5 with these gradients, the last ones of a block that is not full; of an LSTM, the first of two steps."""
    gradients = torch.tensor(gradients, dtype=dtype)
    tensors, _ = inputs(Case(name, (*([2] if name == LSTM else []), len(gradients) + 3, 5), str(dtype).removeprefix("torch.")))
    with torch.no_grad():
        (tensors["gradients"][0] if name == LSTM else tensors["gradients"])[:len(gradients)] = gradients
    return tensors, torch.randn(len(gradients) + 3, dtype=torch.float64)


def assert_as_eager(name, ours, eager, dtype):
    """To a few roundings of the largest finite number of each tensor; infinities and NaN in the same places."""
    for what, a, b in zip(("result", *NAMES[name]), ours, eager, strict=True):
        finite = b.nan_to_num(posinf=0, neginf=0).abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * max(finite, 1), equal_nan=True, msg=lambda m: f"{what}: {m}")


of_both = pytest.mark.parametrize("name", (MLP, LSTM))
in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@of_both
@in_both
def test_extreme_gradients(name, dtype):
    """Nothing, the smallest and the largest numbers; then infinities and NaN, too."""
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, 1e30, -1e30, info.max, -info.max, info.tiny, -info.tiny / 8, 1.0, -1.0, 3 * BORDER, -BORDER / 3]
    for gradients in (finite, [*finite, torch.inf, -torch.inf, torch.nan]):
        tensors, weight = small(name, dtype, gradients)
        assert_as_eager(name, run(name, tensors, weight), run(name, tensors, weight, reference), dtype)


@of_both
@in_both
def test_extreme_weights(name, dtype):
    """An infinity or NaN among the weights: nothing of it comes from units or coordinates that are not there, and nothing is lost."""
    for value in (torch.inf, torch.nan):
        for changed in NAMES[name][1:]:
            tensors, weight = small(name, dtype, [3 * BORDER, -BORDER / 3])
            with torch.no_grad():
                tensors[changed].view(-1)[-1] = value
            assert_as_eager(name, run(name, tensors, weight), run(name, tensors, weight, reference), dtype)


@in_both
def test_borders_of_the_channels(dtype):
    """What lies on the border of a clamp has its derivative, a bit further it has none. By hand: weights that let one channel through as it is."""
    eps = reference.coordinate_generator.PREPROCESSING_EPS
    near = torch.tensor(BORDER, dtype=dtype) * (1 + torch.finfo(dtype).eps * torch.arange(-20, 21, dtype=dtype))
    on, above = near[near * math.exp(7) == 1][0].item(), near[near * math.exp(7) > 1][0].item()
    # Some neighbours have the same logarithm: of the middle one, that of another library is the same, too.
    lowest = (near - eps)[((near - eps + eps).log() / 7) == -1]
    lowest = lowest[len(lowest) // 2].item()
    one, ten = torch.ones(1, 1, dtype=dtype), torch.full((1,), 10, dtype=dtype)
    for channel, gradients, expected in ((1, [on, -on, above, -above, 0.0], [math.exp(7), math.exp(7), 0, 0, math.exp(7)]),
                                         (0, [lowest, -lowest, 0.99 * lowest, -0.99 * lowest, 0.0], [math.exp(7) / 7, -math.exp(7) / 7, 0, 0, 0])):
        given = torch.tensor(gradients, dtype=dtype, requires_grad=True)
        weight_1 = torch.eye(2, dtype=dtype)[channel:channel + 1]
        _, ours = run(MLP, dict(zip(NAMES[MLP], (given, weight_1, ten, one, ten, one, ten))), torch.ones(5))
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=dtype), rtol=1e-5 if dtype == torch.float32 else 1e-8, atol=0)


def test_triton_interpreter():
    """A second opinion on the kernels: Triton's interpreter, with numpy's tanh, for it has no libdevice."""
    code = """
import emulation, math, numpy, test_gpu_coordinate_generator as t
import fastmeta.triton, triton.language as tl
from triton.runtime.interpreter import TensorHandle
module = fastmeta.triton.coordinate_mlp.__globals__
module["_tanh"] = lambda x: tl.core.tensor(TensorHandle(numpy.tanh(x.handle.data), x.handle.dtype), x.type)
for case in t.CASES:
    if case.wanted == "all" and math.prod(case.sizes) < 200:  # it is slow
        t.check(case, emulation.InterpretedEmulator, "triton", seeds=(0,))
        print(case, flush=True)
"""
    process = spawn_python("-c", code, environment={"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = finish(process, 0)
    assert output.count("\n") >= 8, output


@of_both
def test_compiles_for_other_targets(name):
    """What the other tests do not compile for: sm_90 and sm_100, and AMD's gfx942."""
    tensors, options = inputs(Case(name, (17, 20) if name == MLP else (2, 17, 20)))
    with emulation.emulated("triton", emulation.CompilingEmulator(90, 100, "gfx942")) as run:
        torch.autograd.grad(getattr(functional, name)(*tensors.values()).sum(), tuple(tensors.values()))
    binaries = [next(kind for kind in ("cubin", "hsaco") if kind in compiled.asm) for compiled in run.compiled]
    assert (binaries.count("cubin"), binaries.count("hsaco")) == (6, 3)
