"""Which implementation runs a call, and what this installation has.

Backends: ``cpp`` (our compiled kernels) and ``reference`` (plain PyTorch, every device). The first of these that speaks decides: the
``backend=`` argument, :func:`use_backend`, the environment variable ``FASTMETA_BACKEND``, and else the fastest one that can run.
"""

import contextlib
import importlib
import os
import platform
import sys
from pathlib import Path

import torch  # its libraries must be loaded before the extension that links to them

BACKENDS = ("cpp", "reference")

try:
    _C = importlib.import_module("fastmeta._C")
    missing = None
except ImportError as error:  # not built, or built for something else: the reference serves, and `fastmeta info` says why
    _C = None
    _note = Path(__file__).with_name("build_failure.txt")  # left by setup.py
    missing = _note.read_text().strip() if _note.exists() else str(error)

_device_types = ("cpu",) if _C is not None else ()
_override = None


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return backend


_environment = os.environ.get("FASTMETA_BACKEND") or None
if _environment is not None:
    _known(_environment, "FASTMETA_BACKEND")


def select(backend: str | None, device_type: str, operation: str) -> str:
    """The backend of one call; an explicit choice that cannot run is an error, an automatic one falls to the next."""
    backend = backend or _override or _environment
    if backend is None:
        return "cpp" if device_type in _device_types else "reference"
    _known(backend, operation)
    if backend == "cpp" and device_type not in _device_types:
        why = f"the extension is not loaded ({missing})" if _C is None else "it has kernels for the CPU only"
        raise RuntimeError(f"{operation}: backend 'cpp' cannot run on {device_type} tensors: {why}")
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
        rows.append(("backend cpp", f"missing: {missing}"))
    else:
        build = _C.build_info()
        rows += [("backend cpp", "CPU kernels loaded"),
                 ("  instruction set", f"{_C.instruction_set()} (built for {', '.join(build['instruction_sets'])})"),
                 ("  compiler", build["compiler"]), ("  torch stable ABI", build["torch_stable_abi"] + " and newer")]
    rows += [("backend reference", "plain PyTorch, every device"),
             ("GPU", f"{'present, ' if torch.cuda.is_available() else 'none found; '}fastmeta has no GPU kernels yet: reference there"),
             ("chosen by", f"FASTMETA_BACKEND={_environment}" if _environment else "automatic (FASTMETA_BACKEND is not set)")]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)
