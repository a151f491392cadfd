"""The memory of MANN as a fast layer."""

from .. import functional, reference


class LRUAMemory(reference.LRUAMemory):
    __doc__ = reference.LRUAMemory.__doc__

    lrua_step = staticmethod(functional.lrua_step)
