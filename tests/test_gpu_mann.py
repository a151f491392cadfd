"""mann_episode as nvcc makes it, executed on the PTX machine: against float64 in three orders of blocks and warps, and its choices of slots against the CPU's.

``test_mann_operations.py`` and ``test_lrua_memory.py`` run all their tests on these kernels too. Here is the grid of sizes and options, small enough to be
run on every deliberate fault of ``mutations.py``.
"""

from typing import NamedTuple

import emulation
import pytest
import torch
from test_gpu_lrua_memory import SEEDS, check_on_machine
from test_mann_operations import episode_example

from fastmeta import reference
from fastmeta.reference.cosine_attention import EPS_MODES
from fastmeta.reference.lrua_memory import LEAST_USED

PRESETS = {"tristandeleu": dict(least_used="per_head", read_before_write=False, eps_mode="sqrt", eps=1e-6),
           "snowkylin": dict(least_used="shared", read_before_write=True, eps_mode="add", eps=1e-8),
           "paper": dict(least_used="shared", read_before_write=False, eps_mode="sqrt", eps=1e-6),
           "clamp": dict(least_used="per_head", read_before_write=True, eps_mode="clamp", eps=1e-3)}


class Case(NamedTuple):
    name: str  # of the options
    sizes: tuple[int, int, int, int, int, int, int]  # T, B, I, H, N, M, R
    dtype: str = "float32"
    strength: float | str | None = None
    own_add: bool = True
    lengths: tuple[int, ...] | None = None
    state: str = "random"  # "fresh": as an episode begins; "hard": rows of zeros, and rows whose squares overflow or vanish
    wanted: str = "all"  # gradients

    def __str__(self):
        options = [f"{k}={getattr(self, k)}" for k, default in self._field_defaults.items() if getattr(self, k) != default]
        return f"{self.name} {self.sizes} {' '.join(options)}".strip()


CASES = [
    # one of everything; odd sizes; segments of checkpoints whole, begun and just passed
    Case("tristandeleu", (1, 1, 1, 1, 1, 1, 1)), Case("snowkylin", (3, 2, 3, 5, 4, 2, 1)), Case("paper", (8, 2, 5, 7, 6, 3, 2), own_add=False),
    Case("clamp", (9, 3, 5, 7, 6, 3, 2), strength="learned"), Case("snowkylin", (17, 2, 4, 16, 20, 9, 5), strength=2.5),
    # more steps than slots: every slot is used again
    Case("tristandeleu", (26, 2, 3, 8, 5, 4, 4), strength="learned"), Case("snowkylin", (26, 2, 3, 8, 5, 4, 4), own_add=False, strength="learned"),
    Case("paper", (20, 1, 3, 8, 5, 4, 1), own_add=False),
    # fresh memory: all usages tie
    Case("tristandeleu", (12, 2, 6, 9, 33, 17, 4), state="fresh"), Case("snowkylin", (12, 2, 6, 9, 33, 17, 4), state="fresh", strength="learned"),
    Case("paper", (12, 2, 6, 9, 33, 17, 4), state="fresh", own_add=False),
    # padding: no step at all, one, a whole segment, all
    Case("tristandeleu", (17, 4, 5, 7, 6, 3, 2), lengths=(0, 1, 8, 17)), Case("snowkylin", (17, 4, 5, 7, 6, 3, 2), lengths=(9, 16, 0, 1), strength="learned"),
    # the sizes of the paper; more hidden numbers than threads; a memory or heads too large for a block
    Case("snowkylin", (3, 1, 40, 200, 128, 40, 4)), Case("tristandeleu", (3, 1, 40, 200, 128, 40, 4), strength="learned"),
    Case("tristandeleu", (2, 1, 3, 600, 9, 2, 1)), Case("snowkylin", (10, 2, 3, 6, 200, 130, 5)), Case("paper", (9, 2, 3, 6, 1500, 7, 2), own_add=False),
    Case("tristandeleu", (2, 1, 3, 30, 12, 40, 11)),
    # scores so far apart that exponentials about another warp's largest one overflow
    Case("tristandeleu", (1, 2, 6, 9, 33, 17, 4), strength=300.0),
    # rows of zeros, and rows out of range
    Case("tristandeleu", (3, 2, 3, 5, 9, 6, 2), state="hard"), Case("snowkylin", (3, 2, 3, 5, 9, 6, 2), state="hard"),
    Case("clamp", (3, 2, 3, 5, 9, 6, 2), state="hard", strength="learned"),
    # one gradient alone
    Case("snowkylin", (5, 2, 3, 5, 9, 6, 2), wanted="inputs"), Case("snowkylin", (5, 2, 3, 5, 9, 6, 2), wanted="head_bias"),
    Case("snowkylin", (5, 2, 3, 5, 9, 6, 2), wanted="bias"),
    # float64
    Case("snowkylin", (10, 2, 5, 7, 6, 3, 2), "float64", strength="learned"), Case("tristandeleu", (9, 1, 3, 6, 128, 40, 4), "float64"),
    Case("clamp", (9, 1, 3, 6, 300, 40, 4), "float64"),
]


def inputs(case: Case):
    """Tensors by name, and options."""
    torch.manual_seed(hash(case.sizes) % 2**31)
    steps, batch, features, hidden, slots, width, heads = case.sizes
    dtype = getattr(torch, case.dtype)
    tensors, options = episode_example(steps, batch, features, hidden, slots, width, heads, dtype, case.own_add, case.strength)
    if hidden > 50:  # sums of so many would saturate every gate
        for name in ("weight_ih", "weight_hh", "head_weight"):
            tensors[name] = (tensors[name].detach() * (8 / hidden**0.5)).requires_grad_()
    if case.state == "fresh":
        fresh = reference.LRUAMemory(slots, width, heads).initial_state(batch, dtype=dtype)
        tensors |= {"memory": fresh.memory.requires_grad_(), "usage": fresh.usage, "read_weights": fresh.read_weights.requires_grad_()}
    if case.state == "hard":
        with torch.no_grad():
            tensors["memory"][:, 0] = 0
            tensors["memory"][:, 1:3] *= torch.tensor([1e25, 1e-25])[:, None]
    if case.wanted != "all":
        tensors = {name: t.detach().requires_grad_(name == case.wanted) for name, t in tensors.items()}
    options |= PRESETS[case.name]
    if case.lengths is not None:
        options["lengths"] = torch.tensor(case.lengths)
    return tensors, options


def check(case: Case, emulator, backend: str, seeds=SEEDS):
    return check_on_machine(str(case), "mann_episode", *inputs(case), emulator, backend, seeds)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nvcc(case):
    if missing := emulation.cuda_is_missing():
        pytest.skip(missing)
    forward, backward = check(case, emulation.CudaEmulator, "cpp")
    assert len(forward.launches) + forward.computations <= 2
    assert len(backward.launches) + backward.computations <= 5


@pytest.mark.parametrize("name", ["tristandeleu", "snowkylin", "paper"])
@pytest.mark.parametrize("state", ["fresh", "random"])
def test_slots_are_those_of_the_cpu(name, state):
    """Which slots are the least used, at each step of episodes that use every slot many times; in a fresh memory they tie."""
    if missing := emulation.cuda_is_missing():
        pytest.skip(missing)
    tensors, options = inputs(Case(name, (70, 3, 6, 9, 16, 5, 3), "float64", state=state, own_add=name != "paper"))
    t = {key: x.detach() for key, x in tensors.items()}
    least_used, eps_mode = LEAST_USED.index(options["least_used"]), EPS_MODES.index(options["eps_mode"])
    arguments = (t["inputs"], torch.cat([t["weight_ih"], t["weight_hh"]], 1), t["bias"], t["head_weight"], t["head_bias"],
                 *(t[key] for key in reference.MANNState._fields), None, options["own_add"], False, 1.0, least_used, options["read_before_write"],
                 eps_mode, options["eps"], 0.95, True)
    ours, cpu = (run(*arguments)[8] for run in (lambda *a: emulation.CudaEmulator()("mann_episode", *a), torch.ops.fastmeta.mann_episode.default))
    assert torch.equal(ours, cpu)
    assert ours.unique().tolist() == list(range(16))
