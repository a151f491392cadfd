"""The memory of MANN (interim: the reference)."""
from ..reference import lrua_step, lrua_write, memory_read  # noqa: F401
