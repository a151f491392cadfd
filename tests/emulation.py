"""fastmeta's GPU kernels on the PTX machine of ``tests/ptx``.

The host code of an operation runs as it is, on CPU tensors: it allocates its results and scratch, chooses kernels and grids, and its launches come
here instead of to a GPU. The PTX is what nvcc makes of ``csrc/cuda`` with the flags of setup.py, and what Triton makes of ``fastmeta/triton``.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import ptx
import torch

from fastmeta import _backend, schemas

ROOT = Path(__file__).parents[1]
POISON = 0xFF  # in fresh memory: NaN in every dtype


class Launch(NamedTuple):
    """What an operation launched, and what it did."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes
    report: ptx.Report


class Call:
    """One call of an operation: its memory, its launches in order, and how many kernels of PyTorch's it has run beside."""

    def __init__(self, arguments, seed: int):
        self.memory, self.seed, self.launches, self.computations = ptx.Memory(), seed, [], 0
        for i, t in enumerate(arguments):
            if isinstance(t, torch.Tensor):
                self.memory.add(t, writable=False, name=f"argument {i}")

    def allocated(self, address: int, size: int) -> None:
        if size:
            ctypes.memset(address, POISON, size)
            self.memory.allocate(address, size, name=f"result {len(self.launches)}.{address:x}")

    def computed(self, address: int, size: int) -> None:
        self.computations += 1
        self.memory.allocate(address, size, name=f"computed {self.computations}.{address:x}", initialised=True)

    def launch(self, kernel: ptx.Kernel, grid, block, shared: int, parameters) -> None:
        report = ptx.launch(kernel, grid, block, parameters, self.memory, dynamic_shared=shared, seed=self.seed)
        self.launches.append(Launch(kernel.name, grid, block, shared + kernel.static_shared, report))


class Emulator:
    """Operations by name, on one compiler's kernels: ``emulator(name, *arguments) -> results``; the calls so far are in ``calls``."""

    def __init__(self, seed: int = 0):
        self.seed, self.calls = seed, []

    def __call__(self, name: str, *arguments):
        call = Call(arguments, self.seed)
        self.calls.append(call)
        results = self.run(call, name, arguments)
        for t in results if isinstance(results, tuple) else (results,):
            assert not t.numel() or call.memory.initialised(t).all(), f"{name}: a result was not written completely"
        return results

    @property
    def launches(self) -> list[Launch]:
        return [launch for call in self.calls for launch in call.launches]


# ---- CUDA C++ --------------------------------------------------------------------------------------------------------------------------


def cuda_is_missing() -> str | None:
    """Why the CUDA kernels cannot be run here, or None."""
    if cuda_module() is None:
        return f"the CUDA kernels are not there ({_backend.missing_cuda})"
    if shutil.which("nvcc") is None:
        return "nvcc, which makes the PTX, is not on the PATH"
    return machine_is_missing()


def machine_is_missing() -> str | None:
    return None if ptx.native.compiler() else "no C++ compiler, with which the PTX machine is built, is on the PATH"


@functools.cache
def cuda_module():
    return _backend._C_cuda or _backend._load("_C_cuda")[0]  # it loads without CUDA in torch, too


CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def cuda_ptx(source: Path) -> ptx.Module:
    return ptx.Module(compile_cuda(source.read_text()))


def cuda_kernel(name: str) -> ptx.Kernel:
    """A kernel of csrc/cuda. The file that bears its operation's name is looked at first: they take a while to compile."""
    likely_first = sorted(CUDA_SOURCES, key=lambda path: not name.startswith(path.stem))
    return next(kernels[name] for path in likely_first if name in (kernels := cuda_ptx(path).kernels))


def compile_cuda(text: str, architecture: str = "80") -> str:
    """nvcc's PTX of CUDA C++, remembered in the cache folder of the user."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=compute_{architecture}"]
    headers = sorted((ROOT / "csrc").glob("*/*.h"))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([text, *flags, version, *(h.read_text() for h in headers)]).encode()).hexdigest()
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastmeta" / f"{key[:32]}.ptx"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            source, target = Path(folder, "kernel.cu"), Path(folder, "kernel.ptx")
            source.write_text(text)
            subprocess.run(["nvcc", "-ptx", str(source), "-o", str(target), f"-I{ROOT / 'csrc'}", *flags], check=True)
            target.rename(cached)
    return cached.read_text()


class CudaEmulator(Emulator):
    def __init__(self, seed: int = 0, kernel: Callable[[str], ptx.Kernel] = cuda_kernel):
        super().__init__(seed)
        self.kernel = kernel

    def run(self, call: Call, name: str, arguments):
        errors = []

        def launch(kernel, grid, block, shared, parameters):
            try:
                call.launch(self.kernel(kernel), grid, block, shared, parameters)
            except BaseException as error:  # what passes through C++ is not the same afterwards
                errors.append(error)
                raise

        cuda_module().set_machine(call.allocated, call.computed, launch)
        try:
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            return getattr(torch.ops.fastmeta, name).default.redispatch(key, *arguments)
        except RuntimeError:
            if errors:
                raise errors[0] from None
            raise
        finally:
            cuda_module().set_machine(None, None, None)


# ---- Triton ----------------------------------------------------------------------------------------------------------------------------


def triton_is_missing() -> str | None:
    """Why the Triton kernels cannot be run here, or None."""
    return _backend.missing_triton or machine_is_missing()


@dataclass
class Compiled:
    """A Triton kernel for one kind of arguments: what Triton itself makes for a GPU of that architecture, which need not be there."""

    passed: list[str]  # names of the arguments that are passed at run time
    shared: int
    asm: dict

    @functools.cached_property
    def kernel(self) -> ptx.Kernel:
        """Of NVIDIA's, as far as the machine knows its instructions."""
        only, = ptx.Module(self.asm["ptx"]).kernels.values()
        return only


_compiled = {}


def compile_triton(kernel, arguments: dict, options: dict, architecture: int | str = 80) -> Compiled:
    """``arguments`` as of a call, constants included; ``options``: num_warps and num_stages; architecture: 80 for sm_80, or a name of AMD's."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)
    key = kernel.fn.__module__, kernel.fn.__name__, kernel.cache_key, repr(specialization), repr(options), architecture
    if key not in _compiled:
        parsed, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialization, dict(options))
        compiled = compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
        _compiled[key] = Compiled([name for name, kind in signature.items() if kind != "constexpr"], compiled.metadata.shared, compiled.asm)
    return _compiled[key]


class TritonEmulator(Emulator):
    def __init__(self, seed: int = 0, architecture: int = 80):
        super().__init__(seed)
        self.architecture = architecture

    def launch(self, call: Call, kernel, grid: int, arguments: dict, constants: dict, options: dict) -> None:
        compiled = compile_triton(kernel, {**arguments, **constants}, options, self.architecture)
        passed = [arguments[name] for name in compiled.passed]
        passed += [0] * (len(compiled.kernel.parameters) - len(passed))  # scratch that Triton adds, and that nothing here uses
        call.launch(compiled.kernel, (grid, 1, 1), (32 * options["num_warps"], 1, 1), compiled.shared, compiled.kernel.pack(passed))

    def run(self, call: Call, name: str, arguments):
        import fastmeta.triton
        from fastmeta.triton import launch as device

        def launch(kernel, grid, arguments, constants, num_warps, num_stages):
            if grid:
                self.launch(call, kernel, grid, arguments, constants, {"num_warps": num_warps, "num_stages": num_stages})

        def empty(shape, dtype, device):
            t = torch.empty(shape, dtype=dtype, device=device)
            call.allocated(t.data_ptr(), t.numel() * t.element_size())
            return t

        def contiguous(t):
            copy = t.contiguous()
            if copy is not t:
                call.computed(copy.data_ptr(), copy.numel() * copy.element_size())
            return copy

        with mock.patch.multiple(device, launch=launch, empty=empty, contiguous=contiguous):
            return getattr(fastmeta.triton, name)(*arguments)


class InterpretedEmulator(TritonEmulator):
    """Not the machine but Triton's own interpreter, in a process with ``TRITON_INTERPRET=1``."""

    def __call__(self, name: str, *arguments):
        return self.run(Call((), 0), name, arguments)

    def launch(self, call: Call, kernel, grid, arguments, constants, options) -> None:
        kernel[grid,](**arguments, **constants)


class CompilingEmulator(TritonEmulator):
    """Runs nothing: compiles what would be launched for some architectures, and keeps it in ``compiled``."""

    def __init__(self, *architectures: int | str):
        super().__init__()
        self.architectures, self.compiled = architectures, []

    def __call__(self, name: str, *arguments):
        return self.run(Call((), 0), name, arguments)

    def launch(self, call: Call, kernel, grid, arguments, constants, options) -> None:
        self.compiled += [compile_triton(kernel, {**arguments, **constants}, options, architecture) for architecture in self.architectures]


# ---- operations on CPU tensors that the machine runs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def emulated(backend: str, emulator: Callable):
    """Inside, what ``backend`` has for CUDA tensors runs on those of the CPU, by way of ``emulator``."""
    names = [operation.name for operation in schemas.OPERATIONS]
    if backend == "cpp":
        cuda_module()
    _backend.find_kernels(names)  # where torch has no CUDA, the module is loaded here only
    library = torch.library.Library(_backend.NAMESPACES[backend], "IMPL")
    for operation in _backend._kernels[backend, "cuda"]:
        for name in (operation, operation + "_backward"):
            library.impl(name, functools.partial(emulator, name), "CPU", allow_override=True)
    _backend.find_kernels(names)
    try:
        with _backend.use_backend(backend):
            yield emulator
    finally:
        library._destroy()
        _backend.find_kernels(names)
