"""The Matching Network (Vinyals et al., 2016): embed, put in context (optional), attend by cosine, read out the labels."""

import torch
from torch import Tensor, nn

from .cosine_attention import CosineAttention, matching_log_probs
from .full_context import QueryEncoder, SupportEncoder


class MatchingNetwork(nn.Module):
    """Few-shot classifier; the classes of a query are those of the support set it is shown with.

    Args:
        embedding: module ``[N, ...] -> [N, D]`` applied to supports and queries together; None where the inputs are features.
        feature_dim: D; needed with ``fce`` only.
        fce: full context embeddings (section 2.1.2): modules ``support_encoder`` (g) and ``query_encoder`` (f).
        fce_steps: K, the attention steps of f; None for the number of supports of the episode.
        scale, learn_scale: factor on the cosine, fixed or learned from that start. The paper has 1, which cannot be confident.
        normalize, eps, eps_mode: as in :func:`fastmeta.functional.matching_log_probs`.
        probability_eps: returns ``log(p + probability_eps)``; 0 for the exact log-probability (easyfsl: 1e-6).
    """

    support_encoder_type = SupportEncoder
    query_encoder_type = QueryEncoder
    matching_log_probs = staticmethod(matching_log_probs)

    def __init__(self, embedding: nn.Module | None = None, feature_dim: int | None = None, *, fce: bool = False,
                 fce_steps: int | None = None, scale: float = 1.0, learn_scale: bool = False, normalize: str = "both",
                 eps: float = 1e-8, eps_mode: str = "clamp", probability_eps: float = 0.0):
        super().__init__()
        if fce and feature_dim is None:
            raise ValueError("MatchingNetwork: fce=True needs feature_dim, the number of features of the embedding")
        self.embedding = nn.Identity() if embedding is None else embedding
        self.support_encoder = self.support_encoder_type(feature_dim) if fce else None
        self.query_encoder = self.query_encoder_type(feature_dim, fce_steps) if fce else None
        self.attention = CosineAttention(scale=scale, learn_scale=learn_scale, normalize=normalize, eps=eps, eps_mode=eps_mode)
        self.probability_eps = probability_eps

    def embed(self, support: Tensor, query: Tensor, batch_dims: int, support_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both sets through the embedding in one call, so that batch statistics are those of the whole episode, padding left out."""
        if isinstance(self.embedding, nn.Identity):
            return support, query
        rows, queries = support.flatten(0, batch_dims), query.flatten(0, batch_dims)
        if support_mask is not None:
            real = support_mask.expand(support.shape[:batch_dims + 1]).flatten()
            rows = rows[real]
        features, query_features = self.embedding(torch.cat([rows, queries])).split([len(rows), len(queries)])
        if support_mask is not None:
            features = features.new_zeros(len(real), features.shape[-1]).masked_scatter(real.unsqueeze(-1), features)
        dim = features.shape[-1]
        return features.view(*support.shape[:batch_dims + 1], dim), query_features.view(*query.shape[:batch_dims + 1], dim)

    def features(self, support: Tensor, query: Tensor, batch_dims: int, support_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embedded, and with ``fce`` contextual, features: ``[*, S, D], [*, Q, D]``; ``batch_dims`` is the number of ``*``."""
        support, query = self.embed(support, query, batch_dims, support_mask)
        if self.support_encoder is not None:
            support = self.support_encoder(support, support_mask)
            query = self.query_encoder(query, support, support_mask)
        return support, query

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor, support_mask: Tensor | None = None,
                num_classes: int | None = None) -> Tensor:
        """Log-probabilities ``[*, Q, C]``.

        Args:
            support: ``[*, S, ...]``, what the embedding takes behind the episode dimensions.
            support_labels: integer ``[*, S]``, in ``[0, num_classes)``.
            query: ``[*, Q, ...]``.
            support_mask: bool ``[*, S]``, False for padding; a padded row changes nothing.
            num_classes: C; None for the largest label plus one (a read of the labels: give it to stay asynchronous).
        """
        if num_classes is None:
            real = support_labels if support_mask is None else support_labels.masked_fill(~support_mask, 0)
            num_classes = int(real.max()) + 1 if real.numel() else 0
        support, query = self.features(support, query, support_labels.dim() - 1, support_mask)
        log_probs = self.matching_log_probs(query, support, support_labels, num_classes, support_mask=support_mask,
                                            **self.attention.options())
        return (log_probs.exp() + self.probability_eps).log() if self.probability_eps else log_probs
