"""Kernels in Triton, for any GPU that Triton knows; importing this package imports triton.

A module an operation, with functions that take and give what the operation of that name in :mod:`fastmeta.schemas` does:
``cosine_attention``, ``cosine_attention_backward``, ``matching_log_probs``, ``matching_log_probs_backward``. Every kernel starts, and every result
is allocated, in :mod:`.launch`.
"""

from .cosine_attention import (cosine_attention, cosine_attention_backward, matching_log_probs, matching_log_probs_backward,
                               supports)

__all__ = ["cosine_attention", "cosine_attention_backward", "matching_log_probs", "matching_log_probs_backward", "supports"]
