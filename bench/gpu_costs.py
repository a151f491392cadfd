"""What the GPU kernels of cosine_attention and matching_log_probs cost, counted: no GPU has run them.

    python bench/gpu_costs.py [--backend cuda | triton | all] [--dtype float32] [--large] [--json FILE]

prints Markdown. The PTX that nvcc and Triton make for sm_80 is executed on the machine of ``tests/ptx``, which counts; ptxas tells the
registers. Of eager PyTorch, the ``eager`` of bench_cosine_attention.py, the operations are counted that launch a kernel.
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import emulation  # noqa: E402
import ptx  # noqa: E402

OPERATIONS = ("matching_log_probs", "cosine_attention")
DIRECTIONS = ("forward", "backward")
SHAPES = [(1, 75, 5, 64, 5), (1, 75, 25, 64, 5), (32, 75, 25, 64, 5), (32, 75, 25, 1600, 5), (16, 300, 100, 512, 20)]  # B, Q, S, D, C
LARGE = (1, 128, 65536, 64, 64)  # takes minutes to execute
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
ARCHITECTURES = (80, 90)
SECTOR = 32  # bytes


# ---- the calls ---------------------------------------------------------------------------------------------------------------------------


def example(operation: str, shape, dtype: torch.dtype):
    """Arguments of the operation, ``normalize="both"``, a number as scale, no mask."""
    batch, queries, supports, features, columns = shape
    generator = torch.Generator().manual_seed(0)
    query, support = (torch.randn(batch, n, features, generator=generator).to(dtype) for n in (queries, supports))
    options = (None, None, 1.0, 2, 0, 1e-8)
    if operation == "cosine_attention":
        return query, support, torch.randn(batch, supports, columns, generator=generator).to(dtype), *options
    labels = torch.rand(batch, supports, generator=generator).argsort(-1) % columns  # every class has its share, in any order
    return query, support, labels, *options, columns


def call(run, operation: str, arguments):
    """``run(name, *arguments) -> results`` forward and backward, for the gradients of query, support and values. Yields the arguments and the
    results of either."""
    results = run(operation, *arguments)
    yield arguments, results
    result, log_sums = results
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    needs = 0b111 if operation == "cosine_attention" else 0b011
    arguments = (grad, needs, *arguments, result, log_sums)
    yield arguments, run(operation + "_backward", *arguments)


def fewest_bytes(direction: str, arguments, results) -> int:
    """Of global memory: every tensor that the operation needs read once, every one that it returns written once.

    Forward: query, support, labels (int64) or values; result and log_sums. Backward: grad, query, support, labels or values, log_sums, but not
    the result, which follows from them; the gradients of query, support and values.
    """
    needed = arguments if direction == "forward" else (*arguments[:-2], arguments[-1])
    return sum(map(_bytes, (*needed, *results)))


def _bytes(t) -> int:
    """Distinct bytes of a tensor; 0 of anything else."""
    if not isinstance(t, Tensor):
        return 0
    count = 1
    for size, stride in zip(t.shape, t.stride()):
        count *= size if stride or not size else 1
    return count * t.element_size()


# ---- what a block takes ------------------------------------------------------------------------------------------------------------------

# Of a processor, from the CUDA C++ Programming Guide, "Compute Capabilities".
WARPS, BLOCKS, REGISTERS, PARTITIONS = 64, 32, 65536, 4
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTER_UNIT = 256  # a warp's are a multiple of it
SHARED_UNIT, SYSTEM_SHARED = 128, 1024  # bytes: a block's are a multiple of the one; the other is the system's, in every block


class Resources(NamedTuple):
    architecture: int
    threads: int  # of a block
    shared: int  # bytes of a block
    registers: int  # of a thread
    spills: int  # bytes that a thread stores and loads

    @property
    def occupancy(self) -> float:
        """Warps that a processor has room for, over the most it can have."""
        warps = -(-self.threads // 32)
        # A warp's registers are of the partition that it runs on.
        by_registers = PARTITIONS * (REGISTERS // PARTITIONS // _round_up(self.registers * 32, REGISTER_UNIT)) // warps
        by_shared = SHARED[self.architecture] // _round_up(self.shared + SYSTEM_SHARED, SHARED_UNIT)
        return min(BLOCKS, WARPS // warps, by_registers, by_shared) * warps / WARPS


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def ptxas(text: str, command: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """``{kernel: (registers, bytes of spills)}`` of PTX, by the assembler ``command``.

    What it said is remembered in the cache folder of the user.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([text, version, *command]).encode()).hexdigest()
    cached = ptx.native._cache() / f"{key[:32]}.ptxas"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            source, log = Path(folder, "kernel.ptx"), Path(folder, "log")
            source.write_text(text)
            with log.open("w") as said:
                subprocess.run([*command, "-v", str(source), "-o", str(Path(folder, "kernel.cubin"))], stderr=said, check=True)
            log.rename(cached)
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                       cached.read_text(), re.DOTALL)
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


# ---- the two compilers -------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """``resources(architecture)`` compiles the kernel for it."""

    kernel: str
    blocks: int
    resources: Callable[[int], Resources]


class Cuda:
    """The kernels of ``csrc/cuda``, as nvcc makes them: PTX of sm_80, which ptxas compiles for each architecture.

    ``Cuda()(name, *arguments)`` runs the host code of an operation and none of its kernels: what it would launch is in ``planned``, how many kernels
    of PyTorch's it would run beside in ``computations``.
    """

    title = "CUDA C++"
    missing = staticmethod(emulation.cuda_is_missing)
    emulator = emulation.CudaEmulator

    def __init__(self):
        self.planned, self.computations = [], 0

    def __call__(self, name: str, *arguments):
        return emulation.CudaEmulator().run(self, name, arguments)

    def allocated(self, address, size):
        pass

    def computed(self, address, size):
        self.computations += 1

    def launch(self, kernel, grid, block, shared, parameters):
        def resources(architecture):
            return Resources(architecture, block[0], shared + kernel.static_shared, *self.kernels(architecture)[kernel.name])

        self.planned.append(Launch(kernel.name, grid[0], resources))

    @staticmethod
    @functools.cache
    def kernels(architecture: int) -> dict[str, tuple[int, int]]:
        """``{name: (registers, bytes of spills)}`` of every kernel there is."""
        return {name: found for source in emulation.CUDA_SOURCES
                for name, found in ptxas(emulation.compile_cuda(source.read_text()), Cuda.assembler(architecture)).items()}

    @staticmethod
    def assembler(architecture: int) -> tuple[str, ...]:
        return shutil.which("ptxas") or str(Path(shutil.which("nvcc")).resolve().with_name("ptxas")), f"--gpu-name=sm_{architecture}"


class Triton(emulation.TritonEmulator):
    """The kernels of ``fastmeta/triton``, as Triton makes them for each architecture; otherwise as :class:`Cuda`."""

    title = "Triton"
    missing = staticmethod(emulation.triton_is_missing)
    emulator = emulation.TritonEmulator

    def __init__(self):
        self.planned = []

    def __call__(self, name: str, *arguments):
        return self.run(self, name, arguments)

    def allocated(self, address, size):
        pass

    def computed(self, address, size):
        pass

    def launch(self, call, kernel, grid, arguments, constants, options):
        def resources(architecture):
            from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

            compiled = emulation.compile_triton(kernel, {**arguments, **constants}, options, architecture)
            # As Triton calls it.
            assembler = get_ptxas(architecture).path, "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(architecture)}"
            (registers, spills), = ptxas(compiled.asm["ptx"], assembler).values()
            return Resources(architecture, 32 * options["num_warps"], compiled.shared, registers, spills)

        choices = {**constants, "num_stages": options["num_stages"]}
        words = (key if value is True else f"{key}={value}" for key, value in choices.items() if value is not False)
        self.planned.append(Launch(" ".join([kernel.fn.__name__, *words]), grid, resources))


BACKENDS = {"cuda": Cuda, "triton": Triton}


def plan(backend, operation: str, arguments) -> list[list[Launch]]:
    """What is launched forward and what backward."""
    run, found = backend(), []
    for _ in call(run, operation, arguments):
        found.append(run.planned)
        run.planned = []
    return found


# ---- costs -------------------------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """One call of an operation in one direction. Bytes and sectors of global memory are of reads and writes together."""

    launches: tuple[Launch, ...]
    fewest: int  # bytes
    dram: int  # bytes of the distinct sectors of each launch: what is left for DRAM where the L2 cache holds a launch
    requested: int  # bytes that threads asked for: what L1 and L2 see
    sectors: int  # of all requests of warps
    ideal_sectors: int  # the fewest that hold the distinct bytes of each request
    transactions: int  # of shared memory
    ideal_transactions: int  # without bank conflicts
    instructions: int  # of threads

    @property
    def sectors_over_fewest(self) -> float:
        return self.sectors / self.ideal_sectors

    @property
    def transactions_over_fewest(self) -> float:
        return self.transactions / self.ideal_transactions if self.ideal_transactions else 1.0


def costs(backend, operation: str, shape, dtype: torch.dtype, work: int = 4_000_000) -> dict[str, Cost]:
    """``{direction: Cost}``.

    Where more episodes are more blocks of the same kernels, and nothing else, only so many are executed as take ``work`` multiplications for
    their scores, one at least, and what they cost is multiplied.
    """
    batch, queries, supports, features, _ = shape
    plans = plan(backend, operation, example(operation, shape, dtype))
    executed = min(batch, max(work // (queries * supports * features), 1))
    arguments = example(operation, (executed, *shape[1:]), dtype)
    if [[(launch.kernel, launch.blocks * batch) for launch in launches] for launches in plan(backend, operation, arguments)] != \
            [[(launch.kernel, launch.blocks * executed) for launch in launches] for launches in plans]:
        executed, arguments = batch, example(operation, shape, dtype)
    found, emulator = {}, backend.emulator()
    for direction, launches, (given, results) in zip(DIRECTIONS, plans, call(emulator, operation, arguments)):
        reports = [launch.report for launch in emulator.calls.pop().launches]
        counts = (fewest_bytes(direction, given, results), *(sum(map(count, reports)) for count in (
            lambda r: SECTOR * (r.unique_sectors_read + r.unique_sectors_written), lambda r: r.global_read + r.global_written,
            lambda r: r.sectors_read + r.sectors_written, lambda r: r.ideal_sectors_read + r.ideal_sectors_written,
            lambda r: r.shared_transactions, lambda r: r.shared_ideal_transactions, lambda r: r.instructions)))
        found[direction] = Cost(tuple(launches), *(n * batch // executed for n in counts))
    return found


class Launches(TorchDispatchMode):
    """Counts the operations inside that would be a kernel on a GPU, and the bytes of their inputs and outputs.

    Not counted are views and what only allocates. Some operations are more than one kernel, so it is the least that eager can do.
    """

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((arguments, keywords), outputs))
        new = [t for t in made if not any(torch._C._is_alias_of(t, other) for other in given)]
        name = function._schema.name.removeprefix("aten::")
        if (new or function._schema.is_mutable) and "empty" not in name:
            self.names.append(name)
            self.bytes += sum(map(_bytes, (*given, *made)))
        return outputs


def eager_launches(operation: str, shape, dtype: torch.dtype) -> dict[str, Launches]:
    """``{direction: Launches}`` of the eager peer. It runs on tensors without contents, for which autograd does what it does for all."""
    from bench_cosine_attention import eager

    batch, queries, supports, features, columns = shape
    query, support, third = (torch.empty(batch, *sizes, dtype=dtype, device="meta", requires_grad=True)
                             for sizes in ((queries, features), (supports, features), (supports, columns)))
    inputs = (query, support, third)
    if operation == "matching_log_probs":
        third.requires_grad_(False)  # the one-hot labels
        inputs = (query, support)
    with Launches() as forward:
        result = eager(query, support, third)
        if operation == "matching_log_probs":
            result = result.log()
    grad = torch.empty_like(result)
    with Launches() as backward:
        torch.autograd.grad(result, inputs, grad)
    return dict(zip(DIRECTIONS, (forward, backward)))


# ---- tables ------------------------------------------------------------------------------------------------------------------------------

HEADING = """# Costs of the GPU kernels, counted

**No GPU has run this, and no time is claimed.** The compiled kernels, PTX of sm_80, were executed by an emulator that counts; registers are those
that ptxas gives. Shapes are (B, Q, S, D, C). {dtype}; *eager* is what PyTorch launches for the same function without fastmeta.

* *launches*: of kernels; of eager, operations that launch at least one.
* *DRAM*: bytes of the distinct 32-byte sectors that each launch reads, plus those that it writes: what is left for DRAM if the L2 cache is
  perfect within a launch and empty between launches. *requested*: bytes that threads ask for. *eager*: bytes of the inputs and outputs of all its
  operations. All three over the fewest possible: forward, query, support and labels (int64) or values read once, result and log-sums written
  once; backward, gradient of the result, query, support, labels or values and log-sums read once, gradients of query, support and values
  written once.
* *sectors*: 32-byte sectors of all requests of warps, over the fewest that hold the distinct bytes of each.
* *banks*: transactions of shared memory, over the fewest without bank conflicts.
* *instructions*: of threads, without those that a predicate switched off.
* *occupancy*: warps that a processor has room for, over the most it can have (64)."""


def _table(header, rows) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def _of_calls(found) -> str:
    header = ("operation", "direction", "shape", "eager launches", "launches", "eager", "DRAM", "requested", "sectors", "banks", "fewest kB",
              "million instructions")
    return _table(header, [
        (operation, direction, shape, len(eager.names), len(cost.launches), f"{eager.bytes / cost.fewest:.1f}", f"{cost.dram / cost.fewest:.2f}",
         f"{cost.requested / cost.fewest:.2f}", f"{cost.sectors_over_fewest:.2f}", f"{cost.transactions_over_fewest:.2f}",
         f"{cost.fewest / 1e3:,.0f}", f"{cost.instructions / 1e6:,.1f}") for operation, direction, shape, cost, eager in found])


def _kernels_of(launches) -> list[tuple[str, list[Resources]]]:
    """Each kernel, and what a block of it takes on each architecture; more than once where its shared memory differs."""
    kernels = {(launch.kernel, *(launch.resources(architecture) for architecture in ARCHITECTURES)) for launch in launches}
    return [(kernel, resources) for kernel, *resources in sorted(kernels)]


def _of_kernels(kernels) -> str:
    header = ("kernel", "threads", *(f"{what}, sm_{a}" for a in ARCHITECTURES for what in ("shared", "registers", "spills", "occupancy")))
    return _table(header, [
        (kernel, resources[0].threads, *itertools.chain(*((f"{r.shared:,}", r.registers, r.spills, f"{r.occupancy:.0%}") for r in resources)))
        for kernel, resources in kernels])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=(*BACKENDS, "all"), default="all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--large", action="store_true", help=f"{LARGE} too: minutes")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args(arguments)
    print(HEADING.format(dtype=options.dtype))
    everything = []
    for name in BACKENDS if options.backend == "all" else (options.backend,):
        backend = BACKENDS[name]
        print(f"\n## {backend.title}\n")
        if missing := backend.missing():
            print(f"Not counted: {missing}.")
            continue
        found = []
        for operation, shape in itertools.product(OPERATIONS, (*SHAPES, *([LARGE] if options.large else []))):
            eager = eager_launches(operation, shape, DTYPES[options.dtype])
            # LARGE takes more steps than the machine allows of its own accord.
            with mock.patch.object(ptx, "launch", functools.partial(ptx.launch, step_limit=10**12)):
                for direction, cost in costs(backend, operation, shape, DTYPES[options.dtype]).items():
                    found.append((operation, direction, shape, cost, eager[direction]))
        kernels = _kernels_of(launch for *_, cost, _ in found for launch in cost.launches)
        print(_of_calls(found), _of_kernels(kernels), sep="\n\n")
        everything.append({
            "backend": name, "dtype": options.dtype,
            "calls": [{"operation": operation, "direction": direction, "shape": shape, **cost._asdict(),
                       "launches": [launch.kernel for launch in cost.launches], "eager": {"launches": eager.names, "bytes": eager.bytes}}
                      for operation, direction, shape, cost, eager in found],
            "kernels": [{"kernel": kernel, **r._asdict(), "occupancy": r.occupancy} for kernel, resources in kernels for r in resources]})
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
