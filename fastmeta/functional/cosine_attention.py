"""Cosine attention over a support set: Matching Networks (Vinyals et al., 2016), section 2.1."""

import math

import torch
from torch import Tensor

from .. import _backend, reference, schemas
from ..reference.cosine_attention import EPS_MODES, NORMALIZE
from ..schemas.operation import accumulation_dtype
from ._arguments import FLOATS, INTEGERS, check_choice, check_eps, is_number, without_autocast
from ._autograd import differentiable_on_all

_operations = differentiable_on_all(schemas.cosine_attention, schemas.matching_log_probs)


def cosine_attention(query: Tensor, support: Tensor, values: Tensor, *, scale: float | Tensor = 1.0, normalize: str = "both",
                     eps: float = 1e-8, eps_mode: str = "clamp", support_mask: Tensor | None = None,
                     backend: str | None = None) -> Tensor:
    """Attention by cosine: ``y_i = sum_j a_ij v_j`` with ``a_ij = softmax_j(scale * c(q_i, k_j))`` (section 2.1.1).

    Args:
        query: ``[*, Q, D]``, float32, float64, float16 or bfloat16. Batch dimensions ``*`` broadcast; any strides.
        support: ``[*, S, D]``, same dtype.
        values: ``[*, S, C]``, same dtype: one-hot or soft labels, or any contents.
        scale: factor on the cosine: a number, or a floating tensor that broadcasts with ``*`` (one factor an episode); it may want a gradient.
        normalize: which side is divided by its norm: ``"both"`` (the paper), ``"support"`` or ``"none"`` (the dot product).
        eps, eps_mode: ``c = q.k / g(|q|, |k|)``; g is ``max(a, eps) max(b, eps)`` for ``"clamp"``, ``a b + eps`` for ``"add"``,
            ``sqrt(a^2 b^2 + eps)`` for ``"sqrt"``; the norm of a side that is not divided counts as 1. ``eps > 0``.
        support_mask: bool ``[*, S]``, False for padding. What a padded row holds changes nothing.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for :func:`fastmeta.use_backend`, ``FASTMETA_BACKEND``, or the fastest that can run.

    Returns:
        ``[*, Q, C]`` in the dtype of ``query``; computed in float32 at least. A query without any support gets 0. A row of zeros has
        similarity 0. NaN or infinity in a query reaches the rows of that query alone, in a support the rows of that episode.

    The same bits for every run and every number of threads. Memory beyond inputs and outputs does not grow with Q * S. Inside autocast
    it runs in float32, as ``F.cosine_similarity`` does.

    Raises:
        TypeError: what is not a tensor, or has the wrong dtype.
        ValueError: shapes that do not fit, unknown options.
        RuntimeError: an explicit backend that cannot run.
    """
    return _attend("cosine_attention", query, support, values, None, scale, normalize, eps, eps_mode, support_mask, backend)


def matching_log_probs(query: Tensor, support: Tensor, labels: Tensor, num_classes: int, *, scale: float | Tensor = 1.0,
                       normalize: str = "both", eps: float = 1e-8, eps_mode: str = "clamp", support_mask: Tensor | None = None,
                       backend: str | None = None) -> Tensor:
    """Log-probability of each class: ``log p(c | x_i) = LSE_{j: y_j = c} s_ij - LSE_j s_ij`` (section 2.1, equation 1, in logarithms).

    No one-hot matrix is built, and no probability is rounded to 0 on the way: classes far apart keep their exact logarithms.

    Args:
        labels: integer ``[*, S]`` in ``[0, num_classes)``; not looked at where ``support_mask`` is False.
        num_classes: C.
        query, support, scale, normalize, eps, eps_mode, support_mask, backend: as in :func:`cosine_attention`, and so is all that is
            said there of NaN, memory, determinism, autocast and errors.

    Returns:
        ``[*, Q, C]`` in the dtype of ``query``. A class without support has -inf and gives no gradient; so has every class of an
        episode that is all padding.

    Raises:
        ValueError: also for a label out of range (inside ``torch.compile``, a RuntimeError from the operation). The kernels of the GPU cannot
            tell without waiting for the device: there, a label out of range makes the log-probabilities of its episode NaN.
    """
    return _attend("matching_log_probs", query, support, labels, num_classes, scale, normalize, eps, eps_mode, support_mask, backend)


def _attend(name, query, support, third, num_classes, scale, normalize, eps, eps_mode, support_mask, backend):
    scales = None
    if isinstance(scale, Tensor):
        scale, scales = 1.0, scale
    autocast = isinstance(query, Tensor) and not query.is_meta and torch.is_autocast_enabled(query.device.type)
    if autocast:
        query, support, third, scales = (t.float() if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) else t
                                         for t in (query, support, third, scales))
    _check(name, query, support, third, num_classes, scale, scales, normalize, eps, eps_mode, support_mask)
    rest = () if num_classes is None else (num_classes,)

    chosen = _backend.select(backend, query.device.type, name)
    if chosen == "reference":
        if num_classes is not None:
            _check_labels_in_range(third, num_classes, support_mask)
        with without_autocast(autocast, query.device.type):
            return getattr(reference, name)(query, support, third, *rest, scale=scale if scales is None else scales, normalize=normalize,
                                            eps=eps, eps_mode=eps_mode, support_mask=support_mask)

    if num_classes is not None and third.dtype != torch.int64:
        third = third.long()
    if scales is not None:
        scales = scales.to(accumulation_dtype(query.dtype))
    rest = (float(scale), NORMALIZE.index(normalize), EPS_MODES.index(eps_mode), float(eps), *rest)
    tensors, shape = _flatten_batches(query, support, third, support_mask, scales, num_classes is None)
    result, = _operations[chosen, name](*tensors, *rest)
    return result if shape is None else result.view(*shape, result.shape[-1])


def _flatten_batches(query, support, third, support_mask, scales, third_has_rows):
    """The five tensors with exactly one batch dimension, and the shape of the result before its last dimension (None: as it comes)."""
    if query.dim() == support.dim() == 3 and scales is None and support_mask is None and \
            query.shape[0] == support.shape[0] == third.shape[0] and third.dim() == 2 + third_has_rows:
        return (query, support, third, None, None), None

    behind = (2, 2, 1 + third_has_rows, 1, 0)  # dimensions behind the batch
    tensors = (query, support, third, support_mask, scales)
    batches = [None if t is None else t.shape[:t.dim() - n] for t, n in zip(tensors, behind)]
    batch = torch.broadcast_shapes(*(b for b in batches if b is not None))
    shape = (*batch, query.shape[-2])
    if all(b is None or math.prod(b) == 1 for b in batches[1:]):
        # One support set for all the episodes: they are one episode of many queries.
        return (query.reshape(1, math.prod(shape), query.shape[-1]), *(None if t is None else t.reshape(1, *t.shape[t.dim() - n:])
                                                         for t, n in zip(tensors[1:], behind[1:]))), shape
    return [None if t is None else flatten_batch(t, batch, n) for t, n in zip(tensors, behind)], shape


def flatten_batch(x: Tensor, batch: torch.Size, behind: int) -> Tensor:
    """``[*, ...] -> [B, ...]`` with ``behind`` dimensions in ``...``, expanded to the batch dimensions ``batch`` first."""
    rest = x.shape[x.dim() - behind:]
    return x.expand(*batch, *rest).reshape(math.prod(batch), *rest)


def _check(name, query, support, third, num_classes, scale, scales, normalize, eps, eps_mode, support_mask):
    """Everything about the arguments but the range of the labels, before anything is computed."""
    third_name = "values" if num_classes is None and name == "cosine_attention" else "labels"
    for what, t in (("query", query), ("support", support), (third_name, third)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise TypeError(f"{name}: {what} must be a dense (strided) tensor, got {t.layout}")
    if query.dtype not in FLOATS:
        raise TypeError(f"{name}: query must be float32, float64, float16 or bfloat16, got {query.dtype}")
    if support.dtype != query.dtype:
        raise TypeError(f"{name}: support must have the dtype of query, {query.dtype}, got {support.dtype}")
    query_shape, support_shape, third_shape = query.shape, support.shape, third.shape
    if len(query_shape) < 2:
        raise ValueError(f"{name}: query must be [*, Q, D], got shape {list(query_shape)}")
    if len(support_shape) < 2 or support_shape[-1] != query_shape[-1]:
        raise ValueError(f"{name}: support must be [*, S, D] with the D = {query_shape[-1]} of query, got shape {list(support_shape)}")
    batches = [query_shape[:-2], support_shape[:-2]]
    if third_name == "values":
        if third.dtype != query.dtype:
            raise TypeError(f"{name}: values must have the dtype of query, {query.dtype}, got {third.dtype}")
        if len(third_shape) < 2 or third_shape[-2] != support_shape[-2]:
            raise ValueError(f"{name}: values must be [*, S, C] with the S = {support_shape[-2]} of support, got shape {list(third_shape)}")
        batches.append(third_shape[:-2])
    else:
        if third.dtype not in INTEGERS:
            raise TypeError(f"{name}: labels must have an integer dtype, got {third.dtype}")
        if len(third_shape) < 1 or third_shape[-1] != support_shape[-2]:
            raise ValueError(f"{name}: labels must be [*, S] with the S = {support_shape[-2]} of support, got shape {list(third_shape)}")
        if not isinstance(num_classes, (int, torch.SymInt)) or isinstance(num_classes, bool):
            raise TypeError(f"{name}: num_classes must be an integer, got {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"{name}: num_classes must be at least 1, got {num_classes}")
        batches.append(third_shape[:-1])
    device = query.device
    if support.device != device or third.device != device:
        raise ValueError(f"{name}: all tensors must be on one device, got query on {device}, support on {support.device}, "
                         f"{third_name} on {third.device}")
    if support_mask is not None:
        if not isinstance(support_mask, Tensor) or support_mask.dtype != torch.bool:
            given = support_mask.dtype if isinstance(support_mask, Tensor) else type(support_mask).__name__
            raise TypeError(f"{name}: support_mask must be a bool tensor, True for real rows, got {given}")
        if support_mask.dim() < 1 or support_mask.shape[-1] != support_shape[-2]:
            raise ValueError(f"{name}: support_mask must be [*, S] with the S = {support_shape[-2]} of support, "
                             f"got shape {list(support_mask.shape)}")
        if support_mask.device != device:
            raise ValueError(f"{name}: support_mask must be on the device of query, {device}, got {support_mask.device}")
        batches.append(support_mask.shape[:-1])
    if scales is not None:
        if not scales.is_floating_point():
            raise TypeError(f"{name}: scale must be a number or a floating tensor, got a tensor of {scales.dtype}")
        if scales.device != device:
            raise ValueError(f"{name}: scale must be on the device of query, {device}, got {scales.device}")
        batches.append(scales.shape)
    elif not is_number(scale):
        raise TypeError(f"{name}: scale must be a number or a floating tensor, got {type(scale).__name__}")
    if any(batch != batches[0] for batch in batches):
        try:
            torch.broadcast_shapes(*batches)
        except RuntimeError:
            raise ValueError(f"{name}: the batch dimensions of query, support, {third_name}, support_mask and scale must broadcast, "
                             f"got {', '.join(str(list(batch)) for batch in batches)}") from None
    check_choice(name, "normalize", normalize, NORMALIZE)
    check_choice(name, "eps_mode", eps_mode, EPS_MODES)
    check_eps(name, eps)


def _check_labels_in_range(labels: Tensor, num_classes: int, support_mask: Tensor | None) -> None:
    """What the compiled kernel checks for itself. It reads the labels, so it is left out where they have no values yet."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or labels.is_meta or not labels.numel():
        return
    wrong = (labels < 0) | (labels >= num_classes)
    if support_mask is not None:
        wrong = wrong & support_mask
    if wrong.any():
        label = labels.expand_as(wrong)[wrong][0].item()
        raise ValueError(f"matching_log_probs: labels must be in [0, {num_classes}), got {label}")
