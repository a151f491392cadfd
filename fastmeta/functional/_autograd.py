"""Autograd for an operation of :mod:`fastmeta.schemas` whose backward is an operation too.

Measured on a tiny input: a bare operation costs 4 us a call, an ``autograd.Function`` with ctx in forward 15, its ``setup_context`` form
63. So: no gradient needed, the bare operation; gradient needed, the first form; inside ``torch.func``, which demands it, the second. The
backward is itself a Function, whose own backward differentiates the reference formula: every order of derivative is right
without a second-order kernel.
"""

import torch
from torch.autograd import Function

from ..schemas.cosine_attention import TENSORS, gradients


def differentiable(name: str):
    """``apply(*arguments) -> result`` of operation ``torch.ops.fastmeta.<name>``, with gradients where the arguments ask for them."""
    forward_op = getattr(torch.ops.fastmeta, name).default
    backward_op = getattr(torch.ops.fastmeta, name + "_backward").default

    def save(ctx, arguments, result, log_sums):
        ctx.save_for_backward(*arguments[:TENSORS], result, log_sums)
        ctx.rest = arguments[TENSORS:]

    def first_backward(ctx, grad):
        *tensors, result, log_sums = ctx.saved_tensors
        of_query, of_support, of_values, _, of_scales, *_ = ctx.needs_input_grad
        needs = of_query | of_support << 1 | of_values << 2
        arguments = (grad, needs, *tensors, *ctx.rest, result, log_sums)
        if torch._C._are_functorch_transforms_active():
            grads = FunctorchBackward.apply(*arguments)
        elif torch.is_grad_enabled():
            grads = Backward.apply(*arguments)
        else:
            grads = backward_op(*arguments)
        query, support, values, scales = grads
        return (query if of_query else None, support if of_support else None, values if of_values else None, None,
                scales if of_scales else None, *(None,) * len(ctx.rest))

    def double_backward(ctx, *grads_of_grads):
        grad, *tensors = ctx.saved_tensors
        used = [i for i, bit in ((0, 1), (1, 2), (2, 4)) if ctx.needs & bit] + ([4] if tensors[4] is not None else [])
        by_position = dict(zip((0, 1, 2, 4), grads_of_grads))
        floats = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

        def first_order(grad, *inputs):
            arguments = list(tensors)
            for i, t in zip(floats, inputs):
                arguments[i] = t
            first = gradients(name, grad, arguments, ctx.rest)
            return tuple(first[i] for i in used)

        pull_back = torch.func.vjp(first_order, grad, *(tensors[i] for i in floats))[1]
        grad_of_grad, *second = pull_back(tuple(by_position[i] for i in used))
        result = [None] * TENSORS
        for i, g in zip(floats, second):
            result[i] = g
        return (grad_of_grad, None, *result, *(None,) * (len(ctx.rest) + 2))

    def save_for_double(ctx, grad, needs, *arguments):
        ctx.save_for_backward(grad, *arguments[:TENSORS])
        ctx.needs, ctx.rest = needs, arguments[TENSORS:-2]

    class Forward(Function):
        @staticmethod
        def forward(ctx, *arguments):
            result, log_sums = forward_op(*arguments)
            save(ctx, arguments, result, log_sums)
            return result

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
            return forward_op(*arguments)

        @staticmethod
        def setup_context(ctx, arguments, outputs):
            ctx.mark_non_differentiable(outputs[1])
            save(ctx, arguments, *outputs)

        @staticmethod
        def backward(ctx, grad, _):
            return first_backward(ctx, grad)

    class FunctorchBackward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return backward_op(*arguments)

        @staticmethod
        def setup_context(ctx, arguments, outputs):
            save_for_double(ctx, *arguments)

        backward = staticmethod(double_backward)

    def apply(query, support, third, support_mask, scales, *rest):
        arguments = (query, support, third, support_mask, scales, *rest)
        if torch._C._are_functorch_transforms_active():
            return FunctorchForward.apply(*arguments)[0]
        if torch.is_grad_enabled() and (query.requires_grad or support.requires_grad or third.requires_grad
                                        or scales is not None and scales.requires_grad):
            return Forward.apply(*arguments)
        return forward_op(*arguments)[0]

    for function in (Forward, Backward, FunctorchForward, FunctorchBackward):
        function.__name__ = function.__qualname__ = f"{name}_{function.__name__}"
    return apply
