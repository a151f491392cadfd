"""A training run: it follows from its configuration, and goes on after a kill as if nothing had happened.

Each step draws its episodes by number, so there is no random state to save, and processes share a run by sharing out the numbers.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import nn as fast
from .. import reference
from ..data import Episodes, LabelledImages, Split
from ..data.cache import atomic_write
from .checkpoint import load_checkpoint, save_checkpoint
from .evaluation import evaluate
from .progress import Progress

LAYERS = {"fast": fast, "reference": reference}


def check_config(config, *positive: str) -> None:
    """``ValueError`` for a number that no run can have; ``positive``: the fields that must be, beside those of every run."""
    for name in (*positive, "episodes_per_batch", "steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if getattr(config, "clip", 0) < 0:
        raise ValueError(f"clip must not be negative, got {config.clip}")
    if config.eval_every and not config.validation_classes:
        raise ValueError("eval_every needs classes to evaluate on: hold some out with validation_classes")


def train(kind: type["Run"], config, data: Split, out: Path, *, resume: bool = False, checkpoint_every: int = 200) -> int:
    """Train to the end of ``config.steps``, or until SIGINT or SIGTERM; returns 0, or the number of that signal.

    ``out`` gets ``checkpoint.pt`` (every ``checkpoint_every`` steps, and at the end) and ``log.jsonl``: one line of means for each
    400th of the run, ``accuracy`` being that of the training queries. With ``resume`` the run in ``out`` goes on, or starts.
    Under torchrun the episodes of a step are shared out among the processes. Raises ``ValueError`` where they do not share out
    evenly, where ``out`` holds a run already and ``resume`` is not set, or where it holds one of another configuration.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    with _processes() as (rank, world):
        if config.episodes_per_batch % world:
            raise ValueError(f"{config.episodes_per_batch} episodes a step cannot be shared evenly by {world} processes")
        return kind(config, data, Path(out), resume, rank, world).train(checkpoint_every)


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), in a process group when torchrun started us."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class Run:
    """The parts that every model shares. A subclass says what the model is, what a step does, and what is worth a line of the log.

    ``config`` is a frozen dataclass with at least ``steps``, ``episodes_per_batch``, ``lr``, ``seed``, ``rotations``, ``distortion``,
    ``validation_classes`` and ``eval_every``; ``clip`` too, unless a subclass finishes a step in another way.
    Episodes are N-way K-shot ones, for which it has ``way``, ``shot`` and ``queries``, unless a subclass draws others.
    """

    name: str  # on the command line
    measures = 2  # numbers that a step reports: loss, accuracy, …

    def __init__(self, config, data: Split, out: Path, resume: bool, rank: int, world: int):
        self.config, self.data, self.out, self.rank, self.world = config, data, out, rank, world
        self.model = self.build_model(config).train()
        self.replica = DistributedDataParallel(self.model, broadcast_buffers=False) if world > 1 else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.lr)
        self.step, self.seconds = 0, 0.0
        self.window = torch.zeros(self.measures + 1, dtype=torch.float64)  # since the last line of the log: measures, steps
        self.log_every = math.ceil(config.steps / 400)
        self.episodes = self.draw(data.train.rotated() if config.rotations else data.train, seed=config.seed, distortion=config.distortion,
                                  length=config.steps * config.episodes_per_batch)

        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            if not resume:
                raise ValueError(f"{out} holds a run already: go on with --resume, or choose another --out")
            self._restore(load_checkpoint(checkpoint))
        if world > 1:
            dist.barrier()  # nobody may take the checkpoint that rank 0 writes now for one that was there
        if rank == 0:
            self._trim_log()
            if not checkpoint.exists():
                self._save()  # an early kill, or a folder that cannot be written, shows now

    @staticmethod
    def build_model(config) -> nn.Module:
        """The untrained network, its weights drawn from the seed."""
        raise NotImplementedError

    def draw(self, images: LabelledImages, **options):
        """The data set of the run's episodes; ``options`` are their seed, length and distortion."""
        config = self.config
        return Episodes(images.images, images.labels, way=config.way, shot=config.shot, queries=config.queries, **options)

    def accumulate(self, numbers: range) -> Tensor:
        """Forward and backward of these episodes, this process' share of a step; returns its part of the means over the step."""
        raise NotImplementedError

    def exchanged(self) -> list[Tensor]:
        """What else is summed over the processes of a step; after it, :meth:`finish`."""
        return []

    def finish(self) -> None:
        """After the gradients are complete, before the optimizer's step: ``config.clip`` is the largest norm of the gradient, 0 for any."""
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def line(self, means: list[float]) -> dict:
        """What of the means of ``measures`` goes into the log, ``loss`` and ``accuracy`` among it."""
        return {"loss": round(means[0], 5), "accuracy": round(means[1], 5)}

    def validate(self) -> tuple[object, str]:
        """Accuracy on the held-out classes: for the log, and in words."""
        config = self.config
        # 200 episodes: an interval of about half a percent, enough to see a curve.
        validation = evaluate(self.model, self.data.validation, way=config.way, shot=config.shot, queries=config.queries, episodes=200,
                              seed=config.seed)
        return round(validation.mean, 5), str(validation)

    def _restore(self, state: dict) -> None:
        theirs = state["config"]
        different = [f"{name} is {theirs.get(name)!r} there, {value!r} here" for name, value in asdict(self.config).items()
                     if theirs.get(name) != value]
        if kind_of(state) != self.name:
            different = [f"it trains {kind_of(state)}"]
        if different:
            raise ValueError(f"{self.out} holds another run: {'; '.join(different)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.window = state["step"], state["seconds"], state["window"]

    def _save(self) -> None:
        if self.rank == 0:
            save_checkpoint(self.out / "checkpoint.pt", {
                "kind": self.name, "config": asdict(self.config), "step": self.step, "seconds": self.seconds, "window": self.window,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def _trim_log(self) -> None:
        """Drop the lines of steps that the checkpoint does not know: they will be made, and written, again."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.out / "log.jsonl").read_text().splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # the last line may be cut short
                    if json.loads(line)["step"] <= self.step:
                        lines.append(line)
        with atomic_write(self.out / "log.jsonl") as file:
            file.write("".join(lines).encode())

    def train(self, checkpoint_every: int) -> int:
        config, first, before = self.config, self.step, self.seconds
        started = time.perf_counter() - before
        progress = Progress("step", config.steps, done=self.step, episodes=config.episodes_per_batch, enabled=self.rank == 0)
        with _Signals() as signals, open(self.out / "log.jsonl" if self.rank == 0 else os.devnull, "a") as log:
            while self.step < config.steps:
                stop = self._train_step(signals.received)
                self.seconds = time.perf_counter() - started
                if self.step % self.log_every == 0 or self.step == config.steps:
                    line = self.line((self.window[:-1] / self.window[-1]).tolist())
                    self.window.zero_()
                    print(json.dumps({"step": self.step, **line, "seconds": round(self.seconds, 1)}), file=log, flush=True)
                    progress.show(self.step, f"loss {line['loss']:.4f}  accuracy {100 * line['accuracy']:5.1f}%")
                if config.eval_every and self.step % config.eval_every == 0 and self.rank == 0:
                    validation, words = self.validate()
                    print(json.dumps({"step": self.step, "validation": validation}), file=log, flush=True)
                    progress.note(f"step {self.step}  held-out classes {words}")
                if stop or self.step % checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                if stop and self.step < config.steps:
                    progress.note(f"stopped after step {self.step} of {config.steps}")
                    return stop
        progress.note(f"{config.steps - first} steps in {self.seconds - before:.0f} s")
        return 0

    def _train_step(self, signal_received: int) -> int:
        """One update; returns the signal that any process has received, so that all stop after the same step."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * self.step / config.steps)) / 2
        mine = config.episodes_per_batch // self.world
        first = self.step * config.episodes_per_batch + self.rank * mine
        means = self.accumulate(range(first, first + mine))
        stop = torch.tensor(signal_received)
        if self.world > 1:
            for total in (means, *self.exchanged()):
                dist.all_reduce(total)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        self.finish()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window += torch.cat([means, torch.ones(1, dtype=torch.float64)])
        return int(stop)


def kind_of(state: dict) -> str:
    """The name of the model in a checkpoint; Matching Networks were alone once, and had none."""
    return state.get("kind", "matching")


class _Signals:
    """Within the ``with``, SIGINT and SIGTERM only leave a note, for the step to end in peace; a second one does what it always did."""

    def __init__(self):
        self.received = 0

    def _receive(self, number: int, frame) -> None:
        self.received = number
        signal.signal(number, self.before[number])

    def __enter__(self) -> "_Signals":
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
