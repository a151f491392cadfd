"""The table and the plot of what ``pytest bench/ --benchmark-json bench.json`` measured.

Every number comes from the JSON, the marks that were to be reached included. Ratios are taken within a run, where the peers were
timed in turns; of several runs of the same race the median ratio counts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

OURS, FLOOR = "fastmeta", "floor"  # the floor is no peer: it leaves out everything but the matrix products


@dataclass(frozen=True)
class Race:
    """One operation at one shape, forward or forward and backward."""

    operation: str
    axes: str
    shape: tuple[int, ...]
    backward: bool
    mark: float | None  # how many times faster than the best peer we had to be
    seconds: float  # of ours
    times: dict[str, float]  # {peer: times as long as ours}, the floor among them
    peaks: dict[str, int]  # {peer, ours among them: bytes}

    @property
    def peers(self) -> dict[str, float]:
        return {peer: ratio for peer, ratio in self.times.items() if peer != FLOOR}

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        return min(self.peers, key=self.peers.get, default=None)

    @property
    def reached(self) -> bool | None:
        return None if self.mark is None or self.best is None else self.peers[self.best] >= self.mark


def _read(paths) -> tuple[list[Race], list[dict]]:
    """The races, in the order of the files, and the machine of each file."""
    groups, machines = {}, []
    for path in paths:
        run = json.loads(Path(path).read_text())
        machines.append(run["machine_info"])
        for entry in run["benchmarks"]:
            if "operation" in entry["extra_info"]:
                groups.setdefault(entry["group"], {}).setdefault(len(machines), {})[entry["extra_info"]["peer"]] = entry
    races = [_race([run for run in runs.values() if OURS in run]) for runs in groups.values()
             if any(OURS in run for run in runs.values())]
    return races, machines


def _race(runs: list[dict[str, dict]]) -> Race:
    """``runs``: for each run ``{peer: its entry in the JSON}``."""
    def over_runs(peer, number):
        numbers = [number(run, run[peer]) for run in runs if peer in run]
        numbers = [n for n in numbers if n is not None]
        return median(numbers) if numbers else None

    def seconds(run, entry):
        return entry["stats"]["median"]

    peers = list(dict.fromkeys(peer for run in runs for peer in run))
    peaks = {peer: over_runs(peer, lambda run, entry: entry["extra_info"]["peak_bytes"]) for peer in peers}
    about = runs[-1][OURS]["extra_info"]
    return Race(about["operation"], about["axes"], tuple(about["shape"]), about["backward"], about["mark"],
                over_runs(OURS, seconds),
                {peer: over_runs(peer, lambda run, entry: seconds(run, entry) / seconds(run, run[OURS])) for peer in peers if peer != OURS},
                {peer: peak for peer, peak in peaks.items() if peak is not None})


def _sections(races: list[Race]) -> dict[tuple[str, bool], list[Race]]:
    sections = {}
    for race in races:
        sections.setdefault((race.operation, race.backward), []).append(race)
    return sections


def _pass(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _megabytes(race: Race) -> str:
    if OURS not in race.peaks:
        return ""
    text = f"{race.peaks[OURS] / 1e6:.1f}"
    others = {peer: race.peaks[peer] for peer in race.peers if peer in race.peaks}
    least = min(others, key=others.get, default=None)
    return text if least is None else f"{text} ({least} {others[least] / 1e6:.1f})"


def _row(race: Race, peers: list[str], floor: bool) -> list[str]:
    cells = [_shape(race.shape), f"{race.seconds * 1e3:.3g}"]
    for peer in peers:
        cell = _times(race.peers[peer]) if peer in race.peers else ""
        cells.append(f"**{cell}**" if peer == race.best else cell)
    if floor:
        cells.append(_times(1 / race.times[FLOOR]) if FLOOR in race.times else "")
    cells.append("" if race.reached is None else f"{race.mark:g}x: {'reached' if race.reached else 'missed'}")
    return [*cells, _megabytes(race)]


def _machine(machine: dict) -> str:
    cpu = machine.get("cpu", {})
    ours = machine.get("fastmeta", {})
    text = (f"{cpu.get('brand_raw', machine.get('machine', '?'))}, {ours.get('threads', '?')} threads, torch {ours.get('torch', '?')}, "
            f"fastmeta backend {ours.get('backend', '?')}, OMP_WAIT_POLICY {ours.get('wait_policy', '?')}")
    return text + (". **A --quick run: it shows that things work, and measures nothing.**" if ours.get("quick") else "")


def report(paths, plot=None) -> str:
    """Markdown tables of benchmark JSON files, and with ``plot`` (a path) their picture.

    Args:
        paths: files written by ``pytest bench/ --benchmark-json FILE``; one path, or several runs.
        plot: where to write a PNG (or whatever matplotlib makes of the suffix); None for no picture.

    Raises:
        ValueError: no file holds a race of ``bench/`` with fastmeta in it.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    races, machines = _read(paths)
    if not races:
        raise ValueError(f"bench-report: no fastmeta benchmarks in {', '.join(map(str, paths))}")
    lines = []
    for (operation, backward), rows in _sections(races).items():
        peers = list(dict.fromkeys(peer for race in rows for peer in race.peers))
        floor = any(FLOOR in race.times for race in rows)
        heads = [f"({', '.join(rows[0].axes)})", "fastmeta ms", *(f"vs {peer}" for peer in peers), *(["time / floor"] if floor else []),
                 "mark", "peak MB (least of the peers)"]
        table = [heads, *(_row(race, peers, floor) for race in rows)]
        kept = [i for i in range(len(heads)) if any(row[i] for row in table[1:])]
        lines += [f"### {operation}, {_pass(backward)}", ""]
        for i, row in enumerate(table):
            lines.append("| " + " | ".join(row[k] for k in kept) + " |")
            if i == 0:
                lines.append("|" + "---|" * len(kept))
        lines.append("")
    lines.append("`vs`: how many times as long the peer takes, above 1x fastmeta is faster; bold: the fastest peer, the one the mark is for. "
                 "`time / floor`: fastmeta's time over that of the matrix products alone.")
    lines += dict.fromkeys(_machine(machine) for machine in machines)
    if plot is not None:
        _plot(races, plot)
    return "\n".join(lines)


_COLORS = {"eager": "#0072B2", "SDPA": "#E69F00", "compile": "#009E73", "easyfsl": "#CC79A7", "reference": "#56B4E9"}


def _plot(races: list[Race], path) -> None:
    """Speed-up over every peer: one line a shape, a dot a peer, forward beside forward and backward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = list(dict.fromkeys((race.operation, race.shape) for race in races))
    operations = list(dict.fromkeys(operation for operation, _ in lines))
    height = {line: i + 1.1 * (operations.index(line[0]) + 1) for i, line in enumerate(lines)}  # an operation starts with its title
    bottom = max(height.values()) + 0.8

    figure = Figure(figsize=(11, 0.31 * bottom + 1.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, backward in zip(panels, (False, True)):
        axes.set_title(_pass(backward), fontsize=11)
        axes.axvspan(1e-3, 1, color="#d55e00", alpha=0.08, lw=0)
        axes.axvline(1, color="#555555", lw=1)
        for race in races:
            if race.backward != backward or not race.peers:
                continue
            y, best = height[race.operation, race.shape], race.peers[race.best]
            axes.plot([1, best], [y, y], color="#bbbbbb", lw=3, solid_capstyle="butt", zorder=1)
            for peer, ratio in race.peers.items():
                if peer != race.best:
                    axes.plot(ratio, y, "o", ms=5, mfc="none", mec=_COLORS.get(peer, "#888888"), mew=1.3, zorder=3)
            axes.plot(best, y, "o", ms=8, color=_COLORS.get(race.best, "#888888"), zorder=4)
            axes.annotate(_times(best), (best, y), (0, 5.5), textcoords="offset points", ha="center", va="bottom", fontsize=7.5, zorder=5,
                          bbox={"boxstyle": "square,pad=0.05", "color": "white", "alpha": 0.85})
            if race.mark is not None:
                axes.plot([race.mark] * 2, [y - 0.36, y + 0.36], color="black", lw=1.6, zorder=2)
        shown = [ratio for race in races if race.backward == backward for ratio in (*race.peers.values(), race.mark or 1)] or [1]
        axes.set_xscale("log")
        axes.set_xlim(min(0.7, 0.85 * min(shown)), 1.25 * max(2, *shown))
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.set_xlabel("times faster than the peer", fontsize=9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(bottom, 0)
    panels[0].set_yticks(list(height.values()), [_shape(shape) for _, shape in lines], fontsize=8.5)
    for operation in operations:
        first = min(height[line] for line in lines if line[0] == operation)
        axes_of = next(race.axes for race in races if race.operation == operation)
        panels[0].annotate(f"{operation} ({', '.join(axes_of)})", (-0.01, first - 0.95), xycoords=("axes fraction", "data"), ha="right",
                           va="center", fontsize=9, weight="bold", annotation_clip=False)

    used = dict.fromkeys(peer for race in races for peer in race.peers)
    keys = [Line2D([], [], ls="", marker="o", ms=6, color=_COLORS.get(peer, "#888888"), label=peer) for peer in used]
    keys += [Line2D([], [], ls="", marker="o", ms=8, color="#555555", label="fastest peer (number)"),
             Line2D([], [], ls="", marker="o", ms=5, mfc="none", mec="#555555", label="other peers")]
    if any(race.mark is not None for race in races):
        keys.append(Line2D([], [], ls="", marker="|", ms=10, mew=1.6, color="black", label="mark"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    figure.savefig(path)
