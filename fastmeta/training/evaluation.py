"""Accuracy on episodes of classes never seen, with its interval, and the baseline to beat."""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import Episodes, LabelledImages
from ..data.sequences import Sequence, Sequences, label_vectors
from ..reference import MetaNetwork
from .progress import Progress

CHUNK = 500  # images that go through the embedding at once
BATCH = 16  # episodes that go through the head, or MANN, at once


class Accuracy(NamedTuple):
    """Mean over episodes of the share of queries that are right, with half the width of its 95% interval, ``1.96 s / sqrt(n)``."""

    mean: float
    interval: float
    episodes: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f}% ± {100 * self.interval:.2f}% ({self.episodes} episodes)"


def _accuracy(correct: Tensor) -> Accuracy:
    """From bool ``[episodes, Q]``."""
    each = correct.double().mean(1)
    spread = each.std().item() if len(each) > 1 else math.nan
    return Accuracy(each.mean().item(), 1.96 * spread / math.sqrt(len(each)), len(each))


@contextlib.contextmanager
def _embedded(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The features of all images, which ``model`` takes in their place as long as the context lasts."""
    embedding = model.embedding
    features = torch.cat([embedding(chunk.float() / 255) for chunk in images.split(CHUNK)])
    model.embedding = nn.Identity()
    try:
        yield features
    finally:
        model.embedding = embedding


@torch.no_grad()
def evaluate(model: nn.Module, data: LabelledImages, *, way: int, shot: int, queries: int, episodes: int, seed: int = 0,
             progress: bool = False) -> Accuracy:
    """Accuracy of a :class:`fastmeta.nn.MatchingNetwork` or :class:`fastmeta.nn.MetaNetwork` on ``episodes`` episodes of ``data``.

    Nothing is trained on them. In a Matching Network, batch normalisation uses the statistics of training, so an image's features do not
    depend on its episode: each image is embedded once, and the episodes are drawn from the features. (Statistics of the test episode
    itself would be transductive.) A Meta Network embeds with weights of the episode. It has an output for each class, so that ``way`` must be
    that of the training: ``ValueError``. ``progress``: say on stderr how far it is, if it takes long.
    """
    meta, training = isinstance(model, MetaNetwork), model.training
    if meta and way != model.num_classes:
        raise ValueError(f"way must be {model.num_classes}, as in training, got {way}: a Meta Network has an output for each class")
    size = 1 if meta else BATCH  # an episode of a Meta Network is work enough, and several of them leave the cache
    shown = Progress("episode", episodes, quiet=5, file=sys.stderr, enabled=progress)
    model.eval()
    try:
        with contextlib.nullcontext(data.images) if meta else _embedded(model, data.images) as items:
            drawn = Episodes(items, data.labels, way=way, shot=shot, queries=queries, seed=seed, length=episodes)
            correct, right = [], 0
            for start in range(0, episodes, size):
                batch = drawn.batch(range(start, min(start + size, episodes)))
                predicted = model(batch.support, batch.support_labels, batch.query).argmax(-1)
                correct.append(predicted == batch.query_labels)
                done = start + len(predicted)
                right += correct[-1].sum().item()
                shown.show(done, f"accuracy {100 * right / (done * way * queries):5.1f}%")
    finally:
        shown.end()
        model.train(training)
    return _accuracy(torch.cat(correct))


def evaluate_pixels(data: LabelledImages, *, way: int, shot: int, queries: int, episodes: int, seed: int = 0) -> Accuracy:
    """The same for the label of the nearest support in pixels (Euclidean); the episodes are those of :func:`evaluate`."""
    drawn = Episodes(data.images, data.labels, way=way, shot=shot, queries=queries, seed=seed, length=episodes)
    correct = []
    for episode in drawn:
        nearest = torch.cdist(episode.query.flatten(1), episode.support.flatten(1)).argmin(1)
        correct.append(episode.support_labels[nearest] == episode.query_labels)
    return _accuracy(torch.stack(correct))


def _sequences(data: LabelledImages, config, episodes: int, seed: int) -> Sequences:
    return Sequences(data, classes=config.classes, presentations=config.presentations, labels=config.labels, side=config.side, seed=seed,
                     length=episodes)


def sequence_logits(model: nn.Module, batch: Sequence, kinds: int) -> Tensor:
    """Logits of each symbol of the labels, ``[T, B, G, kinds]``."""
    logits, _ = model(batch.inputs, label_vectors(batch.symbols, kinds))
    return logits.unflatten(-1, (-1, kinds))


def by_presentation(right: Tensor, presentation: Tensor, presentations: int) -> Tensor:
    """``[T, B]`` in the order of the presentations: ``[presentations, classes, B]``."""
    return right.gather(0, presentation.argsort(dim=0, stable=True)).unflatten(0, (presentations, -1))


@torch.no_grad()
def evaluate_presentations(model: nn.Module, data: LabelledImages, config, *, episodes: int, seed: int = 0) -> list[Accuracy]:
    """Accuracy of a :class:`fastmeta.nn.MANN` (or the LSTM) at the first, the second, … presentation of a class, on sequences of ``data``.

    ``config``: a :class:`MANNConfig`: the sequences are like those of the training. At the first presentation nothing can be known but which labels
    are taken already.
    """
    drawn = _sequences(data, config, episodes, seed)
    training = model.training
    model.eval()
    try:
        right, presentation = [], []
        for start in range(0, episodes, BATCH):
            batch = drawn.batch(range(start, min(start + BATCH, episodes)))
            right.append((sequence_logits(model, batch, drawn.kinds).argmax(-1) == batch.symbols).all(-1))
            presentation.append(batch.presentation)
    finally:
        model.train(training)
    return [_accuracy(each.T) for each in by_presentation(torch.cat(right, 1), torch.cat(presentation, 1), config.presentations)]


def evaluate_presentations_pixels(data: LabelledImages, config, *, episodes: int, seed: int = 0) -> list[Accuracy]:
    """The same for the label of the nearest image shown before in pixels (Euclidean), on the same sequences; at the first step it is wrong."""
    drawn = _sequences(data, config, episodes, seed)
    right, presentation = [], []
    for start in range(episodes):
        sequence = drawn[start]
        distances = torch.cdist(sequence.inputs, sequence.inputs)
        later = torch.ones_like(distances, dtype=torch.bool).triu()
        nearest = distances.masked_fill(later, torch.inf).argmin(1)
        same = (sequence.symbols[nearest] == sequence.symbols).all(-1)
        same[0] = False
        right.append(same)
        presentation.append(sequence.presentation)
    return [_accuracy(each.T) for each in by_presentation(torch.stack(right, 1), torch.stack(presentation, 1), config.presentations)]
