"""The papers in plain PyTorch: layers to be read beside the equations, and what every kernel is tested against."""

from .conv4 import Conv4
from .cosine_attention import CosineAttention, cosine_attention, cosine_scores, matching_log_probs
from .full_context import QueryEncoder, SupportEncoder
from .matching_network import MatchingNetwork

__all__ = ["Conv4", "CosineAttention", "MatchingNetwork", "QueryEncoder", "SupportEncoder", "cosine_attention", "cosine_scores",
           "matching_log_probs"]
