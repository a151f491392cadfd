"""MANN of fast layers: an episode is one operation. The LSTM baseline is the reference layer: torch's LSTM is already fused."""

from .. import functional, reference
from ..reference import LSTMBaseline

__all__ = ["MANN", "LSTMBaseline", "MANNCell"]


class MANNCell(reference.MANNCell):
    __doc__ = reference.MANNCell.__doc__

    mann_episode = staticmethod(functional.mann_episode)


class MANN(reference.MANN):
    __doc__ = reference.MANN.__doc__

    mann_episode = staticmethod(functional.mann_episode)
