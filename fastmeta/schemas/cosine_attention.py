"""``fastmeta::cosine_attention`` and ``fastmeta::matching_log_probs``, forward and backward.

Tensors have exactly one episode dimension: query ``[B, Q, D]``, support ``[B, S, D]``, values ``[B, S, C]`` or labels int64 ``[B, S]``,
support_mask bool ``[B, S]``, scales ``[B]`` in the accumulation dtype; any strides. The factor on the cosine of episode b is ``scale * scales[b]``. ``normalize`` and
``eps_mode`` are positions in ``reference.cosine_attention.NORMALIZE`` and ``EPS_MODES``. ``log_sums`` is what the
backward needs beyond the result, in the accumulation dtype: the log-sum-exp of the scores of each query, ``[B, Q]``, or for
``matching_log_probs`` of each class of each query, ``[B, Q, C]``. ``needs`` has bit 0 for the gradient of query,
1 of support, 2 of values; a gradient that is not needed comes back without elements, as does the one of labels.
"""

import torch
from torch import Tensor

from .. import reference
from ..reference.cosine_attention import EPS_MODES, NORMALIZE

library = torch.library.Library("fastmeta", "FRAGMENT")

NAMES = ("cosine_attention", "matching_log_probs")
TENSORS = 5  # query, support, values or labels, support_mask, scales: the rest of the arguments are numbers

_OPTIONS = "Tensor? support_mask, Tensor? scales, float scale, int normalize, int eps_mode, float eps"
_ARGUMENTS = {"cosine_attention": f"Tensor query, Tensor support, Tensor values, {_OPTIONS}",
              "matching_log_probs": f"Tensor query, Tensor support, Tensor labels, {_OPTIONS}, int num_classes"}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def from_reference(name: str, query, support, third, support_mask, scales, scale, normalize, eps_mode, eps, *num_classes) -> Tensor:
    """The result of operation ``name`` by its reference function, in the dtype of its arguments; differentiable to any order."""
    return getattr(reference, name)(query, support, third, *num_classes, **_keywords(support_mask, scales, scale, normalize, eps_mode, eps))


def _keywords(support_mask, scales, scale, normalize, eps_mode, eps) -> dict:
    return dict(support_mask=support_mask, scale=scale if scales is None else scale * scales, eps=eps,
                normalize=NORMALIZE[normalize], eps_mode=EPS_MODES[eps_mode])


def _accumulating(*tensors):
    """Floating tensors in the accumulation dtype, the others as they are."""
    return [t.to(accumulation_dtype(t.dtype)) if t is not None and t.is_floating_point() else t for t in tensors]


def gradients(name: str, grad, tensors, rest) -> list[Tensor | None]:
    """The gradient of every tensor among the arguments of ``name`` (None for labels and masks), by the reference function."""
    inputs = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def function(*floats):
        arguments = list(tensors)
        for i, t in zip(inputs, floats):
            arguments[i] = t
        return from_reference(name, *arguments, *rest)

    result = [None] * len(tensors)
    for i, g in zip(inputs, torch.func.vjp(function, *(tensors[i] for i in inputs))[1](grad)):
        result[i] = g
    return result


def _define(name: str) -> None:
    library.define(f"{name}({_ARGUMENTS[name]}) -> (Tensor, Tensor)")
    library.define(f"{name}_backward(Tensor grad, int needs, {_ARGUMENTS[name]}, Tensor result, Tensor log_sums)"
                   " -> (Tensor, Tensor, Tensor, Tensor)")

    def empty(query, third, num_classes):
        batch, queries, _ = query.shape
        columns = num_classes[0] if num_classes else third.shape[-1]
        return (query.new_empty(batch, queries, columns),
                query.new_empty(batch, queries, *num_classes, dtype=accumulation_dtype(query.dtype)))

    def fake(query, support, third, support_mask, scales, scale, normalize, eps_mode, eps, *num_classes):
        return empty(query, third, num_classes)

    def fake_backward(grad, needs, query, support, third, support_mask, scales, *rest):
        grads = [t.new_empty(t.shape if needs & bit and t.is_floating_point() else 0, dtype=query.dtype)
                 for bit, t in zip((1, 2, 4), (query, support, third))]
        return *grads, query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype))

    @torch.no_grad()
    def fallback(query, support, third, support_mask, scales, *rest):
        tensors = _accumulating(query, support, third, support_mask, scales)
        result = from_reference(name, *tensors, *rest)
        log_sums = reference.cosine_scores(tensors[0], tensors[1], **_keywords(*tensors[3:], *rest[:4])).logsumexp(-1)
        # log p(c) is the log-sum of the class less that of all.
        return result.to(query.dtype), result + log_sums.unsqueeze(-1) if rest[4:] else log_sums

    def fallback_backward(grad, needs, query, support, third, support_mask, scales, *rest):
        tensors = _accumulating(query, support, third, support_mask, query.new_ones(query.shape[0]) if scales is None else scales)
        with torch.enable_grad():
            grads = gradients(name, *_accumulating(grad), tensors, rest[:-2])
        grads = [g.detach().to(query.dtype) if needs & bit and g is not None else query.new_empty(0)
                 for bit, g in zip((1, 2, 4), grads)] + [grads[4].detach()]
        return tuple(grads)

    for op, kernel, meta in ((name, fallback, fake), (name + "_backward", fallback_backward, fake_backward)):
        library.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmeta::{op}", meta, lib=library)
        torch.library.register_vmap(f"fastmeta::{op}", _batching_rule(getattr(torch.ops.fastmeta, op).default), lib=library)


def _batching_rule(op):
    """The vmapped dimension is one more episode dimension: fold it into B, and unfold the results."""

    def rule(info, in_dims, *arguments):
        def fold(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)
        results = op(*(fold(x, dim) for x, dim in zip(arguments, in_dims)))
        # A gradient that was not needed has no elements and one dimension.
        return (tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results), (0,) * len(results))
    return rule


for _name in NAMES:
    _define(_name)
