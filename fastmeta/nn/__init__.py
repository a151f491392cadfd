"""The fast layers: constructor, forward and state_dict of the reference layer of the same name, computed by :mod:`fastmeta.functional`.

``Conv4`` is the reference layer itself: its convolutions are already the fast ones of oneDNN and cuDNN.
"""

from ..reference.conv4 import Conv4
from .coordinate_generator import CoordinateLSTM, CoordinateMLP
from .cosine_attention import CosineAttention
from .full_context import QueryEncoder, SupportEncoder
from .lrua_memory import LRUAMemory
from .mann import MANN, LSTMBaseline, MANNCell
from .matching_network import MatchingNetwork
from .meta_network import AugmentedLearner, MetaNetwork

__all__ = ["AugmentedLearner", "Conv4", "CoordinateLSTM", "CoordinateMLP", "CosineAttention", "LRUAMemory", "LSTMBaseline", "MANN", "MANNCell",
           "MatchingNetwork", "MetaNetwork", "QueryEncoder", "SupportEncoder"]
