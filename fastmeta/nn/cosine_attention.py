"""Cosine attention as a fast layer."""

from torch import Tensor

from .. import functional, reference


class CosineAttention(reference.CosineAttention):
    __doc__ = reference.CosineAttention.__doc__

    def forward(self, query: Tensor, support: Tensor, values: Tensor, support_mask: Tensor | None = None) -> Tensor:
        return functional.cosine_attention(query, support, values, support_mask=support_mask, **self.options())
