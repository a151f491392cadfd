"""The Matching Network of fast layers."""

from .. import functional, reference
from .full_context import QueryEncoder, SupportEncoder


class MatchingNetwork(reference.MatchingNetwork):
    __doc__ = reference.MatchingNetwork.__doc__

    support_encoder_type = SupportEncoder
    query_encoder_type = QueryEncoder
    matching_log_probs = staticmethod(functional.matching_log_probs)
