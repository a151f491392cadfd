"""N-way K-shot episodes from any labelled set (Vinyals et al., 2016, section 2.2).

What an episode holds follows from (seed, number of the episode) alone. So it is the same whichever worker or process draws it,
processes share a run by sharing out the numbers, and a resumed run only needs to know the next number.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torch.utils.data import Dataset, default_collate


class LabelledImages(NamedTuple):
    """A set of small grey images in memory.

    ``images``: uint8 ``[N, 1, H, W]``, ink 255; ``labels``: int64 ``[N]``, the class; ``names``: what each class is called.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def classes(self, chosen) -> "LabelledImages":
        """Only these classes, which become 0, 1, … in the order given."""
        number = torch.full((len(self.names),), -1)
        number[torch.as_tensor(chosen, dtype=torch.int64)] = torch.arange(len(chosen))
        labels = number[self.labels]
        return LabelledImages(self.images[labels >= 0], labels[labels >= 0], tuple(self.names[c] for c in chosen))

    def rotated(self) -> "LabelledImages":
        """Each class also turned by 90, 180 and 270 degrees, as classes of their own (Vinyals et al., section 4.1.1)."""
        turns = range(4)
        return LabelledImages(torch.cat([self.images.rot90(turn, (-2, -1)) for turn in turns]),
                              torch.cat([self.labels + turn * len(self.names) for turn in turns]),
                              tuple(name if turn == 0 else f"{name} @{90 * turn}" for turn in turns for name in self.names))


class Episode(NamedTuple):
    """One episode, or a batch of them with ``*`` in front of every shape; S = way * shot, Q = way * queries.

    ``support``: ``[*, S, ...]``, shuffled; ``query``: ``[*, Q, ...]``, class by class; labels: int64 in ``[0, way)``.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


class Episodes(Dataset):
    """A map-style data set of N-way K-shot episodes; ``episodes[i]`` is an :class:`Episode`.

    Args:
        items: ``[N, ...]``; images, or features. uint8 is made float32 in [0, 1].
        labels: integer ``[N]``, the class of each item; any integers.
        way, shot, queries: classes of an episode, supports of each class, queries of each class. No item is both.
        seed: with the number of the episode decides all that is random.
        length: how many episodes there are.
        distortion: strength of :func:`distort` on each image, another one each time; 0 for none.

    Raises ``ValueError`` when there are too few classes, or a class has fewer than ``shot + queries`` items.
    """

    def __init__(self, items: Tensor, labels: Tensor, *, way: int, shot: int, queries: int, seed: int = 0, length: int = 1000,
                 distortion: float = 0.0):
        for name, value in dict(way=way, shot=shot, queries=queries, length=length).items():
            if value < 1:
                raise ValueError(f"episodes: {name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"episodes: the seed must not be negative, got {seed}")
        if len(items) != len(labels):
            raise ValueError(f"episodes: {len(items)} items with {len(labels)} labels")
        classes, counts = np.unique(np.asarray(labels), return_counts=True)
        if len(classes) < way:
            raise ValueError(f"episodes: {way}-way episodes need {way} classes, the set has {len(classes)}")
        if counts.min() < shot + queries:
            raise ValueError(f"episodes: {shot} supports and {queries} queries of each class need {shot + queries} images a class, "
                             f"class {classes[counts.argmin()]} has {counts.min()}")
        self.items, self.way, self.shot, self.queries = items, way, shot, queries
        self.seed, self.length, self.distortion = seed, length, distortion
        self._rows = np.argsort(np.asarray(labels), kind="stable")  # the items, class by class
        self._starts, self._counts = counts.cumsum() - counts, counts

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < self.length:
            raise IndexError(f"episode {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        classes = rng.choice(len(self._counts), self.way, replace=False)
        # The first shot + queries of a random order of each class: sort random keys, those beyond the end of a class last.
        keys = rng.random((self.way, self._counts.max()))
        keys[np.arange(keys.shape[1]) >= self._counts[classes, None]] = 2
        chosen = keys.argsort(1)[:, :self.shot + self.queries] + self._starts[classes, None]
        rows = torch.from_numpy(self._rows[chosen])
        labels = torch.arange(self.way).unsqueeze(1)
        order = torch.from_numpy(rng.permutation(self.way * self.shot))
        support_rows, query_rows = rows[:, :self.shot].flatten()[order], rows[:, self.shot:].flatten()

        items = self.items[torch.cat([support_rows, query_rows])]
        if items.dtype == torch.uint8:
            items = items.float() / 255
        if self.distortion:
            items = distort(items, rng, self.distortion)
        support, query = items.split([len(support_rows), len(query_rows)])
        return Episode(support, labels.expand(-1, self.shot).flatten()[order], query, labels.expand(-1, self.queries).flatten())

    def batch(self, indices) -> Episode:
        """These episodes as one batch, ``[B, …]``."""
        return default_collate([self[index] for index in indices])


def distort(images: Tensor, rng: np.random.Generator, strength: float = 1.0) -> Tensor:
    """Each image ``[N, C, H, W]`` (floating) under a random affine map and a random smooth warp of its own.

    At strength 1, each uniform: rotation within 10 degrees, scale of each axis within 10%, shear within 0.1, shift within 5% of the
    image's side; and a displacement of standard deviation 1.5% of the side that varies smoothly over the image.
    """
    count = len(images)

    def uniform(limit: float) -> np.ndarray:
        return rng.uniform(-limit * strength, limit * strength, count)

    angle, stretch_x, stretch_y, shear = uniform(np.pi / 18), 1 + uniform(.1), 1 + uniform(.1), uniform(.1)
    maps = np.empty((count, 2, 3), np.float32)  # in affine_grid's units, the image reaching from -1 to 1
    maps[:, 0] = np.stack([np.cos(angle) * stretch_x, shear - np.sin(angle) * stretch_x, uniform(.1)], 1)
    maps[:, 1] = np.stack([np.sin(angle) * stretch_y, np.cos(angle) * stretch_y, uniform(.1)], 1)
    grid = affine_grid(torch.from_numpy(maps), list(images.shape), align_corners=False)
    coarse = torch.from_numpy(rng.standard_normal((count, 2, 5, 5), np.float32) * np.float32(.03 * strength))
    warp = interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=True)
    grid = grid + warp.permute(0, 2, 3, 1)
    return grid_sample(images, grid.to(images.dtype), align_corners=False)
