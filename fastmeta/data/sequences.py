"""Episodes as sequences, for networks that learn while they look: Santoro et al. (2016), section 2.

Each class of an episode is given a label at random, and is shown several times, all classes mixed; nothing but the sequence tells which label
a class has. What a sequence holds follows from (seed, its number) alone, as for :class:`Episodes`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot
from torch.utils.data import Dataset

from .episodes import LabelledImages, distort

LABELS = ("one-hot", "strings")
LETTERS = 5  # of the alphabet, and in a string: 3,125 strings (section 4.1)


class Sequence(NamedTuple):
    """One sequence, or a batch of B of them with ``B`` behind the T of every shape.

    ``inputs``: float32 ``[T, I]``, flattened images, ink 1; ``symbols``: int64 ``[T, G]``, the label as G symbols, G = 1 for one-hot labels;
    ``presentation``: int64 ``[T]``, how often the class was shown before: 0, 1, …
    """

    inputs: Tensor
    symbols: Tensor
    presentation: Tensor


class Sequences(Dataset):
    """A map-style data set of sequences of ``classes * presentations`` images; ``sequences[i]`` is a :class:`Sequence`.

    Args:
        data: the images, and their classes.
        classes, presentations: in a sequence, and of each class.
        labels: ``"one-hot"``: one of ``classes`` symbols; ``"strings"``: five letters of five, another string for each class, so that the size of
            the label does not grow with the number of classes.
        side: images are resized to ``side * side`` pixels, each the mean over its area.
        seed, length, distortion: as in :class:`Episodes`.

    Raises ``ValueError`` when there are too few classes, or a class has fewer than ``presentations`` images.
    """

    def __init__(self, data: LabelledImages, *, classes: int, presentations: int = 10, labels: str = "one-hot", side: int = 20, seed: int = 0,
                 length: int = 1000, distortion: float = 0.0):
        for name, value in dict(classes=classes, presentations=presentations, side=side, length=length).items():
            if value < 1:
                raise ValueError(f"sequences: {name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"sequences: the seed must not be negative, got {seed}")
        if labels not in LABELS:
            raise ValueError(f"sequences: labels must be one of {', '.join(map(repr, LABELS))}, got {labels!r}")
        self.groups, self.kinds = label_shape(labels, classes)
        if classes > self.kinds**self.groups:
            raise ValueError(f"sequences: there are {self.kinds**self.groups} labels for {classes} classes")
        counts = torch.bincount(data.labels, minlength=len(data.names)).numpy()
        if len(counts) < classes:
            raise ValueError(f"sequences: {classes} classes in a sequence, the set has {len(counts)}")
        if counts.min() < presentations:
            raise ValueError(f"sequences: {presentations} presentations need as many images a class, class {counts.argmin()} has {counts.min()}")
        self.images = resized(data.images, side)
        self.classes, self.presentations, self.labels = classes, presentations, labels
        self.seed, self.length, self.distortion = seed, length, distortion
        self._rows = np.argsort(data.labels.numpy(), kind="stable")  # the images, class by class
        self._starts, self._counts = counts.cumsum() - counts, counts

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sequence:
        return Sequence(*(x.squeeze(1) for x in self.batch([index])))

    def batch(self, indices) -> Sequence:
        """These sequences as one batch: inputs ``[T, B, I]``, symbols ``[T, B, G]``, presentation ``[T, B]``."""
        drawn = [self._draw(index) for index in indices]
        rows, symbols, presentation = (torch.from_numpy(np.stack(each, 1)) for each in zip(*(each[:3] for each in drawn)))
        images = self.images[rows].float() / 255  # [T, B, 1, side, side]
        if self.distortion:
            images = torch.stack([distort(images[:, b], rng, self.distortion) for b, (*_, rng) in enumerate(drawn)], 1)
        return Sequence(images.flatten(2), symbols, presentation)

    def _draw(self, index: int):
        if not 0 <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        classes = rng.choice(len(self._counts), self.classes, replace=False)
        if self.labels == "one-hot":
            symbols = np.arange(self.classes)[:, None]  # the classes are in random order
        else:
            strings = rng.choice(self.kinds**self.groups, self.classes, replace=False)
            symbols = strings[:, None] // self.kinds**np.arange(self.groups) % self.kinds
        order = rng.permutation(np.repeat(np.arange(self.classes), self.presentations))  # the class at each step
        presentation = np.empty_like(order)
        presentation[np.argsort(order, kind="stable")] = np.tile(np.arange(self.presentations), self.classes)
        keys = rng.random((self.classes, self._counts.max()))
        keys[np.arange(keys.shape[1]) >= self._counts[classes, None]] = 2  # beyond the end of a class: last
        images = self._rows[keys.argsort(1)[:, :self.presentations] + self._starts[classes, None]]
        return images[order, presentation], symbols[order], presentation, rng


def label_shape(labels: str, classes: int) -> tuple[int, int]:
    """How many symbols a label has, and of how many kinds each is."""
    return (1, classes) if labels == "one-hot" else (LETTERS, LETTERS)


def label_vectors(symbols: Tensor, kinds: int) -> Tensor:
    """What the network is shown: the symbols one-hot, one after the other, ``[..., G] -> float32 [..., G * kinds]``."""
    return one_hot(symbols, kinds).flatten(-2).float()


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 ``[N, 1, H, W] -> [N, 1, side, side]``, each pixel the mean over its area."""
    if images.shape[-2:] == (side, side):
        return images
    return torch.cat([interpolate(chunk.float(), (side, side), mode="area").round().byte() for chunk in images.split(4096)])
