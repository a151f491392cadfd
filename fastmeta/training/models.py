"""The models that can be trained, by their name on the command line."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..data import Split
from . import mann, matching, metanet, run
from .checkpoint import load_checkpoint


class Model(NamedTuple):
    config: type
    run: type[run.Run]


MODELS = {each.name: Model(config, each) for config, each in ((matching.MatchingConfig, matching.MatchingRun),
                                                             (mann.MANNConfig, mann.MANNRun),
                                                             (metanet.MetaNetConfig, metanet.MetaNetRun))}


def run_of(config) -> type[run.Run]:
    """The model that this is a configuration of."""
    return next(model.run for model in MODELS.values() if model.config is type(config))


def build(config) -> nn.Module:
    """The untrained network of a configuration of one of the models, its weights drawn from the seed."""
    return run_of(config).build_model(config)


def train(config, data: Split, out: Path, *, resume: bool = False, checkpoint_every: int = 200) -> int:
    return run.train(run_of(config), config, data, out, resume=resume, checkpoint_every=checkpoint_every)


train.__doc__ = run.train.__doc__


def load_model(path: Path, layers: str | None = None) -> tuple[nn.Module, object]:
    """The network of a checkpoint (a file, or the folder of a run), in evaluation mode, and its configuration.

    ``layers``: ``fast`` or ``reference``, both take the same weights; None for those that it was trained with.
    """
    state = load_checkpoint(path)
    config = MODELS[run.kind_of(state)].config(**state["config"])
    config = replace(config, layers=layers or config.layers)
    model = build(config)
    model.load_state_dict(state["model"])
    return model.eval(), config
