"""Files that are either whole or not there, and the cache of decoded data sets."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` at the end of the ``with``; after an error or a kill the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes the file private; give it the permissions that open() would
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def cache_dir() -> Path:
    """``FASTMETA_CACHE``, or ``fastmeta`` in ``XDG_CACHE_HOME`` (``~/.cache``)."""
    chosen = os.environ.get("FASTMETA_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmeta"


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of ``build()``, kept as ``NAME.npz`` in :func:`cache_dir`; whatever they depend on belongs in the name.

    A file that cannot be read is built again; where nothing can be written, the arrays are built each time.
    """
    path = cache_dir() / f"{name}.npz"
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = build()
    with contextlib.suppress(OSError), atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
    return arrays
