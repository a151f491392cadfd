"""Episodes, and two sets to draw them from: ``glyphs`` (drawn here, no download) and ``omniglot``."""

from pathlib import Path
from typing import NamedTuple

import torch

from . import glyphs, omniglot
from .episodes import Episode, Episodes, LabelledImages, distort
from .sequences import Sequence, Sequences

SETS = ("glyphs", "omniglot")
# How many classes are for training. Omniglot: the usual 1,200 of 1,623 (Vinyals et al., section 4.1.1).
TRAIN_CLASSES = {"glyphs": 800, "omniglot": 1200}


class Split(NamedTuple):
    """Three sets that have no class in common."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def split(data: LabelledImages, train_classes: int, validation_classes: int = 0) -> Split:
    """Shuffle the classes, always in the same way, and share them out; the validation classes are the last of the ``train_classes``.

    The shuffle depends on the number of classes only. No seed of a run changes it, or a test class of one run would be a training
    class of another.
    """
    total = len(data.names)
    if not 0 <= validation_classes < train_classes < total:
        raise ValueError(f"split: {train_classes} training classes, {validation_classes} of them for validation, "
                         f"do not fit a set of {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    fit = train_classes - validation_classes
    return Split(data.classes(order[:fit]), data.classes(order[fit:train_classes]), data.classes(order[train_classes:]))


def load(name: str, root: str | Path | None = None, validation_classes: int = 0) -> Split:
    """The set of this name (one of ``SETS``), split. ``root`` is where Omniglot lies, see :func:`omniglot.load`."""
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(SETS)}")
    return split(glyphs.load() if name == "glyphs" else omniglot.load(root), TRAIN_CLASSES[name], validation_classes)


__all__ = ["SETS", "Episode", "Episodes", "LabelledImages", "Sequence", "Sequences", "Split", "distort", "glyphs", "load", "omniglot", "split"]
