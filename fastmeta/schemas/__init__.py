"""The operations ``torch.ops.fastmeta.*``: schema, fake kernel, batching rule and the fallback on the reference.

Declared here, in Python, so that an operation exists whether or not the extension was built; C++ only adds kernels to it.
"""

from . import cosine_attention

__all__ = ["cosine_attention"]
