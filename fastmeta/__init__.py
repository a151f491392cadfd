"""fastmeta: fused kernels for meta-learning layers in PyTorch.

``fastmeta.functional`` has the operations, ``fastmeta.nn`` the layers, ``fastmeta.reference`` the same in plain PyTorch.
"""

__version__ = "0.1.0"

from . import functional, nn, reference
from ._backend import use_backend

__all__ = ["functional", "nn", "reference", "use_backend"]
