"""The operations as functions: checked, dispatched to a backend, differentiable to any order."""

from .cosine_attention import cosine_attention, matching_log_probs

__all__ = ["cosine_attention", "matching_log_probs"]
