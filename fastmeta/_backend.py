"""Which implementation runs a call, and what this installation has.

Backends: ``cpp`` (our compiled kernels: C++ on the CPU, CUDA C++ on CUDA devices), ``triton`` (our Triton kernels, on CUDA devices) and ``reference``
(plain PyTorch, every device). The first of these that speaks decides: the ``backend=`` argument, :func:`use_backend`, the environment variable
``FASTMETA_BACKEND``, and else the first of them that has a kernel for the device.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch  # its libraries must be loaded before the extensions that link to them

NAMESPACES = {"cpp": "fastmeta", "triton": "fastmeta_triton"}  # of the operations, torch.ops.<namespace>.<operation>
BACKENDS = (*NAMESPACES, "reference")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # device type: its key in torch's dispatcher


def _load(name: str):
    """An extension, or None and why: not built, or built for something else."""
    try:
        return importlib.import_module(f"fastmeta.{name}"), None
    except ImportError as error:
        note = Path(__file__).with_name(f"{name}.failure")  # left by setup.py
        return None, note.read_text().strip() if note.exists() else str(error)


_C, missing = _load("_C")
_C_cuda, missing_cuda = _load("_C_cuda") if torch.version.cuda else (None, "this torch is built without CUDA")
missing_triton = None if importlib.util.find_spec("triton") else "the package triton is not installed"

_override = None


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return backend


_environment = os.environ.get("FASTMETA_BACKEND") or None
if _environment is not None:
    _known(_environment, "FASTMETA_BACKEND")


_kernels: dict[tuple[str, str], frozenset[str]] = {}  # (backend, device type): operations; a table, as torch.compile traces what reads it


def find_kernels(operations) -> None:
    """Ask torch's dispatcher which of these operations have a kernel, for each backend and device."""
    for backend, namespace in NAMESPACES.items():
        for device_type, key in _KEYS.items():
            _kernels[backend, device_type] = frozenset(name for name in operations if hasattr(getattr(torch.ops, namespace), name) and
                                                       torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key))


def _has_kernel(backend: str, device_type: str, operation: str) -> bool:
    return operation in _kernels.get((backend, device_type), ())


def _why_not(backend: str, device_type: str, operation: str) -> str:
    if device_type not in _KEYS:
        return "it has no kernels for this device"
    if backend == "triton":
        return "it has kernels for CUDA tensors only" if device_type == "cpu" else missing_triton or f"it has no kernel for {operation}"
    if device_type == "cpu":
        return f"the extension is not loaded ({missing})"
    return f"its CUDA kernels are not loaded ({missing_cuda})" if _C_cuda is None else f"it has no CUDA kernel for {operation}"


def select(backend: str | None, device_type: str, function: str, operation: str | None = None) -> str:
    """The backend of one call of a function, which needs a kernel of the operation (None: of the same name); an explicit choice that cannot run is
    an error, an automatic one falls to the next."""
    operation = operation or function
    backend = backend or _override or _environment
    if backend is None:
        for backend in NAMESPACES:
            if _has_kernel(backend, device_type, operation):
                return backend
        return "reference"
    if _known(backend, function) != "reference" and not _has_kernel(backend, device_type, operation):
        raise RuntimeError(f"{function}: backend {backend!r} cannot run on {device_type} tensors: {_why_not(backend, device_type, operation)}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str | None):
    """Run what is inside on one backend (None: automatic), in every thread of the process. ``with use_backend("reference"): ...``"""
    global _override
    before, _override = _override, None if backend is None else _known(backend, "use_backend")
    try:
        yield
    finally:
        _override = before


def info() -> str:
    """Versions, backends, instruction sets and threads, and for each thing that is missing the reason: what `fastmeta info` prints."""
    from . import __version__
    rows = [("fastmeta", __version__), ("python", f"{platform.python_version()} ({sys.platform} {platform.machine()})"),
            ("torch", torch.__version__), ("threads", torch.get_num_threads())]
    if _C is None:
        rows.append(("backend cpp, CPU", f"missing: {missing}"))
    else:
        build = _C.build_info()
        rows += [("backend cpp, CPU", "kernels loaded"),
                 ("  instruction set", f"{_C.instruction_set()} (built for {', '.join(build['instruction_sets'])})"),
                 ("  compiler", build["compiler"]), ("  torch stable ABI", build["torch_stable_abi"] + " and newer")]
    if _C_cuda is None:
        rows.append(("backend cpp, CUDA", f"missing: {missing_cuda}"))
    else:
        build = _C_cuda.build_info()
        rows += [("backend cpp, CUDA", "kernels loaded"), ("  architectures", f"{build['architectures']} and newer"),
                 ("  CUDA toolkit", build["toolkit"]), ("  torch stable ABI", build["torch_stable_abi"] + " and newer")]
    rows += [("backend triton", f"missing: {missing_triton}" if missing_triton else f"triton {importlib.import_module('triton').__version__}"),
             ("backend reference", "plain PyTorch, every device"),
             ("GPU", f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none found'}; no GPU has run our kernels yet, only a machine that "
                     "executes their PTX"),
             ("chosen by", f"FASTMETA_BACKEND={_environment}" if _environment else "automatic (FASTMETA_BACKEND is not set)")]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)
