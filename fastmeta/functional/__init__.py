"""The operations as functions: checked, dispatched to a backend, differentiable to any order."""

from .augmented_pool import augmented_pool
from .coordinate_generator import coordinate_lstm, coordinate_mlp
from .cosine_attention import cosine_attention, matching_log_probs
from .lrua_memory import lrua_step, lrua_write, memory_read
from .mann_episode import mann_episode

__all__ = ["augmented_pool", "coordinate_lstm", "coordinate_mlp", "cosine_attention", "lrua_step", "lrua_write", "mann_episode",
           "matching_log_probs", "memory_read"]
