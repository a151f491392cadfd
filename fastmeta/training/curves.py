"""Pictures of MANN's runs: accuracy by presentation, and how it was learnt."""

import json
import statistics
from itertools import cycle
from pathlib import Path

from ..data.sequences import label_shape
from .evaluation import Accuracy

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
    """The lines of a run's log that have training accuracies; none where there is no log."""
    log = folder / "log.jsonl"
    return [line for line in map(json.loads, log.read_text().splitlines()) if "presentations" in line] if log.exists() else []


def plot_learning(axes, logs: dict[str, list[dict]], presentations: tuple[int, ...] = (1, 2, 5, 10)) -> None:
    """Accuracy on the training episodes: one run by presentation, of several runs the second presentation of each."""
    several = len(logs) > 1
    for color, (name, lines) in zip(cycle(COLORS), logs.items()):
        # Means over some lines: one batch is too coarse for a curve.
        size = max(1, len(lines) // 50)
        groups = [lines[i:i + size] for i in range(0, len(lines), size)]
        steps = [group[-1]["step"] for group in groups]
        shown = [k for k in ((2,) if several else presentations) if lines and k <= len(lines[0]["presentations"])]
        for shade, k in enumerate(shown):
            axes.plot(steps, [100 * statistics.mean(line["presentations"][k - 1] for line in group) for group in groups],
                      color=color if several else COLORS[shade], label=name if several else f"presentation {k}")
    axes.set(title="Learning curve, training episodes" + (", presentation 2" if several else ""), xlabel="updates", ylabel="accuracy (%)",
             ylim=(0, 100))
    axes.grid(alpha=.3)
    if axes.lines:
        axes.legend(loc="lower right")


def draw_curves(picture: Path, results: dict[Path, tuple]) -> None:
    """``results``: by checkpoint (a file, or the folder of a run) its :class:`MANNConfig` and the accuracies by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    folders = {path: path if path.is_dir() else path.parent for path in results}
    plot_learning(left, {str(folder): read_log(folder) for folder in folders.values()})

    def label(path: Path, name: str) -> str:
        if len(results) == 1:
            return name
        return f"{folders[path]}, {name}" if len(results[path][1]) > 1 else str(folders[path])

    plot_presentations(right, {label(path, name): each for path, (_, columns) in results.items() for name, each in columns.items()},
                       chance(next(iter(results.values()))[0]))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def chance(config) -> float:
    """Of a guess at a class never seen: one of the classes, or of all the strings."""
    groups, kinds = label_shape(config.labels, config.classes)
    return kinds ** -groups
