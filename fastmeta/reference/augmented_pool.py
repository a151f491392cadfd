"""The end of an augmented convolution layer (Munkhdalai & Yu, 2017, section 3.3): slow and fast halves rectified, added and pooled."""

import torch.nn.functional as F
from torch import Tensor


def augmented_pool(slow: Tensor, fast: Tensor) -> Tensor:
    """See :func:`fastmeta.functional.augmented_pool`."""
    return F.max_pool2d(F.relu(slow) + F.relu(fast), 2, ceil_mode=True)
