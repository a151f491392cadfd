"""The operations ``torch.ops.fastmeta.*`` and ``torch.ops.fastmeta_triton.*``.

Declared here, in Python, so that an operation exists whether or not the extension was built; C++ only adds kernels to it.
"""

import importlib

from .. import _backend
from .augmented_pool import augmented_pool
from .coordinate_generator import coordinate_lstm, coordinate_mlp
from .cosine_attention import cosine_attention, matching_log_probs
from .lrua_memory import lrua_step, lrua_write, memory_read
from .mann_episode import mann_episode

OPERATIONS = (cosine_attention, matching_log_probs, memory_read, lrua_write, lrua_step, mann_episode, coordinate_mlp, coordinate_lstm, augmented_pool)
IN_TRITON = (cosine_attention, matching_log_probs, memory_read, lrua_write, lrua_step, coordinate_mlp, coordinate_lstm)


def _in_triton(name: str):
    def kernel(*arguments):
        return getattr(importlib.import_module("fastmeta.triton"), name)(*arguments)  # triton is imported by the first call
    return kernel


for _operation in OPERATIONS:
    _operation.define(_backend.NAMESPACES["cpp"])
for _operation in IN_TRITON if _backend.missing_triton is None else ():
    _operation.define(_backend.NAMESPACES["triton"], {name: _in_triton(name) for name in (_operation.name, _operation.name + "_backward")})
_backend.find_kernels([operation.name for operation in OPERATIONS])

__all__ = ["OPERATIONS", "augmented_pool", "coordinate_lstm", "coordinate_mlp", "cosine_attention", "lrua_step", "lrua_write", "mann_episode",
           "matching_log_probs", "memory_read"]
