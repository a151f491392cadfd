"""machine.cpp, compiled at its first use into a cache that its text and the compiler name."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("machine.cpp")
OPTIONS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-shared",
           "-fPIC"]

# struct Row, Traffic and Counters of machine.cpp.
ROW = np.dtype([("handler", "i8"), ("a", "i8"), ("b", "i8"), ("guard", "i4"), ("negate", "i4"), ("first", "i4"), ("count", "i4")])
TRAFFIC = ["read", "written", "sectors_read", "sectors_written", "ideal_sectors_read", "ideal_sectors_written", "requests_read",
           "requests_written",
           "unique_read", "unique_written", "unique_sectors_read", "unique_sectors_written"]
COUNTERS = ["shared_requests", "shared_transactions", "shared_ideal_transactions", "redundant_writes", "shared_read", "shared_written",
            "local_read", "local_written", "barriers",
            "steps", "clock"]


class BufferRow(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("state", ctypes.c_void_p),
                ("traffic", ctypes.c_uint64 * len(TRAFFIC))]


class LaunchRow(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("parameters", ctypes.c_char_p),
                *((name, ctypes.c_uint64) for name in ("parameter_bytes", "static_shared", "dynamic_shared", "seed", "step_limit")),
                ("buffers", ctypes.POINTER(BufferRow)), ("buffer_count", ctypes.c_uint64), ("lanes", ctypes.c_void_p),
                ("warps", ctypes.c_void_p),
                ("counters", ctypes.c_uint64 * len(COUNTERS)), *((name, ctypes.c_int64) for name in ("pc", "block_number", "warp", "lane")),
                ("kind", ctypes.c_char * 32), ("detail", ctypes.c_char * 512)]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmeta"


@functools.cache
def library() -> ctypes.CDLL:
    """The machine. RuntimeError without a compiler, or with what the compiler says."""
    command = compiler()
    if command is None:
        raise RuntimeError("the PTX machine needs a C++20 compiler: neither $CXX nor g++ nor c++ is there")
    version = subprocess.run([command, "-march=native", "-Q", "--help=target", "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), version, *OPTIONS]).encode()).hexdigest()[:20]
    path = _cache() / f"ptx-machine-{key}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's file
        if not path.exists():
            built = path.with_suffix(".tmp")
            done = subprocess.run([command, *OPTIONS, str(SOURCE), "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command} cannot compile {SOURCE}:\n{done.stderr[:4000]}")
            os.replace(built, path)
    found = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.ptx_handler.restype, found.ptx_handler.argtypes = integer, [ctypes.c_char_p]
    found.ptx_program.restype = pointer
    found.ptx_program.argtypes = [pointer, integer, pointer, integer, pointer, pointer, integer, pointer, integer, pointer, integer,
                                  *[ctypes.c_uint64] * 3]
    found.ptx_free.restype, found.ptx_free.argtypes = None, [pointer]
    found.ptx_launch.restype, found.ptx_launch.argtypes = None, [pointer, ctypes.POINTER(LaunchRow)]
    return found


@functools.cache
def handler(name: str) -> int:
    """The handle of a handler, 0 if there is none of this name."""
    return library().ptx_handler(name.encode())
