"""Training and evaluation of few-shot classifiers: what ``fastmeta train``, ``evaluate`` and ``demo`` run."""

from .checkpoint import load_checkpoint, save_checkpoint
from .evaluation import Accuracy, evaluate, evaluate_pixels
from .matching import MatchingConfig, build, load_model, train

__all__ = ["Accuracy", "MatchingConfig", "build", "evaluate", "evaluate_pixels", "load_checkpoint", "load_model", "save_checkpoint",
           "train"]
