"""The papers in plain PyTorch: layers to be read beside the equations, and what every kernel is tested against."""

from .augmented_pool import augmented_pool
from .conv4 import Conv4
from .coordinate_generator import CoordinateLSTM, CoordinateMLP, coordinate_lstm, coordinate_mlp, preprocess_gradient
from .cosine_attention import CosineAttention, cosine_attention, cosine_scores, matching_log_probs
from .full_context import QueryEncoder, SupportEncoder
from .lrua_memory import LRUAMemory, LRUAState, lrua_step, lrua_write, memory_read
from .mann import MANN, LSTMBaseline, MANNCell
from .mann_episode import MANNState, mann_episode
from .matching_network import MatchingNetwork
from .meta_network import AugmentedLearner, MetaNetwork

__all__ = ["AugmentedLearner", "Conv4", "CoordinateLSTM", "CoordinateMLP", "CosineAttention", "LRUAMemory", "LRUAState", "LSTMBaseline", "MANN",
           "MANNCell", "MANNState", "MatchingNetwork", "MetaNetwork", "QueryEncoder", "SupportEncoder", "augmented_pool", "coordinate_lstm",
           "coordinate_mlp", "cosine_attention", "cosine_scores", "lrua_step", "lrua_write", "mann_episode", "matching_log_probs", "memory_read",
           "preprocess_gradient"]
