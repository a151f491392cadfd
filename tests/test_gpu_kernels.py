"""The compiled kernels of the GPU, as nvcc and Triton make them, executed on the PTX machine: against float64, in three orders of blocks and warps.

``test_cosine_attention.py`` runs all of its tests on these kernels too, each in one order. Here is the grid of sizes, options and dtypes for every
compiler and architecture, small enough to be run on every deliberate fault of ``mutations.py``.
"""

import os
import shutil
import subprocess
from typing import NamedTuple

import emulation
import pytest
import torch
from helpers import assert_as_exact_as_eager, example, finish, in_dtype, leaves, result_and_gradients, spawn_python

from fastmeta import _backend, functional, reference

SEEDS = (0, 1, 2)  # orders; the first is that of the numbers
FLOATS = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Case(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int, int]  # B, Q, S, D, C
    dtype: str = "f32"
    normalize: str = "both"
    eps_mode: str = "clamp"
    mask: bool = False
    scale: str = "number"
    form: str = "contiguous"
    wanted: str = "all"  # gradients

    def __str__(self):
        options = [f"{k}={getattr(self, k)}" for k, default in self._field_defaults.items() if getattr(self, k) != default]
        return f"{self.name} {self.sizes} {' '.join(options)}".strip()


L, A = "matching_log_probs", "cosine_attention"
CASES = [
    # one block's episode: one, odd, a whole tile, more queries than a tile; every option
    Case(L, (1, 1, 1, 1, 1)), Case(A, (1, 1, 1, 1, 1)),
    Case(L, (2, 5, 7, 9, 3), mask=True, scale="episode"), Case(A, (2, 5, 7, 9, 3), mask=True, scale="episode"),
    Case(L, (1, 75, 5, 64, 5), scale="tensor"), Case(A, (1, 67, 32, 33, 6), scale="tensor"),
    Case(L, (2, 9, 25, 64, 5), normalize="support", eps_mode="add"), Case(A, (2, 9, 25, 64, 5), normalize="support", eps_mode="sqrt"),
    Case(L, (2, 9, 13, 17, 5), eps_mode="sqrt", mask=True), Case(A, (2, 9, 13, 17, 5), eps_mode="add", mask=True, scale="episode"),
    Case(L, (2, 9, 13, 17, 5), normalize="none"), Case(A, (2, 9, 13, 17, 5), normalize="none"),
    Case(L, (2, 20, 30, 40, 70), "f16", mask=True, scale="episode"), Case(A, (2, 20, 30, 40, 65), "bf16", mask=True, scale="episode"),
    # tiles: supports or features beyond an episode, tails of every kind, tensor cores
    Case(L, (2, 33, 65, 31, 7), mask=True, scale="episode"), Case(A, (2, 33, 65, 31, 7), mask=True, scale="episode"),
    Case(L, (1, 70, 130, 129, 9), "f16", normalize="support", eps_mode="sqrt", scale="tensor"),
    Case(A, (1, 70, 130, 129, 37), "f16", eps_mode="add", scale="tensor"),
    Case(L, (2, 31, 100, 200, 20), "bf16", eps_mode="add", mask=True), Case(A, (2, 31, 100, 200, 66), "bf16", eps_mode="sqrt", mask=True),
    Case(L, (1, 3, 5, 1601, 3)), Case(A, (1, 3, 5, 1601, 150)),
    Case(L, (1, 40, 90, 20, 300), eps_mode="sqrt", scale="tensor"), Case(A, (1, 40, 90, 20, 300), normalize="support", scale="tensor"),
    # few rows on one side, many on the other: the stream is cut into parts
    Case(L, (1, 3, 1100, 8, 4), mask=True, scale="episode"), Case(A, (1, 3, 1100, 8, 4), "f16", mask=True, scale="episode"),
    Case(L, (1, 1100, 3, 130, 3), scale="tensor"), Case(A, (1, 1100, 3, 130, 3), "bf16", scale="tensor"),
    # any strides, and stride 0
    Case(L, (2, 17, 20, 24, 5), mask=True, scale="episode", form="strided"), Case(A, (2, 17, 70, 24, 5), "f16", mask=True, scale="episode", form="strided"),
    Case(L, (2, 17, 70, 24, 5), mask=True, scale="episode", form="expanded"), Case(A, (2, 17, 20, 24, 5), mask=True, form="expanded"),
    # more results in a merge than a warp has lanes, and classes that some part lacks
    Case(A, (1, 5, 1100, 8, 40), mask=True), Case(L, (1, 3, 1100, 8, 300), scale="tensor"),
    # an episode of padding alone, rows of zeros, rows whose squares overflow or vanish, scores far apart
    Case(L, (2, 5, 7, 9, 3), mask=True, form="hard"), Case(A, (2, 5, 7, 9, 3), mask=True, form="hard"),
    Case(L, (2, 9, 70, 33, 5), mask=True, form="hard"), Case(A, (2, 9, 70, 33, 5), mask=True, scale="tensor", form="hard"),
    # one gradient alone
    Case(L, (2, 5, 7, 9, 3), scale="episode", wanted="scale"), Case(L, (1, 40, 150, 9, 3), scale="tensor", wanted="scale"),
    Case(A, (2, 5, 7, 9, 3), scale="episode", wanted="support"), Case(A, (1, 40, 150, 9, 3), scale="tensor", wanted="values"),
    # a gradient that is small beside its terms; no queries
    Case(L, (1, 40, 90, 20, 5), "f16", normalize="none", form="offset"), Case(L, (2, 0, 7, 9, 3)), Case(A, (2, 0, 7, 9, 3)),
    # float64
    Case(L, (2, 19, 15, 33, 5), "f64", mask=True, scale="episode"), Case(A, (2, 35, 40, 70, 5), "f64", mask=True, scale="episode"),
]


def inputs(case: Case):
    """Arguments and keywords of the function, leaves with requires_grad."""
    batch, queries, supports, features, classes = case.sizes
    broadcast = "batch" if case.form != "expanded" else "values only"
    torch.manual_seed(hash(case.sizes) % 2**31)
    args, keywords = example(case.name, broadcast, queries, supports, features, classes, FLOATS[case.dtype], case.mask,
                             case.scale if broadcast == "batch" or case.scale != "episode" else "tensor")
    if broadcast == "batch":  # example() has three episodes
        args = [t[:batch].detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in args]
        keywords = {k: t[:batch].detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) and t.dim() else t for k, t in keywords.items()}
    if case.form == "strided":
        args = [_strided(t) if isinstance(t, torch.Tensor) else t for t in args]
        keywords = {k: _strided(t) if isinstance(t, torch.Tensor) else t for k, t in keywords.items()}
    with torch.no_grad():
        if case.form == "hard":
            for rows in args[:2]:
                rows[:, 0] = 0
                rows[:, 1:3] *= torch.tensor([1e25, 1e-25])[:, None]
            keywords["support_mask"][0] = False
            if case.scale == "number":
                keywords["scale"] = 100.0
        if case.form == "offset":
            args[0].div_(50)
            args[1].add_(50)
    if case.wanted != "all":
        for name, t in [*zip(("query", "support", "values"), args), *keywords.items()]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.requires_grad_(name == case.wanted)
    return tuple(args), keywords


def _strided(t):
    wide = torch.full([2 * n + 1 for n in reversed(t.shape)], 77, dtype=t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)


def check(case: Case, emulator, backend: str, seeds=SEEDS):
    """Result and every gradient against float64 in the first order, and the same bits in the others. Returns the launches of the first."""
    args, keywords = inputs(case)
    options = dict(normalize=case.normalize, eps_mode=case.eps_mode, eps=1e-3 if case.eps_mode == "clamp" else 1.0)
    wide = in_dtype(args, keywords, torch.float64)

    def function(module):
        run = getattr(module, case.name)  # a gradient of any strides, too
        return (lambda *args, **keywords: run(*args, **keywords).mT.contiguous()) if case.form == "strided" else run

    exact = function(reference)(*wide[0], **wide[1], **options)
    weight = torch.randn(exact.shape, dtype=args[0].dtype).double()
    exact = result_and_gradients(function(reference), wide[0], {**wide[1], **options}, weight)
    eager = result_and_gradients(function(reference), args, {**keywords, **options}, weight)
    launches, first = None, None
    for seed in seeds:
        with emulation.emulated(backend, emulator(seed)) as run:
            ours = result_and_gradients(function(functional), args, {**keywords, **options}, weight)
        if first is None:
            first, launches = ours, run.launches
            assert_as_exact_as_eager(ours, eager, exact, str(case))
        for a, b in zip(first, ours, strict=True):
            assert torch.equal(a, b), f"{case}: other bits in the order of seed {seed}"
    assert len(first) == 1 + len(leaves(args, keywords))
    return launches


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nvcc(case):
    if missing := emulation.cuda_is_missing():
        pytest.skip(missing)
    check(case, emulation.CudaEmulator, "cpp")


@pytest.mark.parametrize("architecture", (80, 120))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, architecture):
    if missing := emulation.triton_is_missing():
        pytest.skip(missing)
    check(case, lambda seed: emulation.TritonEmulator(seed, architecture), "triton")


def test_triton_interpreter():
    """A second opinion on the Triton kernels: Triton's interpreter, right for float32 and float16 (and for bfloat16 wrong)."""
    if _backend.missing_triton:
        pytest.skip(_backend.missing_triton)
    code = """
import emulation, math, test_gpu_kernels as t
for case in t.CASES:
    if case.dtype in ("f32", "f16") and math.prod(case.sizes[:4]) < 100_000 and max(case.sizes) < 200:  # it is slow
        t.check(case, emulation.InterpretedEmulator, "triton", seeds=(0,))
        print(case, flush=True)
"""
    process = spawn_python("-c", code, environment={"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = finish(process, 0)
    assert output.count("\n") >= 18, output


@pytest.mark.parametrize("name", (L, A))
def test_triton_compiles_for_other_targets(name):
    """What the other tests do not compile for: sm_100, and AMD's gfx942."""
    if missing := emulation.triton_is_missing():
        pytest.skip(missing)
    case = Case(name, (1, 75, 25, 64, 5), scale="tensor")
    args, keywords = inputs(case)
    with emulation.emulated("triton", emulation.CompilingEmulator(100, "gfx942")) as run:
        result_and_gradients(getattr(functional, name), args, keywords, torch.ones(1, 75, 5))
    binaries = [next(kind for kind in ("cubin", "hsaco") if kind in compiled.asm) for compiled in run.compiled]
    assert binaries.count("cubin") == binaries.count("hsaco") >= 2


def test_cuda_is_built_for_all_targets():
    if (module := emulation.cuda_module()) is None:
        pytest.skip(f"the CUDA kernels are not there ({_backend.missing_cuda})")
    built = module.build_info()["architectures"].split(", ")
    if os.environ.get("FASTMETA_CUDA_ARCHITECTURES"):
        pytest.skip(f"built for {built} only, by FASTMETA_CUDA_ARCHITECTURES")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc, which tells what it can compile for, is not on the PATH")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    assert built == [name for name in ("75", "80", "86", "89", "90", "100", "120") if f"compute_{name}" in known]
