"""Kernels in Triton, for any GPU that Triton knows; importing this package imports triton.

The functions take and give what the operation of that name in :mod:`fastmeta.schemas` does, except that a label out of range is not
reported: it makes every log-probability of its episode NaN. Every kernel starts, and every result is allocated, in :mod:`.launch`.
"""

from .coordinate_generator import coordinate_lstm, coordinate_lstm_backward, coordinate_mlp, coordinate_mlp_backward
from .cosine_attention import (cosine_attention, cosine_attention_backward, matching_log_probs, matching_log_probs_backward,
                               supports)
from .lrua_memory import lrua_step, lrua_step_backward, lrua_write, lrua_write_backward, memory_read, memory_read_backward

__all__ = ["coordinate_lstm", "coordinate_lstm_backward", "coordinate_mlp", "coordinate_mlp_backward", "cosine_attention",
           "cosine_attention_backward", "lrua_step", "lrua_step_backward", "lrua_write", "lrua_write_backward", "matching_log_probs",
           "matching_log_probs_backward", "memory_read", "memory_read_backward", "supports"]
