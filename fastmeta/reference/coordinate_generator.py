"""The generators of Meta Networks (Munkhdalai & Yu, 2017, section 3.1): from gradients to fast weights, coordinate by coordinate.

Every coordinate of a gradient goes through the same small network by itself, as in Andrychowicz et al. (2016), section 2.1, whose appendix A
has the preprocessing. m, of the base learner, is a perceptron of one gradient; d, of the embedding learner, an LSTM along T gradients.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREPROCESSING_P = 7.0
PREPROCESSING_EPS = 2.0**-23  # of float32 in every dtype, so that float64 is the same function


def preprocess_gradient(gradient: Tensor) -> Tensor:
    """The two channels in which a gradient enters a generator, ``[*] -> [*, 2]``: ``max(log(|D| + eps) / p, -1)``, ``clip(e^p D, -1, 1)``.

    Of a gradient above e^-p they tell the size and the sign; of a smaller one, the first is -1 and the second is proportional to it.
    """
    size = ((gradient.abs() + PREPROCESSING_EPS).log() / PREPROCESSING_P).clamp_min(-1)
    return torch.stack([size, (gradient * math.exp(PREPROCESSING_P)).clamp(-1, 1)], -1)


def coordinate_mlp(gradients: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, weight_3: Tensor,
                   bias_3: Tensor) -> Tensor:
    """See :func:`fastmeta.functional.coordinate_mlp`."""
    hidden = F.linear(preprocess_gradient(gradients), weight_1, bias_1).relu()
    hidden = F.linear(hidden, weight_2, bias_2).relu()
    return F.linear(hidden, weight_3, bias_3).squeeze(-1)


def coordinate_lstm(gradients: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, output_weight: Tensor, output_bias: Tensor) -> Tensor:
    """See :func:`fastmeta.functional.coordinate_lstm`."""
    h = c = gradients.new_zeros(*gradients.shape[1:], weight_hh.shape[1])
    for gradient in gradients:
        i, f, g, o = (F.linear(preprocess_gradient(gradient), weight_ih, bias) + F.linear(h, weight_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return F.linear(h, output_weight, output_bias).squeeze(-1)


class CoordinateMLP(nn.Module):
    """m: a perceptron 2 - width - width - 1 on every coordinate by itself, ``forward(gradients [*]) -> fast weights [*]``."""

    def __init__(self, width: int = 20):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, gradients: Tensor) -> Tensor:
        return coordinate_mlp(gradients, *self.parameters())


class CoordinateLSTM(nn.Module):
    """d: an LSTM on every coordinate by itself, along the T gradients, ``forward(gradients [T, *]) -> fast weights [*]``."""

    def __init__(self, width: int = 20):
        super().__init__()
        self.cell = nn.LSTMCell(2, width)
        self.output = nn.Linear(width, 1)

    def forward(self, gradients: Tensor) -> Tensor:
        cell = self.cell
        return coordinate_lstm(gradients, cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh, *self.output.parameters())
