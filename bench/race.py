"""Measuring: peers timed in turns within one process, and the peak memory of a call in a process of its own.

A *race* is one operation at one shape, forward or forward and backward, run by several peers on the same input. What is raced is
written in the ``bench_*.py`` files; pytest meets it in ``conftest.py``.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch
from torch import Tensor


class Absent(Exception):
    """Raised by a peer's builder where the peer does not take part; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A peer ready to run: ``function(*inputs)``; the gradients of ``inputs`` and ``parameters`` are its backward."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()

    def call(self, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed: the forward without a graph, or a fresh graph and the gradients for one fixed random output gradient."""
        if not backward:
            inputs = tuple(x.detach() for x in self.inputs)

            def forward():
                with torch.no_grad():
                    return (self.function(*inputs),)

            return forward

        inputs = tuple(x.detach().requires_grad_() for x in self.inputs)
        out = self.function(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
        del out

        def forward_backward():
            out = self.function(*inputs)
            return (out.detach(), *torch.autograd.grad(out, inputs + self.parameters, grad))

        return forward_backward


@dataclass(frozen=True)
class Race:
    """``build(operation, shape, peer, dtype) -> Entry`` (or raises :class:`Absent`); a module-level function, so that a race can be pickled.
    It makes its tensors on torch's default device, which is ``device``.

    ``truth`` names, for a peer, the peer that computes the same function and is to be trusted in float64; ``mark`` is how many times
    faster than the best peer the first peer has to be. ``size`` is roughly how many multiplications a call takes. ``tolerance`` is the
    largest error of a float32 peer against float64, relative to the largest value.
    """

    operation: str
    axes: str
    shape: tuple[int, ...]
    backward: bool
    peers: tuple[str, ...]
    build: Callable[[str, tuple[int, ...], str, torch.dtype], Entry]
    truth: Callable[[str], str]
    size: int
    mark: float | None = None
    device: str = "cpu"
    tolerance: float = 1e-4

    def call(self, peer: str, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
        with torch.device(self.device):
            return self.build(self.operation, self.shape, peer, dtype).call(self.backward)

    @property
    def name(self) -> str:
        shape = ", ".join(f"{axis}={n}" for axis, n in zip(self.axes, self.shape))
        return f"{self.operation} {'forward+backward' if self.backward else 'forward'} ({shape}){'' if self.device == 'cpu' else f' on {self.device}'}"


@dataclass
class Result:
    """One peer's part in a race: seconds of each round (``iterations`` calls a round), or why there is none."""

    iterations: int = 1
    rounds: list[float] = field(default_factory=list)
    error: float | None = None
    absent: str | None = None
    failure: str | None = None


def relative_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest error over outputs and gradients, each relative to the largest value of its tensor; infinite where not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def run(race: Race, seconds: float, min_rounds: int, max_rounds: int = 200) -> dict[str, Result]:
    """Check every peer against float64, then time those that passed, in turns, for about ``seconds``."""
    torch.compiler.reset()
    results, calls, truths = {}, {}, {}
    for peer in race.peers:
        result = results[peer] = Result()
        try:
            call = race.call(peer)
        except Absent as reason:
            result.absent = str(reason)
            continue
        truth = race.truth(peer)
        if truth not in truths:
            truths[truth] = race.call(truth, torch.float64)()
        result.error = relative_error(call(), truths[truth])
        if result.error <= race.tolerance:
            calls[peer] = call if race.device == "cpu" else captured(call)
        else:
            result.failure = f"wrong by {result.error:.1e} against float64 (at most {race.tolerance:.0e} is right)"
    truths.clear()
    for peer, (iterations, rounds) in take_turns(calls, seconds, min_rounds, max_rounds, timed if race.device == "cpu" else timed_on_gpu).items():
        results[peer].iterations, results[peer].rounds = iterations, rounds
    return results


def timed(call: Callable[[], object], iterations: int) -> float:
    """Seconds of some calls."""
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return time.perf_counter() - start


def timed_on_gpu(call: Callable[[], object], iterations: int) -> float:
    """The same between two events of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(iterations):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The launches of a call as a CUDA graph: what is timed is the device, and no Python. This has not been run: there was no GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)


def take_turns(calls: dict[str, Callable[[], object]], seconds: float, min_rounds: int, max_rounds: int,
               timed: Callable[[Callable[[], object], int], float] = timed) -> dict[str, tuple[int, list[float]]]:
    """Time ``calls`` round-robin: ``{name: (calls a round, [seconds of each round])}``.

    In turns, so that whatever else the machine does meets all of them alike. A short call is repeated within its turn, about 4 ms,
    after one that is not counted: what is measured is the call, not the caches as the peer before left them. Every round starts with
    another peer, so that nobody is always behind the same one.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        once = {}
        for name, call in calls.items():
            call()
            once[name] = timed(call, 1)
            if once[name] < 0.02:  # one reading of a short call may be an accident
                once[name] = min(timed(call, 1) for _ in range(5))
        iterations = {name: max(1, round(4e-3 / t)) for name, t in once.items()}
        cost = sum(once[name] * n for name, n in iterations.items())
        rounds = min(max_rounds, max(min_rounds, int(seconds / cost))) if calls else 0
        times = {name: [] for name in calls}
        names = list(calls)
        for i in range(rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                if iterations[name] > 1:
                    calls[name]()
                times[name].append(timed(calls[name], iterations[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: (iterations[name], times[name]) for name in calls}


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def _peak_growth(race: Race, peer: str, threads: int) -> int:
    torch.set_num_threads(threads)
    call = race.call(peer)
    call()  # compiles, starts the threads, makes what is made once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages go back, so that what the call needs shows as growth
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forget the peak so far
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


class Memory:
    """Peak memory of a call: growth of the resident set during it, results included, in a fresh process for each peer."""

    def __init__(self):
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch"])  # imported once; no threads are started before the fork
        self.pool = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)

    def peak(self, race: Race, peer: str) -> int | None:
        """Bytes; None where the system does not tell (no Linux /proc)."""
        try:
            return self.pool.submit(_peak_growth, race, peer, torch.get_num_threads()).result()
        except OSError:
            return None

    def close(self):
        self.pool.shutdown()
