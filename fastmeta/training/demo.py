"""``fastmeta demo``: a Matching Network, MANN, or a Meta Network, from nothing to a picture, in a few minutes on two cores."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import _backend, data, functional, reference
from .. import nn as fast
from ..data import Episodes, Sequences
from .curves import chance, check_picture, draw_curves, draw_few_shot
from .evaluation import evaluate, evaluate_pixels, evaluate_presentations, evaluate_presentations_pixels, sequence_logits
from .mann import MANNConfig
from .matching import MatchingConfig
from .metanet import MetaNetConfig
from .models import build, load_model, train

# Small enough for some three minutes on two cores: a Meta Network on quiet ones, the Matching Network also where there is other work.
CONFIG = MatchingConfig(way=20, shot=1, queries=4, steps=500, channels=32, validation_classes=100, eval_every=50)
TESTS = ((5, 1000), (20, 400))  # way, episodes
MANN_CONFIG = MANNConfig(steps=4000, strength="learned", rotations=True)
MANN_EPISODES = 400
METANET_CONFIG = MetaNetConfig(steps=900, channels=32, validation_classes=100, eval_every=150)
METANET_TESTS = ((5, 400),)
SEED = 1  # of the test episodes and of the pictured one: the first that it gives, not the best


def demo(model: str, picture: Path) -> int:
    """Train ``model`` on the glyphs, test on unseen ones, time the layers, write ``picture``; returns 0, or 128 + the signal that stopped it."""
    started = time.perf_counter()
    check_picture(picture)  # now, not after the training
    stopped = {"matching": _demo_matching, "mann": _demo_mann, "metanet": _demo_metanet}[model](picture)
    if stopped:
        return 128 + stopped
    print(f"\n{picture} written; {time.perf_counter() - started:.0f} s in all")
    return 0


def _load(validation_classes: int, episodes: str) -> data.Split:
    print("glyphs: letters of many scripts in matplotlib's fonts (drawn once, then cached)", flush=True)
    split = data.load("glyphs", validation_classes=validation_classes)
    watched = f"{len(split.validation.names)} to watch, " if validation_classes else ""
    print(f"{len(split.train.names)} characters to train on, {watched}{len(split.test.names)} for the test, 20 images of each; {episodes}", flush=True)
    return split


def _announce_race(text: str) -> None:
    print(f"\n{text + f', forward and backward, {torch.get_num_threads()} threads':<58}  reference       fast")
    if _backend.missing:
        print(f"(the compiled kernels are missing, so fast is the reference too: {_backend.missing})")


def _demo_few_shot(config, title: str, tests: tuple[tuple[int, int], ...], race: Callable[[data.Split], None],
                   pictured: dict[str, int], picture: Path) -> int:
    """``tests``: way, episodes; ``race`` prints its lines; ``pictured``: way and shot of the episode in the picture."""
    split = _load(config.validation_classes, f"{config.way}-way {config.shot}-shot episodes")
    with tempfile.TemporaryDirectory() as folder:
        stopped = train(config, split, Path(folder))
        if stopped:
            return stopped
        model, _ = load_model(Path(folder))

        print(f"\nunseen characters                 {title:<34}nearest in pixels")
        results = []
        for way, episodes in tests:
            task = dict(way=way, shot=1, queries=15, episodes=episodes, seed=SEED)
            ours, pixels = evaluate(model, split.test, **task, progress=True), evaluate_pixels(split.test, **task)
            print(f"{way:>2}-way 1-shot                      {str(ours):<34}{pixels}", flush=True)
            results.append(f"test, {way}-way: {100 * ours.mean:.1f} ± {100 * ours.interval:.1f}%, pixels {100 * pixels.mean:.1f}%")
        race(split)
        draw_few_shot(picture, Path(folder), split.test, results, **pictured, seed=SEED)
    return 0


def _demo_matching(picture: Path) -> int:
    return _demo_few_shot(CONFIG, "matching network", TESTS, _race_heads, dict(way=5, shot=2), picture)


def _demo_metanet(picture: Path) -> int:
    pictured = dict(way=METANET_CONFIG.way, shot=METANET_CONFIG.shot)
    return _demo_few_shot(METANET_CONFIG, "meta network", METANET_TESTS, _race_updates, pictured, picture)


def _demo_mann(picture: Path) -> int:
    config = MANN_CONFIG
    steps = config.classes * config.presentations
    split = _load(0, f"episodes of {config.classes} classes and {steps} images, each label shown one step late")
    with tempfile.TemporaryDirectory() as folder:
        stopped = train(config, split, Path(folder))
        if stopped:
            return stopped
        model, _ = load_model(Path(folder))
        columns = {"MANN": evaluate_presentations(model, split.test, config, episodes=MANN_EPISODES, seed=SEED),
                   "nearest in pixels": evaluate_presentations_pixels(split.test, config, episodes=MANN_EPISODES, seed=SEED)}
        print(f"\nunseen characters, {MANN_EPISODES} episodes     {'MANN':<22}nearest in pixels so far")
        for k, row in enumerate(zip(*columns.values()), 1):
            print(f"presentation {k:<21}" + "".join(f"{f'{100 * each.mean:.1f}% ± {100 * each.interval:.1f}%':<22}" for each in row), flush=True)
        print(f"(a guess is right in {100 * chance(config):.0f}%; at the first presentation one can know which labels are taken, no more)")

        _announce_race("an episode of MANN")
        for episodes in (1, config.episodes_per_batch):
            _print_race(f"{episodes}x {steps} steps", *_race_episodes(config, split, episodes), digits=1)
        draw_curves(picture, {Path(folder): (config, columns)})
    return 0


def _in_turns(slow: Callable[[], object], quick: Callable[[], object], warm: int, rounds: int) -> tuple[float, float]:
    """Median seconds of both, in turns so that they see the same machine."""
    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    pairs = [(seconds(slow), seconds(quick)) for _ in range(warm + rounds)]
    return tuple(statistics.median(times) for times in zip(*pairs[warm:]))


def _print_race(shape: str, slow: float, quick: float, digits: int) -> None:
    print(f"{shape:<58}{1e3 * slow:8.{digits}f} ms{1e3 * quick:8.{digits}f} ms   {slow / quick:.1f}x", flush=True)


def _race_heads(split: data.Split) -> None:
    """The reference and the fast head on the demo's episodes."""
    _announce_race("the matching head")
    generator = torch.Generator().manual_seed(0)
    way, shape = CONFIG.way, (CONFIG.way * CONFIG.queries, CONFIG.channels)
    for episodes in (1, 32):
        query = torch.rand(episodes, *shape, generator=generator).requires_grad_()
        support = torch.rand(episodes, way, shape[1], generator=generator).requires_grad_()
        labels = torch.arange(way).expand(episodes, way)

        def call(head: Callable[..., Tensor]):
            return lambda: torch.autograd.grad(head(query, support, labels, way, scale=CONFIG.scale).sum(), (query, support))

        _print_race(f"{episodes}x {way}-way, {shape[0]} queries, {shape[1]} features",
                    *_in_turns(call(reference.matching_log_probs), call(functional.matching_log_probs), warm=10, rounds=60), digits=3)


def _race_updates(split: data.Split) -> None:
    """The reference and the fast Meta Network on the first episode of the demo."""
    _announce_race("a Meta Network")
    config = METANET_CONFIG
    episode = Episodes(split.train.images, split.train.labels, way=config.way, shot=config.shot, queries=config.queries)[0]

    def call(layers: str):
        model = build(replace(config, layers=layers))
        return lambda: model(episode.support, episode.support_labels, episode.query).sum().backward()

    _print_race(f"{config.way}-way {config.shot}-shot, {len(episode.query)} queries, {config.channels} channels",
                *_in_turns(call("reference"), call("fast"), warm=1, rounds=3), digits=1)


def _race_episodes(config: MANNConfig, split: data.Split, episodes: int) -> tuple[float, float]:
    """The reference and the fast MANN on sequences of the demo."""
    batch = Sequences(split.test, classes=config.classes, presentations=config.presentations, side=config.side).batch(range(episodes))

    def call(layers):
        model = layers.MANN(config.side**2, config.classes)
        return lambda: sequence_logits(model, batch, config.classes).sum().backward()

    return _in_turns(call(reference), call(fast), warm=1, rounds=5)
