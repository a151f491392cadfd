"""Training and evaluation of few-shot classifiers: what ``fastmeta train``, ``evaluate`` and ``demo`` run."""

from .checkpoint import load_checkpoint, save_checkpoint
from .evaluation import Accuracy, evaluate, evaluate_pixels, evaluate_presentations, evaluate_presentations_pixels
from .mann import MANNConfig
from .matching import MatchingConfig
from .metanet import MetaNetConfig
from .models import build, load_model, train

__all__ = ["Accuracy", "MANNConfig", "MatchingConfig", "MetaNetConfig", "build", "evaluate", "evaluate_pixels", "evaluate_presentations",
           "evaluate_presentations_pixels", "load_checkpoint", "load_model", "save_checkpoint", "train"]
