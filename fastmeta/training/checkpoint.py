"""Checkpoints: one file that is always whole, of tensors and plain values only (``torch.load`` runs no code from it)."""

from pathlib import Path

import torch

from ..data.cache import atomic_write

FORMAT = 1


def save_checkpoint(path: Path, state: dict) -> None:
    """Put ``state`` (nested dicts of tensors and plain values) in the place of ``path``; a kill at any time leaves the old file."""
    with atomic_write(Path(path)) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict:
    """What :func:`save_checkpoint` was given. ``FileNotFoundError`` if there is none, ``ValueError`` if it is something else."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load meets rubbish with errors of many types
        raise ValueError(f"{path} is not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a fastmeta checkpoint of format {FORMAT}")
    return state
