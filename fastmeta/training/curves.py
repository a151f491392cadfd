"""Pictures of runs: how they learnt; of MANN, accuracy by presentation; of the others, where the queries of an episode look."""

import json
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

from ..data import Episode, Episodes, LabelledImages
from ..data.sequences import label_shape
from .evaluation import Accuracy, evaluate_pixels
from .models import load_model, run_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def check_picture(picture: Path) -> None:
    """``ValueError`` before the work, not after it."""
    if picture.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{picture}: a picture ends in .png, .pdf or .svg")


def plot_presentations(axes, named: dict[str, list[Accuracy]], chance: float) -> None:
    """One curve with 95% intervals for each name."""
    for color, (name, each) in zip(cycle(COLORS), named.items()):
        ks = range(1, len(each) + 1)
        # Without an interval where one episode gives none.
        axes.errorbar(ks, [100 * a.mean for a in each], [100 * a.interval if a.interval == a.interval else 0 for a in each], color=color,
                      marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(100 * chance, color="0.6", linestyle=":", label="chance")
    axes.set(title="Accuracy by presentation, unseen classes", xlabel="presentation of a class in the episode", ylabel="accuracy (%)", ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=.3)
    axes.legend(loc="best")


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, those of training (with a ``loss``) and those of ``validation``; none where there is no log."""
    log = folder / "log.jsonl"
    return list(map(json.loads, log.read_text().splitlines())) if log.exists() else []


def _curve(axes, lines: list[dict], accuracy: Callable[[dict], float], points: int, **style) -> None:
    """Means over some lines each: the episodes of one are too coarse for a curve."""
    size = max(1, len(lines) // points)
    groups = [lines[i:i + size] for i in range(0, len(lines), size)]
    axes.plot([group[-1]["step"] for group in groups], [100 * statistics.mean(map(accuracy, group)) for group in groups], **style)


def plot_learning(axes, logs: dict[str, list[dict]], presentations: tuple[int, ...] = (1, 2, 5, 10)) -> None:
    """Accuracy on the training episodes: one run by presentation, of several runs the second presentation of each."""
    several = len(logs) > 1
    for color, (name, lines) in zip(cycle(COLORS), logs.items()):
        lines = [line for line in lines if "loss" in line]
        shown = [k for k in ((2,) if several else presentations) if lines and k <= len(lines[0]["presentations"])]
        for shade, k in enumerate(shown):
            _curve(axes, lines, lambda line: line["presentations"][k - 1], 50, color=color if several else COLORS[shade],
                   label=name if several else f"presentation {k}")
    axes.set(title="Learning curve, training episodes" + (", presentation 2" if several else ""), xlabel="updates", ylabel="accuracy (%)",
             ylim=(0, 100))
    axes.grid(alpha=.3)
    if axes.lines:
        axes.legend(loc="lower right")


def draw_curves(picture: Path, results: dict[Path, tuple]) -> None:
    """``results``: by checkpoint (a file, or the folder of a run) its :class:`MANNConfig` and the accuracies by name."""
    figure = _figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    folders = {path: _folder(path) for path in results}
    plot_learning(left, {str(folder): read_log(folder) for folder in folders.values()})

    def label(path: Path, name: str) -> str:
        if len(results) == 1:
            return name
        return f"{folders[path]}, {name}" if len(results[path][1]) > 1 else str(folders[path])

    plot_presentations(right, {label(path, name): each for path, (_, columns) in results.items() for name, each in columns.items()},
                       chance(next(iter(results.values()))[0]))
    _save(figure, picture)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _save(figure, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def chance(config) -> float:
    """Of a guess at a class never seen in a MANN's episode: one of the classes, or of all the strings."""
    groups, kinds = label_shape(config.labels, config.classes)
    return kinds ** -groups


def plot_few_shot_learning(axes, config, lines: list[dict], pixels: Accuracy) -> None:
    """Accuracy of a Matching Network or a Meta Network, on training episodes and on held-out classes where they were watched."""
    training = [line for line in lines if "loss" in line]
    _curve(axes, training, lambda line: line["accuracy"], 25, color="0.6", label="training episodes")
    held_out = [(line["step"], 100 * line["validation"]) for line in lines if "validation" in line]
    if held_out:
        axes.plot(*zip(*held_out), "o-", color=COLORS[0], markersize=4, label="held-out classes")
    axes.axhline(100 * pixels.mean, color=COLORS[1], linestyle="--", label="nearest in pixels, unseen classes")
    axes.axhline(100 / config.way, color="0.6", linestyle=":", label="chance")
    axes.set(title=f"Learning curve, {config.way}-way {config.shot}-shot", xlabel="updates", ylabel="accuracy (%)", ylim=(0, 100),
             xlim=(0, config.steps))
    axes.grid(alpha=.3)


def draw_attention(figure, episode: Episode, attention, own) -> None:
    """``attention [Q, S]`` of the queries of an episode; ``own [Q]``: what the model gives to a query's own class."""
    from matplotlib.patches import Rectangle

    order = episode.support_labels.argsort(stable=True)
    supports, labels, attention = episode.support[order], episode.support_labels[order].tolist(), attention[:, order]
    rows, columns = attention.shape
    grid = figure.subplots(rows + 1, columns + 2, gridspec_kw={"wspace": .02, "hspace": .02}, squeeze=False)
    largest, numbers = attention.max().item(), columns <= 12
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], xlim=(-.5, .5), ylim=(-.5, .5), aspect="equal")
        axes.spines[:].set_visible(False)

    def show(axes, image) -> None:
        axes.imshow(1 - image[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(-.5, .5, -.5, .5))

    for axes, image in zip(grid[0, 1:], supports):
        show(axes, image)
    for row, image, weights, label, p in zip(grid[1:], episode.query, attention.tolist(), episode.query_labels.tolist(), own.tolist()):
        show(row[0], image)
        for axes, weight, of in zip(row[1:], weights, labels):
            # A softmax of cosines alone stays far below 1: shades are relative.
            axes.imshow([[weight / largest]], cmap="Blues", vmin=0, vmax=1, extent=(-.5, .5, -.5, .5))
            if numbers:
                axes.text(0, 0, f"{weight:.2f}", ha="center", va="center", fontsize=9, color="white" if weight > largest / 2 else "0.25")
            if of == label:
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=COLORS[1], linewidth=2.5 if numbers else 1.5))
        row[-1].text(0, 0, f"{p:.2f}", ha="center", va="center", fontsize=9 if numbers else 7)
    grid[0, 0].text(0, 0, "support →\nquery ↓", ha="center", va="center", fontsize=8)
    grid[0, -1].text(0, 0, "p(own\nclass)", ha="center", va="center", fontsize=8)
    figure.supxlabel(f"{'number' if numbers else 'blue'}: attention weight (a row sums to 1); orange: the query's own class", fontsize=9)


def draw_few_shot(picture: Path, checkpoint: Path, test: LabelledImages, results: list[str], *, way: int, shot: int, seed: int) -> None:
    """How a Matching Network or a Meta Network learnt, and where the queries of an episode of ``test`` look: the first of ``seed``.

    ``checkpoint``: a file, or the folder of a run; ``results``: lines to be shown beside its curve.
    """
    model, config = load_model(checkpoint, "reference")  # the layers that can be looked into
    episode = Episodes(test.images, test.labels, way=way, shot=shot, queries=1, seed=seed)[0]
    with torch.no_grad():
        own = model(episode.support, episode.support_labels, episode.query).softmax(-1)[torch.arange(way), episode.query_labels]
    figure = _figure(12.5, max(5.2, .35 * way + .8))
    figure.get_layout_engine().set(w_pad=.03, h_pad=.03)
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    left.suptitle(f"{way} unseen classes, {shot} example{'s' if shot > 1 else ''} of each: where a query looks", fontsize=11)
    draw_attention(left, episode, run_of(config).attention(model, episode), own)
    axes = right.subplots()
    plot_few_shot_learning(axes, config, read_log(_folder(checkpoint)),
                           evaluate_pixels(test, way=config.way, shot=config.shot, queries=config.queries, episodes=200, seed=seed))
    axes.legend(loc="lower right", title="\n".join(results))
    _save(figure, picture)
