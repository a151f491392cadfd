"""The generators of Meta Networks as one operation each: equal to :mod:`fastmeta.reference.coordinate_generator`."""

from torch import Tensor

from .. import functional, reference


class CoordinateMLP(reference.CoordinateMLP):
    __doc__ = reference.CoordinateMLP.__doc__

    def forward(self, gradients: Tensor) -> Tensor:
        return functional.coordinate_mlp(gradients, *self.parameters())


class CoordinateLSTM(reference.CoordinateLSTM):
    __doc__ = reference.CoordinateLSTM.__doc__

    def forward(self, gradients: Tensor) -> Tensor:
        cell = self.cell
        return functional.coordinate_lstm(gradients, cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh, *self.output.parameters())
