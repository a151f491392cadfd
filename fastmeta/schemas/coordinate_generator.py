"""``fastmeta::coordinate_mlp`` and ``fastmeta::coordinate_lstm``, forward and backward.

gradients ``[M]``, or of the LSTM ``[T, M]``, T >= 1, of M coordinates; the weights as in ``fastmeta.functional``, of any width W >= 1; float32 or
float64, any strides. The forward keeps nothing for the backward, which computes again what it needs.
"""

from .. import reference
from .operation import Operation


def _operation(name: str, arguments: str, tensors: int) -> Operation:
    function = getattr(reference, name)
    return Operation(name, arguments, tensors=tensors, gradients=tuple(range(tensors)), results=1, visible=1, folds=False,
                     reference=lambda *tensors: (function(*tensors),),
                     fake=lambda gradients, *weights: (gradients.new_empty(gradients.shape[-1]),))


coordinate_mlp = _operation("coordinate_mlp", "Tensor gradients, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2, "
                            "Tensor weight_3, Tensor bias_3", tensors=7)
coordinate_lstm = _operation("coordinate_lstm", "Tensor gradients, Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor output_weight, "
                             "Tensor output_bias", tensors=6)
