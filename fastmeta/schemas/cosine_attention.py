"""``fastmeta::cosine_attention`` and ``fastmeta::matching_log_probs``, forward and backward.

Tensors have exactly one episode dimension: query ``[B, Q, D]``, support ``[B, S, D]``, values ``[B, S, C]`` or labels int64 ``[B, S]``,
support_mask bool ``[B, S]``, scales ``[B]`` in the accumulation dtype; any strides. The factor on the cosine of episode b is ``scale * scales[b]``. ``normalize`` and
``eps_mode`` are positions in ``reference.cosine_attention.NORMALIZE`` and ``EPS_MODES``. The hidden result, log_sums, is
in the accumulation dtype: the log-sum-exp of the scores of each query, ``[B, Q]``, or for
``matching_log_probs`` of each class of each query, ``[B, Q, C]``.
"""

from .. import reference
from ..reference.cosine_attention import EPS_MODES, NORMALIZE
from .operation import Operation, accumulation_dtype

_OPTIONS = "Tensor? support_mask, Tensor? scales, float scale, int normalize, int eps_mode, float eps"


def _keywords(support_mask, scales, scale, normalize, eps_mode, eps) -> dict:
    return dict(support_mask=support_mask, scale=scale if scales is None else scale * scales, eps=eps,
                normalize=NORMALIZE[normalize], eps_mode=EPS_MODES[eps_mode])


def _operation(name: str, arguments: str) -> Operation:
    def by_reference(query, support, third, support_mask, scales, scale, normalize, eps_mode, eps, *num_classes):
        return getattr(reference, name)(query, support, third, *num_classes,
                                        **_keywords(support_mask, scales, scale, normalize, eps_mode, eps)),

    def fake(query, support, third, support_mask, scales, scale, normalize, eps_mode, eps, *num_classes):
        batch, queries, _ = query.shape
        columns = num_classes[0] if num_classes else third.shape[-1]
        return (query.new_empty(batch, queries, columns),
                query.new_empty(batch, queries, *num_classes, dtype=accumulation_dtype(query.dtype)))

    def log_sums(tensors, numbers, results):
        query, support, _, *options = tensors
        sums = reference.cosine_scores(query, support, **_keywords(*options, *numbers[:4])).logsumexp(-1)
        # log p(c) is the log-sum of the class less that of all.
        return (results[0] + sums.unsqueeze(-1) if numbers[4:] else sums),

    return Operation(name, arguments, tensors=5, gradients=(0, 1, 2, 4), results=2, visible=1, reference=by_reference, fake=fake,
                     hidden=log_sums)


cosine_attention = _operation("cosine_attention", f"Tensor query, Tensor support, Tensor values, {_OPTIONS}")
matching_log_probs = _operation("matching_log_probs", f"Tensor query, Tensor support, Tensor labels, {_OPTIONS}, int num_classes")
