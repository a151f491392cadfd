"""Training a Matching Network: a run follows from its configuration, and goes on after a kill as if nothing had happened.

Each step draws its episodes by number, so there is no random state to save. Every episode has a forward pass of its own: its batch
normalisation uses its own statistics, as at one episode a step, and the gradient of a step is the mean over its episodes however many
processes share them.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel

from .. import nn as fast
from .. import reference
from ..data import Episodes, Split
from ..data.cache import atomic_write
from .checkpoint import load_checkpoint, save_checkpoint
from .evaluation import evaluate

LAYERS = {"fast": fast, "reference": reference}
ENCODERS = {"conv4": "Conv4"}  # the name on the command line, and the layer's
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class MatchingConfig:
    """All that a run's result depends on, beside the data and the number of threads."""

    data: str = "glyphs"
    way: int = 20
    shot: int = 1
    queries: int = 5
    episodes_per_batch: int = 1
    steps: int = 2000
    lr: float = 3e-3
    seed: int = 0
    encoder: str = "conv4"
    channels: int = 64
    fce: bool = False
    fce_steps: int | None = None
    scale: float = 30.0
    learn_scale: bool = False
    normalize: str = "both"
    rotations: bool = False
    distortion: float = 0.0
    validation_classes: int = 0
    eval_every: int = 0
    precision: str = "float32"
    layers: str = "fast"

    def __post_init__(self):
        for name in ("way", "shot", "queries", "episodes_per_batch", "steps", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fce_steps is not None and not self.fce:
            raise ValueError("fce_steps has no meaning without fce")
        if self.eval_every and not self.validation_classes:
            raise ValueError("eval_every needs classes to evaluate on: hold some out with validation_classes")


def build(config: MatchingConfig) -> nn.Module:
    """The untrained network, its weights drawn from the seed."""
    layers = LAYERS[config.layers]
    torch.manual_seed(config.seed)
    # Channels last: a third faster on the CPU.
    embedding = getattr(layers, ENCODERS[config.encoder])(1, config.channels).to(memory_format=torch.channels_last)
    if config.precision == "bfloat16":
        _train_in_bfloat16(embedding)
    return layers.MatchingNetwork(embedding, config.channels, fce=config.fce, fce_steps=config.fce_steps, scale=config.scale,
                                  learn_scale=config.learn_scale, normalize=config.normalize)


def _train_in_bfloat16(module: nn.Module) -> None:
    """Autocast inside the embedding while it trains; its features, and so the attention, stay float32, and so does evaluation."""
    forward = module.forward

    def autocast(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=module.training):
            return forward(images).float()

    module.forward = autocast


def load_model(path: Path, layers: str | None = None) -> tuple[nn.Module, MatchingConfig]:
    """The network of a checkpoint (a file, or the folder of a run), in evaluation mode, and its configuration.

    ``layers``: ``fast`` or ``reference``, both take the same weights; None for those that it was trained with.
    """
    state = load_checkpoint(path)
    config = MatchingConfig(**state["config"])
    config = replace(config, layers=layers or config.layers)
    model = build(config)
    model.load_state_dict(state["model"])
    return model.eval(), config


def train(config: MatchingConfig, data: Split, out: Path, *, resume: bool = False, checkpoint_every: int = 200) -> int:
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
        return _Run(config, data, Path(out), resume, rank, world).train(checkpoint_every)


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


class _Run:
    def __init__(self, config: MatchingConfig, data: Split, out: Path, resume: bool, rank: int, world: int):
        self.config, self.data, self.out, self.rank, self.world = config, data, out, rank, world
        self.model = build(config).train()
        self.replica = DistributedDataParallel(self.model, broadcast_buffers=False) if world > 1 else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.lr)
        self.step, self.seconds = 0, 0.0
        self.window = torch.zeros(3, dtype=torch.float64)  # since the last line of the log: loss, accuracy, steps
        self.log_every = math.ceil(config.steps / 400)
        images = data.train.rotated() if config.rotations else data.train
        self.episodes = Episodes(images.images, images.labels, way=config.way, shot=config.shot, queries=config.queries, seed=config.seed,
                                 length=config.steps * config.episodes_per_batch, distortion=config.distortion)

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

    def _restore(self, state: dict) -> None:
        theirs = state["config"]
        different = [f"{name} is {theirs.get(name)!r} there, {value!r} here" for name, value in asdict(self.config).items()
                     if theirs.get(name) != value]
        if different:
            raise ValueError(f"{self.out} holds another run: {'; '.join(different)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.window = state["step"], state["seconds"], state["window"]

    def _save(self) -> None:
        if self.rank == 0:
            save_checkpoint(self.out / "checkpoint.pt", {
                "config": asdict(self.config), "step": self.step, "seconds": self.seconds, "window": self.window,
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
        progress = _Progress(config, self.step, enabled=self.rank == 0)
        with _Signals() as signals, open(self.out / "log.jsonl" if self.rank == 0 else os.devnull, "a") as log:
            while self.step < config.steps:
                stop = self._train_step(signals.received)
                self.seconds = time.perf_counter() - started
                if self.step % self.log_every == 0 or self.step == config.steps:
                    loss, accuracy = (self.window[:2] / self.window[2]).tolist()
                    self.window.zero_()
                    line = {"step": self.step, "loss": round(loss, 5), "accuracy": round(accuracy, 5), "seconds": round(self.seconds, 1)}
                    if config.learn_scale:
                        line["scale"] = round(self.model.attention.scale.item(), 4)
                    print(json.dumps(line), file=log, flush=True)
                    progress.show(self.step, loss, accuracy)
                if config.eval_every and self.step % config.eval_every == 0 and self.rank == 0:
                    # 200 episodes: an interval of about half a percent, enough to see a curve.
                    validation = evaluate(self.model, self.data.validation, way=config.way, shot=config.shot, queries=config.queries,
                                          episodes=200, seed=config.seed)
                    print(json.dumps({"step": self.step, "validation": round(validation.mean, 5)}), file=log, flush=True)
                    progress.note(f"step {self.step}  held-out classes {validation}")
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
        before = [buffer.clone() for buffer in self.model.buffers()]
        after = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in before]
        totals = torch.zeros(2, dtype=torch.float64)  # loss, accuracy
        stop = torch.tensor(signal_received)
        for number in range(first, first + mine):
            # Every episode moves the running statistics from the same start; the step keeps the mean, whoever saw which episode.
            for buffer, start in zip(self.model.buffers(), before):
                buffer.copy_(start)
            more = self.world > 1 and number < first + mine - 1
            with self.replica.no_sync() if more else contextlib.nullcontext():  # gradients are exchanged at the last episode
                episode = self.episodes[number]
                log_probs = self.replica(episode.support, episode.support_labels, episode.query, num_classes=config.way)
                loss = nll_loss(log_probs, episode.query_labels)
                (loss / mine).backward()
            for total, buffer in zip(after, self.model.buffers()):
                total += buffer / config.episodes_per_batch
            totals[0] += loss.item() / config.episodes_per_batch
            totals[1] += (log_probs.argmax(-1) == episode.query_labels).double().mean() / config.episodes_per_batch
        if self.world > 1:
            for total in (totals, *after):
                dist.all_reduce(total)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        for buffer, total in zip(self.model.buffers(), after):
            buffer.copy_(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window += torch.cat([totals, torch.ones(1, dtype=torch.float64)])
        return int(stop)


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


class _Progress:
    """One line that is written over on a terminal; about twenty-five lines otherwise."""

    def __init__(self, config: MatchingConfig, step: int, enabled: bool):
        self.config, self.first, self.enabled = config, step, enabled
        self.started, self.tty = time.perf_counter(), sys.stdout.isatty()
        self.printed = step

    def show(self, step: int, loss: float, accuracy: float) -> None:
        if not self.enabled or not (self.tty or step == self.config.steps or step - self.printed >= self.config.steps / 25):
            return
        self.printed = step
        rate = (step - self.first) / (time.perf_counter() - self.started)
        left = round((self.config.steps - step) / rate)
        print(f"{chr(13) if self.tty else ''}step {step}/{self.config.steps}  loss {loss:.4f}  accuracy {100 * accuracy:5.1f}%  "
              f"{rate * self.config.episodes_per_batch:.1f} episodes/s  {left // 60}:{left % 60:02d} left ",
              end="" if self.tty else "\n", flush=True)

    def note(self, text: str) -> None:
        if self.enabled:
            print(f"{chr(10) if self.tty else ''}{text}", flush=True)
