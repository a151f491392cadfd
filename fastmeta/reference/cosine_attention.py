"""Cosine attention over a support set, in plain PyTorch.

Matching Networks (Vinyals et al., 2016), section 2.1::

    s_ij = scale * c(q_i, k_j)         c(q, k) = q.k / g(|q|, |k|)
    a_ij = softmax_j s_ij
    y_i  = sum_j a_ij v_j                                          cosine_attention
    log p(c | q_i) = LSE_{j: y_j = c} s_ij - LSE_j s_ij            matching_log_probs

These functions are what the kernels are tested against: they are written to be read, work in any floating dtype (in float32 at
least) and are differentiable to any order. Wrong input is reported by :mod:`fastmeta.functional`, which calls them for ``backend="reference"``.
"""

import torch
from torch import Tensor, nn

NORMALIZE = ("none", "support", "both")
EPS_MODES = ("clamp", "add", "sqrt")


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, ``[*, D] -> [*]``; its derivatives of every order are 0 at a row of zeros."""
    squares = (x * x).sum(-1)
    nonzero = squares > 0
    return torch.where(nonzero, torch.where(nonzero, squares, 1.0).sqrt(), 0.0)


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _divide_by_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose largest element is 1, and their divisors ``[*, 1]``, constants to autograd; a row of zeros is divided by 1."""
    size = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    size = torch.where(size > 0, size, 1.0)
    return x / size, size


def cosine_scores(query: Tensor, support: Tensor, *, scale=1.0, normalize: str = "both", eps: float = 1e-8,
                  eps_mode: str = "clamp", support_mask: Tensor | None = None) -> Tensor:
    """``s_ij``: ``[*, Q, D], [*, S, D] -> [*, Q, S]``; -inf where the support is padding.

    ``normalize`` names the sides that are divided by their norm. A side that is not has norm 1 in ``g``, which is, by ``eps_mode``,
    ``max(a, eps) * max(b, eps)`` (clamp), ``a * b + eps`` (add) or ``sqrt(a^2 b^2 + eps)`` (sqrt).
    ``scale`` is a number, or a tensor that broadcasts with the batch dimensions ``[*]``.
    """
    query, support = _at_least_float32(query, clear_masked(support, support_mask))
    if normalize == "none":
        scores = query @ support.mT
    else:
        # With q = s q' and k = t k' the factors s and t cancel but for eps: squares and products of large numbers stay in range.
        support, t = _divide_by_largest(support)
        b, t = safe_norm(support).unsqueeze(-2), t.mT
        a = s = torch.ones_like(b[..., :1])
        if normalize == "both":
            query, s = _divide_by_largest(query)
            a = safe_norm(query).unsqueeze(-1)
        if eps_mode == "clamp":
            g = (torch.maximum(a, eps / s) if normalize == "both" else a) * torch.maximum(b, eps / t)
        elif eps_mode == "add":
            g = a * b + eps / s / t
        else:
            g = torch.hypot(a * b, eps**0.5 / s / t)
        scores = (query @ support.mT) / g.clamp_min(torch.finfo(g.dtype).tiny)
    scores = scores * (scale[..., None, None] if isinstance(scale, Tensor) else scale)
    return scores if support_mask is None else scores.masked_fill(~support_mask.unsqueeze(-2), -torch.inf)


def clear_masked(rows: Tensor, support_mask: Tensor | None) -> Tensor:
    """Zeros for the padded rows of ``[*, S, X]``: what they hold, NaN included, must reach neither a result nor a gradient."""
    return rows if support_mask is None else torch.where(support_mask.unsqueeze(-1), rows, 0.0)


def cosine_attention(query: Tensor, support: Tensor, values: Tensor, *, support_mask: Tensor | None = None, **options) -> Tensor:
    """``[*, Q, D], [*, S, D], [*, S, C] -> [*, Q, C]``, with the options of :func:`cosine_scores`. A query without support gets 0."""
    scores = cosine_scores(query, support, support_mask=support_mask, **options)
    if support_mask is not None:
        # All padding: a softmax over nothing would be NaN. With equal scores it reads the values, which are then all 0.
        scores = torch.where(support_mask.any(-1)[..., None, None], scores, 0.0)
    return (scores.softmax(-1) @ clear_masked(values, support_mask).to(scores.dtype)).to(query.dtype)


def matching_log_probs(query: Tensor, support: Tensor, labels: Tensor, num_classes: int, *, support_mask: Tensor | None = None,
                       **options) -> Tensor:
    """``[*, Q, D], [*, S, D], integer [*, S] -> [*, Q, C]`` log-probabilities, with the options of :func:`cosine_scores`.

    A class without support has -inf, and no gradient comes from it.
    """
    scores = cosine_scores(query, support, support_mask=support_mask, **options)
    labels = labels.long()
    if support_mask is not None:
        labels = torch.where(support_mask, labels, 0)
    batch = torch.broadcast_shapes(scores.shape[:-2], labels.shape[:-1])
    scores = scores.expand(*batch, *scores.shape[-2:])
    labels = labels.unsqueeze(-2).expand_as(scores)

    # The log-sum-exp of each class about the largest score of that class. The shift cancels, so it is a constant to autograd.
    empty = scores.new_full((*scores.shape[:-1], num_classes), -torch.inf)
    peak = empty.scatter_reduce(-1, labels, scores.detach(), "amax")
    present = ~(peak == -torch.inf)
    shift = torch.where(present, peak, 0.0)
    sums = torch.zeros_like(empty).scatter_add(-1, labels, (scores - shift.gather(-1, labels)).exp())
    log_sums = torch.where(present, torch.where(present, sums, 1.0).log() + shift, -torch.inf)

    some = present.any(-1, keepdim=True)
    total = torch.where(some, log_sums, 0.0).logsumexp(-1, keepdim=True)
    return torch.where(present, log_sums - total, -torch.inf).to(query.dtype)


class CosineAttention(nn.Module):
    """:func:`cosine_attention` as a layer; ``learn_scale`` makes the scale a parameter, a 0-dim tensor.

    ``forward(query [*, Q, D], support [*, S, D], values [*, S, C], support_mask=None) -> [*, Q, C]``
    """

    def __init__(self, *, scale: float = 1.0, learn_scale: bool = False, normalize: str = "both", eps: float = 1e-8,
                 eps_mode: str = "clamp"):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else float(scale)
        self.normalize, self.eps, self.eps_mode = normalize, eps, eps_mode

    def options(self) -> dict:
        return dict(scale=self.scale, normalize=self.normalize, eps=self.eps, eps_mode=self.eps_mode)

    def forward(self, query: Tensor, support: Tensor, values: Tensor, support_mask: Tensor | None = None) -> Tensor:
        return cosine_attention(query, support, values, support_mask=support_mask, **self.options())

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, Tensor) else self.scale
        return f"scale={scale}, normalize={self.normalize!r}, eps={self.eps}, eps_mode={self.eps_mode!r}"
