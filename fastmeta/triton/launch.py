"""The one place where kernels start and device memory is allocated.

The tests replace these functions: ``launch`` by a machine that executes the compiled kernel, the others by such whose memory it knows.
"""

import torch


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a result or for scratch."""
    return torch.empty(shape, dtype=dtype, device=device)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy that is contiguous."""
    return t.contiguous()


def launch(kernel, grid: int, arguments: dict, constants: dict, num_warps: int, num_stages: int) -> None:
    """Starts ``grid`` programs of a ``triton.jit`` function on the device of its tensors; none where ``grid`` is 0.

    Args:
        arguments: the run-time arguments by name, in the order of the function: tensors, int, float.
        constants: its ``tl.constexpr`` by name.
    """
    if grid == 0:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    with torch.cuda.device(device):
        kernel[grid,](**arguments, **constants, num_warps=num_warps, num_stages=num_stages)
