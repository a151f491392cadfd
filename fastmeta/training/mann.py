"""Training MANN, or the LSTM alone, to classify what it is shown from what it was shown before (Santoro et al., 2016, section 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import LabelledImages
from ..data.sequences import Sequences, label_shape
from ..reference.mann import DEFAULT_PRESET
from .evaluation import by_presentation, evaluate_presentations, sequence_logits
from .run import LAYERS, Run, check_config

NETWORKS = ("mann", "lstm")


@dataclass(frozen=True)
class MANNConfig:
    """All that a run's result depends on, beside the data and the number of threads."""

    data: str = "glyphs"
    network: str = "mann"
    classes: int = 5
    presentations: int = 10
    labels: str = "one-hot"
    episodes_per_batch: int = 16
    steps: int = 20000
    lr: float = 1e-3
    clip: float = 10.0
    seed: int = 0
    preset: str = DEFAULT_PRESET
    strength: float | str | None = None
    hidden_size: int = 200
    memory_slots: int = 128
    memory_width: int = 40
    read_heads: int = 4
    usage_decay: float = 0.95
    side: int = 20
    rotations: bool = False
    distortion: float = 0.0
    validation_classes: int = 0
    eval_every: int = 0
    layers: str = "fast"

    def __post_init__(self):
        check_config(self, "classes", "presentations", "side")
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(map(repr, NETWORKS))}, got {self.network!r}")


def build(config: MANNConfig) -> nn.Module:
    """The untrained network, its weights drawn from the seed."""
    layers = LAYERS[config.layers]
    torch.manual_seed(config.seed)
    groups, kinds = label_shape(config.labels, config.classes)
    if config.network == "lstm":
        return layers.LSTMBaseline(config.side**2, groups * kinds, config.hidden_size)
    return layers.MANN(config.side**2, groups * kinds, config.hidden_size, config.memory_slots, config.memory_width, config.read_heads,
                       config.usage_decay, config.preset, strength=config.strength)


class MANNRun(Run):
    """A step is one batch of sequences. It reports the loss, the accuracy, and the accuracy at each presentation."""

    name = "mann"

    def __init__(self, config: MANNConfig, *arguments):
        self.measures = 2 + config.presentations
        super().__init__(config, *arguments)

    build_model = staticmethod(build)

    def draw(self, images: LabelledImages, **options) -> Sequences:
        config = self.config
        return Sequences(images, classes=config.classes, presentations=config.presentations, labels=config.labels, side=config.side, **options)

    def accumulate(self, numbers: range) -> Tensor:
        batch = self.episodes.batch(numbers)
        logits = sequence_logits(self.replica, batch, self.episodes.kinds)
        # The cross entropies of a label's symbols add up: it is right when all of them are.
        loss = cross_entropy(logits.flatten(0, 2), batch.symbols.flatten()) * self.episodes.groups
        loss.backward()
        right = (logits.argmax(-1) == batch.symbols).all(-1)
        each = by_presentation(right, batch.presentation, self.config.presentations)
        means = torch.cat([torch.stack([loss.detach(), right.float().mean()]), each.float().mean((1, 2))])
        return means.double() / self.world

    def line(self, means: list[float]) -> dict:
        return super().line(means) | {"presentations": [round(mean, 4) for mean in means[2:]]}

    def validate(self) -> tuple[object, str]:
        each = evaluate_presentations(self.model, self.data.validation, self.config, episodes=200, seed=self.config.seed)
        return [round(accuracy.mean, 4) for accuracy in each], describe(each)


def describe(each) -> str:
    """Accuracies by presentation in a line: the first, the second, the fifth and the tenth, as far as there are."""
    return "  ".join(f"{k}: {100 * each[k - 1].mean:.1f}%" for k in (1, 2, 5, 10) if k <= len(each))
