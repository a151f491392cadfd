"""The operations ``torch.ops.fastmeta.*``.

Declared here, in Python, so that an operation exists whether or not the extension was built; C++ only adds kernels to it.
"""

from .cosine_attention import cosine_attention, matching_log_probs
from .lrua_memory import lrua_step, lrua_write, memory_read
from .mann_episode import mann_episode

OPERATIONS = (cosine_attention, matching_log_probs, memory_read, lrua_write, lrua_step, mann_episode)
for _operation in OPERATIONS:
    _operation.define()

__all__ = ["OPERATIONS", "cosine_attention", "lrua_step", "lrua_write", "mann_episode", "matching_log_probs", "memory_read"]
