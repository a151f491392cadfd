"""memory_read, lrua_write and lrua_step as nvcc and Triton make them, executed on the PTX machine: against float64 in three orders of blocks and warps.

``test_mann_operations.py`` and ``test_lrua_memory.py`` run all their tests on these kernels too. Here is the grid of sizes and options, small enough to be
run on every deliberate fault of ``mutations.py``.
"""

import subprocess
from typing import NamedTuple

import emulation
import pytest
import torch
from helpers import assert_as_exact_as_eager, finish, spawn_python
from test_mann_operations import call, differentiable_results, step_example, values_and_gradients

from fastmeta import _backend, functional, reference

SEEDS = (0, 1, 2)  # orders; the first is that of the numbers
R, W, S = "memory_read", "lrua_write", "lrua_step"


class Case(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int]  # B, N, M, R
    least_used: str = "per_head"
    before: bool = False  # read_before_write
    eps_mode: str = "sqrt"
    eps: float = 1e-6
    dtype: str = "float32"
    strength: str | None = None  # "number", "tensor"
    state: str = "random"  # "ties": of usage; "hard": rows of zeros, and rows and keys whose squares overflow or vanish
    wanted: str = "all"  # gradients

    def __str__(self):
        options = [f"{k}={getattr(self, k)}" for k, default in self._field_defaults.items() if getattr(self, k) != default]
        return f"{self.name} {self.sizes} {' '.join(options)}".strip()


CASES = [
    # one of everything, odd, the paper's, more heads than a warp takes at a time, one head
    Case(R, (1, 1, 1, 1)), Case(W, (1, 1, 1, 1)), Case(S, (1, 1, 1, 1)),
    Case(R, (3, 7, 5, 2), eps_mode="add", strength="tensor"), Case(W, (3, 7, 5, 2), "shared"), Case(S, (3, 7, 5, 2), "shared", True, "add", 1e-8, strength="tensor"),
    Case(R, (2, 128, 40, 4), strength="number"), Case(W, (2, 128, 40, 4)), Case(S, (2, 128, 40, 4)),
    Case(S, (2, 128, 40, 4), "shared", True, "add", 1e-8),
    Case(R, (1, 33, 17, 5), eps_mode="clamp", eps=1e-3), Case(W, (1, 33, 17, 5), "shared"), Case(S, (1, 33, 17, 5), "per_head", True, "clamp", 1e-3),
    Case(S, (2, 40, 20, 1), "shared", False, "add", 1e-8, strength="number"), Case(S, (1, 16, 8, 11), "shared", strength="tensor"),
    # many slots, wide slots: more than is kept on chip
    Case(R, (1, 1500, 7, 3), strength="tensor"), Case(W, (1, 1500, 7, 3), "shared"), Case(S, (1, 1500, 7, 3), "shared", True, "add", 1e-8),
    Case(R, (2, 200, 130, 2), eps_mode="clamp", eps=1e-3), Case(W, (2, 200, 130, 5)), Case(S, (2, 200, 130, 5), strength="tensor"),
    Case(S, (1, 20, 700, 2), "per_head", True),
    # ties of usage, rows of zeros, rows and keys out of range
    Case(W, (2, 70, 3, 4), state="ties"), Case(S, (2, 70, 3, 4), "shared", state="ties"),
    Case(R, (2, 9, 6, 3), state="hard"), Case(S, (2, 9, 6, 3), "shared", True, "add", 1e-8, state="hard"),
    Case(S, (2, 9, 6, 3), eps_mode="clamp", eps=1e-3, state="hard"),
    # one gradient alone
    *(Case(S, (2, 9, 6, 3), wanted=name, strength="tensor") for name in ("memory", "read_weights", "keys", "add", "gate", "strength")),
    Case(R, (1, 1500, 7, 3), wanted="keys"), Case(W, (1, 1500, 7, 3), wanted="gate"),
    # float64
    Case(R, (2, 9, 6, 3), dtype="float64", strength="tensor"), Case(S, (1, 300, 40, 4), "shared", True, "add", 1e-8, "float64"),
    Case(S, (2, 128, 40, 4), dtype="float64"),
]


def inputs(case: Case):
    """Tensors by name, and options."""
    torch.manual_seed(hash(case.sizes) % 2**31)
    tensors, options = step_example(case.name, *case.sizes, getattr(torch, case.dtype), case.strength)
    if case.name != R:
        options["least_used"] = case.least_used
    if case.name == S:
        options |= dict(read_before_write=case.before, usage_decay=0.9)
    if case.name != W:
        options |= dict(eps_mode=case.eps_mode, eps=case.eps)
    if case.state == "ties":
        tensors["usage"] = tensors["usage"] // 20
        tensors["usage"][:, 1::2] *= torch.where(tensors["usage"][:, 1::2] == 0, -1, 1)  # both zeros are the same
    if case.state == "hard":
        with torch.no_grad():
            tensors["memory"][:, 0] = 0
            tensors["memory"][:, 1:3] *= torch.tensor([1e15, 1e-15])[:, None]
            tensors["keys"][:, 1:3] *= torch.tensor([1e-15, 1e15])[:, None]
    if case.wanted != "all":
        tensors = {name: t.detach().requires_grad_(name == case.wanted) for name, t in tensors.items()}
    return tensors, options


def check(case: Case, emulator, backend: str, seeds=SEEDS):
    return check_on_machine(str(case), case.name, *inputs(case), emulator, backend, seeds)


def check_on_machine(what: str, name: str, tensors, options, emulator, backend: str, seeds):
    """Results and every gradient against float64 in the first order, and the same bits in the others. Returns the calls of the first."""
    wide = {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    weights = [torch.randn_like(r) for r in differentiable_results(name, call(reference, name, wide, options))]
    eager, exact = (values_and_gradients(reference, name, t, options, weights) for t in (tensors, wide))
    first = calls = None
    for seed in seeds:
        with emulation.emulated(backend, emulator(seed)) as run:
            ours = values_and_gradients(functional, name, tensors, options, weights)
        if first is None:
            first, calls = ours, run.calls
            assert_as_exact_as_eager(ours, eager, exact, what)
        for a, b in zip(first, ours, strict=True):
            assert torch.equal(a, b), f"{what}: other bits in the order of seed {seed}"
    return calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nvcc(case):
    if missing := emulation.cuda_is_missing():
        pytest.skip(missing)
    forward, backward = check(case, emulation.CudaEmulator, "cpp")
    assert len(forward.launches) == len(backward.launches) == 1 and not forward.computations + backward.computations


# Without tl.dot the architectures have nearly the same PTX: the second one is tried on the usual sizes.
@pytest.mark.parametrize("case, architecture", [*((case, 80) for case in CASES), *((case, 120) for case in CASES if case.sizes == (2, 128, 40, 4))], ids=str)
def test_triton(case, architecture):
    if missing := emulation.triton_is_missing():
        pytest.skip(missing)
    forward, backward = check(case, lambda seed: emulation.TritonEmulator(seed, architecture), "triton")
    assert len(forward.launches) == len(backward.launches) == 1 and not forward.computations + backward.computations


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compiler", ["nvcc", "triton"])
def test_slots_are_those_of_the_cpu(compiler, dtype):
    """The same usage, the same slots, to the bit of the write weights: ties, NaN, infinities, both zeros."""
    if missing := emulation.cuda_is_missing() if compiler == "nvcc" else emulation.triton_is_missing():
        pytest.skip(missing)
    usage = torch.randint(4, (6, 70)).to(getattr(torch, dtype))
    usage[0] = 0
    usage[1, ::2] = -0.0
    usage[2, 5:60] = torch.nan
    usage[3, ::3], usage[3, 1::3] = torch.inf, -torch.inf
    usage[4] = torch.rand(70).round(decimals=1)
    memory, weights, add = torch.ones(6, 70, 3).to(usage), torch.zeros(6, 5, 70).to(usage), torch.zeros(6, 5, 3).to(usage)
    for least_used in (0, 1):
        arguments = memory, usage, weights, add, torch.zeros(6, 5).to(usage), least_used
        run = emulation.CudaEmulator() if compiler == "nvcc" else emulation.TritonEmulator()
        for ours, cpu in zip(run("lrua_write", *arguments), torch.ops.fastmeta.lrua_write.default(*arguments)):
            assert torch.equal(ours, cpu)


def test_triton_interpreter():
    """A second opinion on the Triton kernels: Triton's interpreter."""
    if _backend.missing_triton:
        pytest.skip(_backend.missing_triton)
    code = """
import emulation, math, test_gpu_lrua_memory as t
for case in t.CASES:
    if math.prod(case.sizes) < 5_000:  # it is slow
        t.check(case, emulation.InterpretedEmulator, "triton", seeds=(0,))
        print(case, flush=True)
"""
    process = spawn_python("-c", code, environment={"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = finish(process, 0)
    assert output.count("\n") >= 12, output


@pytest.mark.parametrize("name", (R, W, S))
def test_triton_compiles_for_other_targets(name):
    """What the other tests do not compile for: sm_90 and sm_100, and AMD's gfx942."""
    if missing := emulation.triton_is_missing():
        pytest.skip(missing)
    tensors, options = inputs(Case(name, (2, 128, 40, 4)))
    with emulation.emulated("triton", emulation.CompilingEmulator(90, 100, "gfx942")) as run:
        results = differentiable_results(name, call(functional, name, tensors, options))
        torch.autograd.grad(sum(r.sum() for r in results), [t for t in tensors.values() if t.requires_grad])
    binaries = [next(kind for kind in ("cubin", "hsaco") if kind in compiled.asm) for compiled in run.compiled]
    assert (binaries.count("cubin"), binaries.count("hsaco")) == (4, 2)
