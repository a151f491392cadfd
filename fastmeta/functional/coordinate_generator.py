"""The generators of Meta Networks (Munkhdalai & Yu, 2017, section 3.1): from gradients to fast weights, coordinate by coordinate."""

import torch
from torch import Tensor

from .. import _backend, reference, schemas
from ._arguments import prepare, restore, without_autocast
from ._autograd import differentiable_on_all

_operations = differentiable_on_all(schemas.coordinate_mlp, schemas.coordinate_lstm)


def coordinate_mlp(gradients: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, weight_3: Tensor, bias_3: Tensor, *,
                   backend: str | None = None) -> Tensor:
    """A perceptron 2 - W - W - 1 on every coordinate of a gradient by itself.

    ::

        x = [max(log(|D| + eps) / p, -1), clip(e^p D, -1, 1)]        p = 7, eps = 2^-23
        weight_3 relu(weight_2 relu(weight_1 x + bias_1) + bias_2) + bias_3

    Args:
        gradients: ``[*]``, D; float32, float64, float16 or bfloat16; any strides.
        weight_1, bias_1, weight_2, bias_2, weight_3, bias_3: ``[W, 2]``, ``[W]``, ``[W, W]``, ``[W]``, ``[1, W]``, ``[1]``, same dtype.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for :func:`fastmeta.use_backend`, ``FASTMETA_BACKEND``, or the fastest that can run.

    Returns:
        ``[*]`` in the dtype of ``gradients``; computed in float32 at least. Inside autocast it runs in float32. Neither direction keeps more
        than its arguments and results: the backward computes the hidden layers again. The second derivative runs the reference.

    Raises:
        TypeError: what is not a tensor, or has the wrong dtype.
        ValueError: shapes that do not fit.
        RuntimeError: an explicit backend that cannot run.
    """
    return _generate("coordinate_mlp", gradients, "M", {
        "weight_1": (weight_1, "W 2"), "bias_1": (bias_1, "W"), "weight_2": (weight_2, "W W"), "bias_2": (bias_2, "W"),
        "weight_3": (weight_3, "1 W"), "bias_3": (bias_3, "1")}, backend)


def coordinate_lstm(gradients: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, output_weight: Tensor, output_bias: Tensor, *,
                    backend: str | None = None) -> Tensor:
    """An LSTM of width W on every coordinate by itself, along T gradients, and a linear layer on its last output.

    ::

        x_t = [max(log(|D_t| + eps) / p, -1), clip(e^p D_t, -1, 1)]        p = 7, eps = 2^-23
        i, f, g, o = weight_ih x_t + weight_hh h_{t-1} + bias              gates in torch's order, h_0 = c_0 = 0
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);   h_t = sigmoid(o) tanh(c_t)
        output_weight h_T + output_bias

    Args:
        gradients: ``[T, *]``, T >= 1; the rest as in :func:`coordinate_mlp`.
        weight_ih, weight_hh, bias: ``[4W, 2]``, ``[4W, W]``, ``[4W]``.
        output_weight, output_bias: ``[1, W]``, ``[1]``.
        backend: as in :func:`coordinate_mlp`, and so is all that is said there of results and errors.

    Returns:
        ``[*]``.
    """
    name = "coordinate_lstm"
    if isinstance(gradients, Tensor) and (not gradients.dim() or not gradients.shape[0]):
        raise ValueError(f"{name}: gradients must be [T, *] with T >= 1, got shape {list(gradients.shape)}")
    width = max(1, weight_ih.shape[0] // 4) if isinstance(weight_ih, Tensor) and weight_ih.dim() else 1
    return _generate(name, gradients, "T M", {
        "weight_ih": (weight_ih, "4W 2"), "weight_hh": (weight_hh, "4W W"), "bias": (bias, "4W"), "output_weight": (output_weight, "1 W"),
        "output_bias": (output_bias, "1")}, backend, {"W": width, "4W": 4 * width})


def _generate(name: str, gradients, letters: str, weights: dict, backend, sizes: dict | None = None) -> Tensor:
    """``letters``: of the gradients, with their coordinates in one dimension."""
    flat, steps = gradients, len(letters.split()) - 1
    if isinstance(gradients, Tensor) and gradients.layout is torch.strided:
        flat = gradients.flatten(steps) if gradients.dim() > steps else gradients.unsqueeze(steps)
    given = prepare(name, {"gradients": (flat, letters), **weights}, sizes)
    if not given.sizes["W"]:
        raise ValueError(f"{name}: the width W must be at least 1, got 0")
    chosen = _backend.select(backend, flat.device.type, name)
    if chosen == "reference":
        with without_autocast(given.autocast, flat.device.type):
            result = getattr(reference, name)(*given.tensors)
    else:
        result, = _operations[chosen, name](*given.tensors)
    return restore((result,), given.dtype)[0].view(gradients.shape[steps:])
