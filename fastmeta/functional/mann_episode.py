"""An episode of MANN (interim: the reference)."""
from ..reference import mann_episode  # noqa: F401
