"""``fastmeta::augmented_pool``, forward and backward: slow and fast ``[N, C, H, W]``, float32 or float64, any strides.

The backward finds the maxima again from the arguments.
"""

from .. import reference
from .operation import Operation

augmented_pool = Operation(
    "augmented_pool", "Tensor slow, Tensor fast", tensors=2, gradients=(0, 1), results=1, visible=1,
    reference=lambda slow, fast: (reference.augmented_pool(slow, fast),),
    fake=lambda slow, fast: (slow.new_empty(*slow.shape[:2], *((size + 1) // 2 for size in slow.shape[2:])),))
