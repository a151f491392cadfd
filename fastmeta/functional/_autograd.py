"""Autograd for an operation of :mod:`fastmeta.schemas` whose backward is an operation too.

Measured on a tiny input: a bare operation costs 4 us a call, an ``autograd.Function`` with ctx in forward 15, its ``setup_context`` form
63. So: no gradient needed, the bare operation; gradient needed, the first form; inside ``torch.func``, which demands it, the second. The
backward is itself a Function, whose own backward differentiates the reference formula: every order of derivative is right
without a second-order kernel.
"""

import torch
from torch.autograd import Function

from .. import schemas
from .._backend import NAMESPACES, missing_triton
from ..schemas.operation import Operation


def differentiable_on_all(*operations: Operation) -> dict:
    """``{(backend, name): apply}``, :func:`differentiable` of each operation on every backend that may have kernels of it."""
    found = {("cpp", operation.name): differentiable(operation) for operation in operations}
    if missing_triton is None:
        found |= {("triton", operation.name): differentiable(operation, "triton") for operation in operations if operation in schemas.IN_TRITON}
    return found


def differentiable(operation: Operation, backend: str = "cpp"):
    """``apply(*arguments) -> visible results`` of the operation on a backend, with gradients where the arguments ask for them.

    What the kernel itself finds wrong with the arguments is a ``ValueError``.
    """
    name, count, visible = operation.name, operation.tensors, operation.visible
    operations = getattr(torch.ops, NAMESPACES[backend])
    forward_op, backward_op = getattr(operations, name).default, getattr(operations, name + "_backward").default
    if operation.calls_torch:
        forward_op, backward_op = _without_autocast(forward_op), _without_autocast(backward_op)
    if operation.results == 1:
        forward_op = _in_tuple(forward_op)
    bare, saving = ((False,), (True,)) if operation.saves else ((), ())

    def save(ctx, arguments, results, outputs):
        ctx.save_for_backward(*arguments[:count], *results)
        ctx.numbers = arguments[count:]
        constant = [i for i in range(outputs) if i not in operation.differentiable]
        if constant:
            ctx.mark_non_differentiable(*(results[i] for i in constant))

    def first_backward(ctx, *grads):
        saved = ctx.saved_tensors
        needs = sum(1 << k for k, position in enumerate(operation.gradients) if ctx.needs_input_grad[position])
        arguments = (*(grads[i] for i in operation.differentiable), needs, *saved[:count], *ctx.numbers, *saved[count:])
        if torch._C._are_functorch_transforms_active():
            found = FunctorchBackward.apply(*arguments)
        elif torch.is_grad_enabled():
            found = Backward.apply(*arguments)
        else:
            found = backward_op(*arguments)
        result = [None] * (count + len(ctx.numbers))
        for position, gradient in zip(operation.gradients, found):
            if ctx.needs_input_grad[position]:
                result[position] = gradient
        return tuple(result)

    first = len(operation.differentiable)  # gradients among the arguments of the backward

    def save_for_double(ctx, *arguments):
        ctx.save_for_backward(*arguments[:first], *arguments[first + 1:first + 1 + count])
        ctx.needs, ctx.numbers = arguments[first], arguments[first + 1 + count:-operation.results]

    def double_backward(ctx, *grads_of_grads):
        grads, tensors = ctx.saved_tensors[:first], ctx.saved_tensors[first:]
        wanted = operation.needed(ctx.needs, tensors)
        by_position = dict(zip(operation.gradients, grads_of_grads))
        floats = [i for i in operation.gradients if tensors[i] is not None and tensors[i].is_floating_point()]

        def first_order(grads, *inputs):
            arguments = list(tensors)
            for i, t in zip(floats, inputs):
                arguments[i] = t
            return operation.vjp(grads, arguments, ctx.numbers, wanted)

        pull_back = torch.func.vjp(first_order, grads, *(tensors[i] for i in floats))[1]
        of_grads, *second = pull_back(tuple(by_position[i] for i in wanted))
        result = [None] * count
        for i, g in zip(floats, second):
            result[i] = g
        return (*of_grads, None, *result, *(None,) * (len(ctx.numbers) + operation.results))

    class Forward(Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = forward_op(*arguments, *saving)
            save(ctx, arguments, results, visible)
            return results[:visible] if visible > 1 else results[0]

        backward = staticmethod(first_backward)

    class Backward(Function):
        @staticmethod
        def forward(ctx, *arguments):
            save_for_double(ctx, *arguments)
            return backward_op(*arguments)

        backward = staticmethod(double_backward)

    class FunctorchForward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return forward_op(*arguments, *saving)

        @staticmethod
        def setup_context(ctx, arguments, results):
            save(ctx, arguments, results, len(results))

        backward = staticmethod(first_backward)

    class FunctorchBackward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return backward_op(*arguments)

        @staticmethod
        def setup_context(ctx, arguments, results):
            save_for_double(ctx, *arguments)

        backward = staticmethod(double_backward)

    def run(arguments):
        if torch._C._are_functorch_transforms_active():
            return FunctorchForward.apply(*arguments)[:visible]
        if torch.is_grad_enabled() and any(arguments[i] is not None and arguments[i].requires_grad for i in operation.gradients):
            results = Forward.apply(*arguments)
            return results if visible > 1 else (results,)
        return forward_op(*arguments, *bare)[:visible]

    def apply(*arguments):
        try:
            return run(arguments)
        except RuntimeError as error:  # the stable ABI knows this one type of error only
            message = str(error)
            if not message.startswith(name):
                raise
            raise ValueError(message) from None

    for function in (Forward, Backward, FunctorchForward, FunctorchBackward):
        function.__name__ = function.__qualname__ = f"{name}_{function.__name__}"
    return apply


def _without_autocast(op):
    def call(*arguments):
        device = arguments[0].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(*arguments)
        with torch.autocast(device, enabled=False):
            return op(*arguments)
    return call


def _in_tuple(op):
    def call(*arguments):
        return op(*arguments),
    return call
