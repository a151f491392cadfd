"""Training a Matching Network."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from ..data import Episode
from ..reference import cosine_attention
from .run import LAYERS, Run, check_config

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
        check_config(self, "way", "shot", "queries", "channels")
        if self.fce_steps is not None and not self.fce:
            raise ValueError("fce_steps has no meaning without fce")


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


class MatchingRun(Run):
    """Every episode has a forward pass of its own: its batch normalisation uses its own statistics, as at one episode a step, and the
    gradient of a step is the mean over its episodes however many processes share them."""

    name = "matching"

    build_model = staticmethod(build)

    @staticmethod
    @torch.no_grad()
    def attention(model: nn.Module, episode: Episode) -> Tensor:
        """``[Q, S]``, what each query gives to each support: the attention's output when the value of a support is its own unit vector."""
        support, query = model.features(episode.support, episode.query, 0)
        return cosine_attention(query, support, torch.eye(len(support)), **model.attention.options())

    def accumulate(self, numbers: range) -> Tensor:
        config = self.config
        before = [buffer.clone() for buffer in self.model.buffers()]
        self.buffers = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in before]
        means = torch.zeros(self.measures, dtype=torch.float64)
        for number in numbers:
            # Every episode moves the running statistics from the same start; the step keeps the mean, whoever saw which episode.
            for buffer, start in zip(self.model.buffers(), before):
                buffer.copy_(start)
            more = self.world > 1 and number != numbers[-1]
            with self.replica.no_sync() if more else contextlib.nullcontext():  # gradients are exchanged at the last episode
                episode = self.episodes[number]
                log_probs = self.replica(episode.support, episode.support_labels, episode.query, num_classes=config.way)
                loss = nll_loss(log_probs, episode.query_labels)
                (loss / len(numbers)).backward()
            for total, buffer in zip(self.buffers, self.model.buffers()):
                total += buffer / config.episodes_per_batch
            means[0] += loss.item() / config.episodes_per_batch
            means[1] += (log_probs.argmax(-1) == episode.query_labels).double().mean() / config.episodes_per_batch
        return means

    def exchanged(self) -> list[Tensor]:
        return self.buffers

    def finish(self) -> None:
        for buffer, total in zip(self.model.buffers(), self.buffers):
            buffer.copy_(total)

    def line(self, means: list[float]) -> dict:
        line = super().line(means)
        return line | {"scale": round(self.model.attention.scale.item(), 4)} if self.config.learn_scale else line
