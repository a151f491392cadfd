"""``fastmeta demo``: a Matching Network, or MANN, from nothing to a picture, in a few minutes on two cores."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import _backend, data, functional, reference
from .. import nn as fast
from ..data import Episodes, Sequences
from .curves import chance, check_picture, draw_curves
from .evaluation import (Accuracy, evaluate, evaluate_pixels, evaluate_presentations, evaluate_presentations_pixels,
                         sequence_logits)
from .mann import MANNConfig
from .matching import MatchingConfig
from .models import load_model, train

# Small enough for three minutes on two cores that have other work as well.
CONFIG = MatchingConfig(way=20, shot=1, queries=4, steps=500, channels=32, validation_classes=100, eval_every=50)
TESTS = ((5, 1000), (20, 400))  # way, episodes
MANN_CONFIG = MANNConfig(steps=4000, strength="learned", rotations=True)
MANN_EPISODES = 400
SEED = 1  # of the test episodes and of the pictured one: the first that it gives, not the best


def demo(model: str, picture: Path) -> int:
    """Train ``model`` on the glyphs, test on unseen ones, time the layers, write ``picture``; returns 0, or 128 + the signal that stopped it."""
    started = time.perf_counter()
    check_picture(picture)  # now, not after the training
    stopped = {"matching": _demo_matching, "mann": _demo_mann}[model](picture)
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


def _demo_matching(picture: Path) -> int:
    split = _load(CONFIG.validation_classes, f"{CONFIG.way}-way {CONFIG.shot}-shot episodes")
    with tempfile.TemporaryDirectory() as folder:
        stopped = train(CONFIG, split, Path(folder))
        if stopped:
            return stopped
        model, _ = load_model(Path(folder))
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]

    print(f"\nunseen characters                 {'matching network':<34}nearest in pixels")
    results = {}
    for way, episodes in TESTS:
        task = dict(way=way, shot=1, queries=15, episodes=episodes, seed=SEED)
        results[way] = evaluate(model, split.test, **task), evaluate_pixels(split.test, **task)
        print(f"{way:>2}-way 1-shot                      {str(results[way][0]):<34}{results[way][1]}", flush=True)

    _announce_race("the matching head")
    for episodes in (1, 32):
        slow, quick = _race(episodes)
        shape = f"{episodes}x {CONFIG.way}-way, {CONFIG.way * CONFIG.queries} queries, {CONFIG.channels} features"
        print(f"{shape:<58}{1e3 * slow:8.3f} ms{1e3 * quick:8.3f} ms   {slow / quick:.1f}x", flush=True)

    _draw(picture, model, split, log, results)
    return 0


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
            slow, quick = _race_episodes(config, split, episodes)
            print(f"{f'{episodes}x {steps} steps':<58}{1e3 * slow:8.1f} ms{1e3 * quick:8.1f} ms   {slow / quick:.1f}x", flush=True)
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


def _race(episodes: int) -> tuple[float, float]:
    """The reference and the fast head on the demo's episodes."""
    generator = torch.Generator().manual_seed(0)
    way, shape = CONFIG.way, (CONFIG.way * CONFIG.queries, CONFIG.channels)
    query = torch.rand(episodes, *shape, generator=generator).requires_grad_()
    support = torch.rand(episodes, way, shape[1], generator=generator).requires_grad_()
    labels = torch.arange(way).expand(episodes, way)

    def call(head: Callable[..., Tensor]):
        return lambda: torch.autograd.grad(head(query, support, labels, way, scale=CONFIG.scale).sum(), (query, support))

    return _in_turns(call(reference.matching_log_probs), call(functional.matching_log_probs), warm=10, rounds=60)


def _race_episodes(config: MANNConfig, split: data.Split, episodes: int) -> tuple[float, float]:
    """The reference and the fast MANN on sequences of the demo."""
    batch = Sequences(split.test, classes=config.classes, presentations=config.presentations, side=config.side).batch(range(episodes))

    def call(layers):
        model = layers.MANN(config.side**2, config.classes)
        return lambda: sequence_logits(model, batch, config.classes).sum().backward()

    return _in_turns(call(reference), call(fast), warm=1, rounds=5)


@torch.no_grad()
def _attention(model, episode) -> Tensor:
    """``[Q, S]``, what each query gives to each support: the attention's output when the value of a support is its own unit vector."""
    support, query = model.features(episode.support, episode.query, 0)
    return functional.cosine_attention(query, support, torch.eye(len(support)), **model.attention.options())


def _draw(picture: Path, model, split: data.Split, log: list[dict], results: dict[int, tuple[Accuracy, Accuracy]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    way, shot = 5, 2
    episode = Episodes(split.test.images, split.test.labels, way=way, shot=shot, queries=1, seed=SEED)[0]
    attention = _attention(model, episode)
    order = episode.support_labels.argsort(stable=True)
    supports, attention = episode.support[order], attention[:, order]

    figure = Figure(figsize=(12.5, 5.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))

    left.suptitle("Five unseen characters, two examples of each: where a query looks", fontsize=11)
    grid = left.subplots(way + 1, way * shot + 1, gridspec_kw={"wspace": .02, "hspace": .02})
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for column, image in enumerate(supports, 1):
        grid[0, column].imshow(1 - image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    for row, (image, weights, label) in enumerate(zip(episode.query, attention, episode.query_labels), 1):
        grid[row, 0].imshow(1 - image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        for column, weight in enumerate(weights.tolist(), 1):
            axes = grid[row, column]
            axes.imshow([[weight]], cmap="Blues", vmin=0, vmax=1)
            axes.text(0, 0, f"{weight:.2f}", ha="center", va="center", fontsize=9, color="white" if weight > .5 else "0.25")
            if (column - 1) // shot == label:
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="#D55E00", linewidth=2.5))
    grid[0, 0].text(.5, .5, "support →\nquery ↓", ha="center", va="center", fontsize=8, transform=grid[0, 0].transAxes)
    left.supxlabel("number: attention weight (a row sums to 1); orange: the query's own class", fontsize=9)

    axes = right.subplots()
    lines = [line for line in log if "loss" in line]
    # Means over twenty lines of the log: one episode of 80 queries is too coarse for a curve.
    groups = [lines[i:i + 20] for i in range(0, len(lines), 20)]
    axes.plot([group[-1]["step"] for group in groups], [100 * statistics.mean(line["accuracy"] for line in group) for group in groups],
              color="0.6", label="training episodes")
    pixels = evaluate_pixels(split.validation, way=CONFIG.way, shot=CONFIG.shot, queries=CONFIG.queries, episodes=200, seed=SEED)
    held_out = [(line["step"], 100 * line["validation"]) for line in log if "validation" in line]
    axes.plot(*zip(*held_out), "o-", color="#0072B2", label="held-out characters")
    axes.axhline(100 * pixels.mean, color="#D55E00", linestyle="--", label="held-out, nearest in pixels")
    axes.set(title=f"Learning curve, {CONFIG.way}-way {CONFIG.shot}-shot", xlabel="training episodes", ylabel="accuracy (%)",
             ylim=(0, 100), xlim=(0, CONFIG.steps))
    axes.grid(alpha=.3)
    axes.legend(loc="lower right", title="\n".join(
        f"test, {way}-way: {100 * ours.mean:.1f} ± {100 * ours.interval:.1f}%, pixels {100 * theirs.mean:.1f}%"
        for way, (ours, theirs) in results.items()))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
