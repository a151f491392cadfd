"""What the GPU kernels of MANN cost, counted, and an estimate of the time of an episode: no GPU has run them.

    python bench/gpu_costs_mann.py [--json FILE]

prints Markdown. It counts as gpu_costs.py does, with the machine of ``tests/ptx``, in float32: episodes in CUDA C++, and steps of the memory in
Triton too. A training step's worth: the forward saves what the backward needs, all gradients are wanted. Options are those of the default preset,
``snowkylin``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import emulation  # noqa: E402
from gpu_costs import BACKENDS, DIRECTIONS, SECTOR, Launch, Launches, _bytes, _kernels_of, _of_kernels, _table  # noqa: E402

from fastmeta import reference, schemas  # noqa: E402
from fastmeta.reference.cosine_attention import EPS_MODES  # noqa: E402
from fastmeta.reference.lrua_memory import LEAST_USED  # noqa: E402

EPISODES = [(50, 1, 405, 200, 128, 40, 4), (50, 16, 405, 200, 128, 40, 4), (75, 16, 415, 200, 128, 40, 4), (50, 16, 405, 200, 1024, 64, 4)]
STEPS = [(1, 128, 40, 4), (16, 128, 40, 4), (16, 1024, 64, 4)]  # B, N, M, R
OPTIONS = (LEAST_USED.index("shared"), True, EPS_MODES.index("add"), 1e-8)  # least_used, read_before_write, eps_mode, eps
WEIGHTS = ("weight", "head_weight")  # what every step of an episode reads


# ---- the calls ---------------------------------------------------------------------------------------------------------------------------


def state_of(batch: int, hidden: int, slots: int, width: int, heads: int, device: str = "cpu") -> reference.MANNState:
    memory = reference.LRUAMemory(slots, width, heads).initial_state(batch, device=device)
    zeros = [torch.zeros(batch, n, device=device) for n in (hidden, hidden)]
    return reference.MANNState(*zeros, torch.zeros(batch, heads, width, device=device), memory.read_weights, memory.usage, memory.memory)


def episode_example(shape, batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of ``mann_episode`` by name, for ``batch`` episodes, with weights of the size that they begin with."""
    steps, _, inputs, hidden, slots, width, heads = shape
    generator = torch.Generator().manual_seed(0)
    rows = heads * (2 * width + 1)

    def uniform(*sizes):
        return ((torch.rand(*sizes, generator=generator) * 2 - 1) * hidden**-0.5).to(device)
    return {"inputs": torch.rand(steps, batch, inputs, generator=generator).to(device), "weight": uniform(4 * hidden, inputs + heads * width + hidden),
            "bias": uniform(4 * hidden), "head_weight": uniform(rows, hidden), "head_bias": uniform(rows),
            **state_of(batch, hidden, slots, width, heads, device)._asdict()}


def step_example(shape, batch: int) -> dict[str, Tensor]:
    _, slots, width, heads = shape
    generator = torch.Generator().manual_seed(0)
    return {"memory": torch.randn(batch, slots, width, generator=generator), "usage": torch.rand(batch, slots, generator=generator),
            "read_weights": torch.rand(batch, heads, slots, generator=generator).softmax(-1), "keys": torch.randn(batch, heads, width, generator=generator),
            "add": torch.randn(batch, heads, width, generator=generator), "gate": torch.rand(batch, heads, generator=generator)}


def arguments_of(operation: str, tensors: dict[str, Tensor]) -> tuple:
    least_used, before, eps_mode, eps = OPTIONS
    if operation == "mann_episode":
        return *tensors.values(), None, True, False, 1.0, least_used, before, eps_mode, eps, 0.95
    return *tensors.values(), None, 1.0, least_used, before, eps_mode, eps, 0.95


def call(run, operation: str, tensors: dict[str, Tensor]):
    """``run(name, *arguments) -> results`` forward and backward. Yields the arguments and results of either."""
    arguments = arguments_of(operation, tensors)
    described = getattr(schemas, operation)
    saving = (True,) if described.saves else ()
    results = run(operation, *arguments, *saving)
    yield arguments, results
    needs = sum(1 << k for k, position in enumerate(described.gradients) if arguments[position] is not None)
    backward = (*(torch.ones_like(results[i]) for i in described.differentiable), needs, *arguments, *results)
    yield backward, run(operation + "_backward", *backward)


def fewest_bytes(operation: str, direction: str, tensors: dict[str, Tensor], results) -> int:
    """Of global memory, by the kernel of the operation alone: whatever it needs read once, whatever it gives written once. Without the weights of the
    recurrence, and without what the products of the library read and write for themselves.

    Of an episode forward: inputs (they go to the tape), their product with the weights, state and biases; outputs, state, tape, slots,
    checkpoints. Backward: gradients of outputs and state; of the tape all but what entered the controller; slots, checkpoints, the first cell and
    read weights; gradients of the gates and heads of all steps, and of the state.
    """
    if operation != "mann_episode":
        if direction == "forward":
            return sum(map(_bytes, (*tensors.values(), *results)))
        read, memory, usage, weights = results
        # Given: what the forward was given, its memory and read weights, and a gradient of all but the usage; made: a gradient of all but the usage.
        given = sum(map(_bytes, tensors.values())) + sum(map(_bytes, (memory, weights))) + sum(map(_bytes, (read, memory, weights)))
        return given + sum(_bytes(t) for name, t in tensors.items() if name != "usage")
    outputs, *state, tape, slots, checkpoints = results
    steps, batch = outputs.shape[:2]
    gates = steps * batch * tensors["bias"].numel() * 4
    if direction == "forward":
        given = sum(_bytes(t) for name, t in tensors.items() if name not in WEIGHTS)
        return given + gates + sum(map(_bytes, results))
    usage = _bytes(tensors["usage"])
    entering = steps * batch * tensors["weight"].shape[1] * 4
    heads = steps * batch * tensors["head_bias"].numel() * 4
    given = _bytes(outputs) + sum(map(_bytes, state)) - usage + _bytes(tape) - entering + sum(map(_bytes, (slots, checkpoints)))
    return given + _bytes(tensors["cell"]) + _bytes(tensors["read_weights"]) + gates + heads + sum(map(_bytes, state)) - usage


# ---- costs -------------------------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """One call in one direction. All but the first two numbers are of the first launch, which does the work. Bytes are of global memory, reads and
    writes together."""

    launches: tuple[Launch, ...]
    products: int  # of the library
    fewest: int
    dram: int  # distinct sectors, without the weights
    requested: int  # by threads, without the weights
    weights: int  # requested of the weights: from L2
    instructions: int  # of threads
    transactions: int  # of shared memory
    ideal_transactions: int


def plan(backend, operation: str, tensors: dict[str, Tensor]) -> list[list[Launch]]:
    """What is launched forward and what backward; nothing runs."""
    run, found = backend(), []
    for _ in call(run, operation, tensors):
        found.append(run.planned)
        run.planned = []
    return found


def costs(backend, operation: str, shape) -> dict[str, Cost]:
    """``{direction: Cost}``. An episode is a block, so that one is executed for all, and what it costs is multiplied; but the weights are the same."""
    batch = shape[1 if operation == "mann_episode" else 0]
    make = episode_example if operation == "mann_episode" else step_example
    plans = plan(backend, operation, make(shape, batch))
    tensors, emulator, found = make(shape, 1), backend.emulator(), {}
    for direction, launches, (given, results) in zip(DIRECTIONS, plans, call(emulator, operation, tensors)):
        run = emulator.calls.pop()
        if direction == "forward":
            forward = results
        weights = {f"argument {i}" for i, t in enumerate(given) if any(t is tensors[name] for name in WEIGHTS if name in tensors)}
        r = run.launches[0].report
        rest = [b for name, b in r.buffers.items() if name not in weights]
        counts = (fewest_bytes(operation, direction, tensors, forward), SECTOR * sum(b.unique_sectors_read + b.unique_sectors_written for b in rest),
                  sum(b.read + b.written for b in rest), sum(r.buffers[name].read for name in weights), r.instructions, r.shared_transactions,
                  r.shared_ideal_transactions)
        found[direction] = Cost(tuple(launches), run.computations, *(n * batch for n in counts))
    return found


def eager_launches(shape) -> dict[str, Launches]:
    """What PyTorch launches for an episode: the lean eager loop that bench_mann.py races against, on tensors without contents."""
    from bench_mann import eager_episode

    t = episode_example(shape, shape[1], "meta")
    weights = (*t["weight"].split([shape[2], t["weight"].shape[1] - shape[2]], 1), t["bias"], t["head_weight"], t["head_bias"])
    state = tuple(t[name] for name in reference.MANNState._fields)
    leaves = [x.requires_grad_() for x in (t["inputs"], *(w.detach() for w in weights), *(x for x in state if x is not t["usage"]))]
    with Launches() as forward:
        outputs = eager_episode(leaves[0], state, *leaves[1:6])
    with Launches() as backward:
        torch.autograd.grad(outputs, leaves, torch.empty_like(outputs))
    return dict(zip(DIRECTIONS, (forward, backward)))


# ---- an estimate ---------------------------------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """An H100 SXM, and what we assume of it."""

    clock: float = 1.7e9  # Hz under load
    processors: int = 132
    l2_per_processor: float = 64  # bytes a clock that one processor gets from L2
    l2: float = 5.5e12  # bytes a second in all
    dram: float = 3.35e12  # bytes a second
    issue: float = 128  # instructions of threads a clock and processor: all four schedulers busy
    phase: float = 600  # clocks of latency between two barriers that nothing hides: a load or two, sums, the barrier
    launch: float = 5e-6  # seconds from Python
    flops: float = 40e12  # of the library's products in float32


PHASES = {"forward": 6, "backward": 8}  # barriers of a step
ASSUMPTIONS = """Steps depend on each other, so a block takes the time of its T steps: what it asks of L2, weights and all, or its instructions, whichever
is longer, and the latency of each phase, which nothing hides. Instructions are those of PTX, of which ptxas leaves fewer. Blocks run side by side, one
on a processor. Then DRAM, launches and the library's products, one after the other."""


def estimate(shape, direction: str, cost: Cost, device: Device = Device()) -> dict[str, float]:
    """Seconds of a batch of episodes by :data:`ASSUMPTIONS`, and what they are made of."""
    steps, batch, inputs, hidden, *_ = shape
    waves = -(-batch // device.processors)
    asked = cost.weights + cost.requested
    from_l2 = max(asked / batch / (device.l2_per_processor * device.clock), asked / waves / device.l2)
    issued = cost.instructions / batch / (device.issue * device.clock)
    latency = steps * PHASES[direction] * device.phase / device.clock
    products = 2 * steps * batch * 4 * hidden * inputs * (1 if direction == "forward" else 3) / device.flops
    return {"L2": waves * from_l2, "instructions": waves * issued, "latency": waves * latency, "DRAM": cost.dram / device.dram,
            "launches": (len(cost.launches) + cost.products) * device.launch, "products": products,
            "total": waves * (max(from_l2, issued) + latency) + cost.dram / device.dram + products + (len(cost.launches) + cost.products) * device.launch}


# ---- tables ------------------------------------------------------------------------------------------------------------------------------

HEADING = """# Costs of the GPU kernels of MANN, counted

**No GPU has run this.** float32, PTX of sm_80, executed by an emulator that counts. Episodes are (T, B, I, H, N, M, R), steps (B, N, M, R).

* *launches*: kernels of ours + products of the library; *eager*: operations of PyTorch that launch at least one kernel. What follows is of the first launch, which
  does the work; the second one of an episode's backward reads the gradients of gates and heads once more, and sums them to those of the biases.
* *fewest*: bytes that the kernel must read and write once; *DRAM*: distinct 32-byte sectors it touches; *requested*: what its threads ask for; *eager*: bytes
  of the inputs and outputs of all operations of PyTorch. All over the fewest. Without the recurrent weights: *weights* are what all steps of all episodes read of them, from L2.
* *banks*: transactions of shared memory over the fewest without bank conflicts. *instructions*: of threads."""


def _rows(found, eager):
    for backend, operation, shape, by_direction in found:
        for direction, c in by_direction.items():
            peer = eager.get((shape, direction)) if operation == "mann_episode" else None
            yield (f"{backend} `{operation}` {shape}", direction, f"{len(c.launches)} + {c.products}", len(peer.names) if peer else "", f"{c.fewest / 1e6:.2f}",
                   f"{c.dram / c.fewest:.2f}x", f"{c.requested / c.fewest:.2f}x", f"{peer.bytes / c.fewest:.0f}x" if peer else "",
                   f"{c.weights / 1e6:,.0f}" if c.weights else "", f"{c.transactions / c.ideal_transactions:.2f}x" if c.ideal_transactions else "", f"{c.instructions / 1e6:,.0f}")


def _estimates(found, eager):
    for _, operation, shape, by_direction in found:
        if operation != "mann_episode":
            continue
        for direction, c in by_direction.items():
            e, launches = estimate(shape, direction, c), len(eager[shape, direction].names)
            yield (f"{shape}", direction, *(f"{e[part] * 1e3:.2f}" for part in ("L2", "instructions", "latency", "DRAM", "launches", "total")),
                   f"{launches * Device().launch * 1e3:.0f}")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args(arguments)
    print(HEADING + "\n")
    if missing := [f"{backend.title}: {reason}" for backend in BACKENDS.values() if (reason := backend.missing())]:
        print("Not counted:", *missing)
        return 1
    cuda = BACKENDS["cuda"]
    found = [(cuda.title, "mann_episode", shape, costs(cuda, "mann_episode", shape)) for shape in EPISODES]
    found += [(backend.title, "lrua_step", shape, costs(backend, "lrua_step", shape)) for backend in BACKENDS.values() for shape in STEPS]
    eager = {(shape, direction): launches for shape in EPISODES for direction, launches in eager_launches(shape).items()}
    print(_table(("", "", "launches", "eager", "fewest MB", "DRAM", "requested", "eager", "weights MB", "banks", "million instructions"), _rows(found, eager)))
    print("\n## An estimate of time, in milliseconds\n")
    print(f"From these counts and {Device()}. {ASSUMPTIONS}\n")
    print(_table(("(T, B, I, H, N, M, R)", "", "L2", "instructions", "latency", "DRAM", "launches", "in all", "eager's launches alone"), _estimates(found, eager)))
    kernels = _kernels_of(launch for *_, by_direction in found for c in by_direction.values() for launch in c.launches)
    print("\n" + _of_kernels(kernels))
    if options.json:
        options.json.write_text(json.dumps([
            {"backend": backend, "operation": operation, "shape": shape, "direction": direction, **c._asdict(),
             "launches": [launch.kernel for launch in c.launches]}
            for backend, operation, shape, by_direction in found for direction, c in by_direction.items()], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
