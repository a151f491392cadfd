"""The end of an augmented convolution layer (Munkhdalai & Yu, 2017, section 3.3): slow and fast halves rectified, added and pooled."""

from torch import Tensor

from .. import _backend, reference, schemas
from ._arguments import prepare, restore, without_autocast
from ._autograd import differentiable_on_all

_operations = differentiable_on_all(schemas.augmented_pool)


def augmented_pool(slow: Tensor, fast: Tensor, *, backend: str | None = None) -> Tensor:
    """``max_pool2d(relu(slow) + relu(fast), 2, ceil_mode=True)``: at the lower and the right border, a part of a window counts.

    Args:
        slow: ``[N, C, H, W]``, float32, float64, float16 or bfloat16; any strides. What a layer's own weights give.
        fast: same shape and dtype, what its fast weights give.
        backend: ``"cpp"``, ``"reference"``, or None for :func:`fastmeta.use_backend`, ``FASTMETA_BACKEND``, or the fastest that can run.
            There is a kernel for the CPU; elsewhere PyTorch's own run.

    Returns:
        ``[N, C, ceil(H / 2), ceil(W / 2)]``. Of equal maxima the first has the gradient, as in PyTorch. Inside autocast it runs in float32. The
        second derivative runs the reference.

    Raises:
        TypeError: what is not a tensor, or has the wrong dtype.
        ValueError: shapes that do not fit.
        RuntimeError: an explicit backend that cannot run.
    """
    name = "augmented_pool"
    given = prepare(name, {"slow": (slow, "N C H W"), "fast": (fast, "N C H W")})
    if not given.sizes["H"] or not given.sizes["W"]:
        raise ValueError(f"{name}: an image must have at least one pixel, got H = {given.sizes['H']}, W = {given.sizes['W']}")
    chosen = _backend.select(backend, slow.device.type, name)
    if chosen == "reference":
        with without_autocast(given.autocast, slow.device.type):
            result = reference.augmented_pool(*given.tensors)
    else:
        result, = _operations[chosen, name](*given.tensors)
    return restore((result,), given.dtype)[0]
