"""Full context embeddings (FCE): Matching Networks (Vinyals et al., 2016), section 2.1.2 and appendix A.

``g`` reads each support in the context of the others, ``f`` reads each query in the context of the support. Written as loops, to be
read beside the equations. A padded support row (``support_mask`` False) takes no part anywhere; it may stand at any position.
"""

import math

import torch
from torch import Tensor, nn


class SupportEncoder(nn.Module):
    """``g(s_j) = h_fwd_j + h_bwd_j + g'(s_j)``: a bidirectional LSTM over the support, in its given order.

    ``forward(support [*, S, D], support_mask bool [*, S] or None) -> [*, S, D]``; padded rows come back as they were given.
    Parameters: ``lstm``, an ``nn.LSTM(D, D, bidirectional=True, batch_first=True)``.
    """

    def __init__(self, feature_dim: int):
        super().__init__()
        self.feature_dim = feature_dim
        self.lstm = nn.LSTM(feature_dim, feature_dim, bidirectional=True, batch_first=True)

    def forward(self, support: Tensor, support_mask: Tensor | None = None) -> Tensor:
        if support_mask is None:
            support_mask = support.new_ones(support.shape[:-1], dtype=torch.bool)
        episodes = math.prod(support.shape[:-2])
        rows = support.reshape(episodes, *support.shape[-2:])
        encoded = []
        for episode, mask in zip(rows, support_mask.expand(support.shape[:-1]).reshape(rows.shape[:-1])):
            out = episode
            if mask.any():
                forward, backward = self.lstm(episode[mask].unsqueeze(0))[0].squeeze(0).chunk(2, -1)
                out = episode.index_put((mask.nonzero().squeeze(-1),), forward + backward + episode[mask])
            encoded.append(out)
        return torch.stack(encoded).view_as(support) if encoded else support


class QueryEncoder(nn.Module):
    """``f``: an LSTM that attends K times to the encoded support, from ``h_0 = f'(x), c_0 = 0``::

        a        = softmax_j(h_{k-1} . g(s_j))         r = sum_j a_j g(s_j)
        h^, c_k  = LSTMCell([f'(x), r], (h_{k-1}, c_{k-1}))
        h_k      = h^ + f'(x)                           f(x) = h_K

    ``forward(query [*, Q, D], support [*, S, D] (encoded by g), support_mask bool [*, S] or None) -> [*, Q, D]``.
    ``steps`` is K; None takes the number of (unpadded) supports of each episode, as easyfsl and CloserLookFewShot do.
    Parameters: ``cell``, an ``nn.LSTMCell(2 D, D)``.
    """

    def __init__(self, feature_dim: int, steps: int | None = None):
        super().__init__()
        self.feature_dim, self.steps = feature_dim, steps
        self.cell = nn.LSTMCell(2 * feature_dim, feature_dim)

    def forward(self, query: Tensor, support: Tensor, support_mask: Tensor | None = None) -> Tensor:
        batch = torch.broadcast_shapes(query.shape[:-2], support.shape[:-2])
        query, support = (x.expand(*batch, *x.shape[-2:]) for x in (query, support))
        if support_mask is None:
            support_mask = support.new_ones(support.shape[:-1], dtype=torch.bool)
        support_mask = support_mask.expand(support.shape[:-1])
        episodes = math.prod(batch)
        encoded = [self._encode(q, s[m]) for q, s, m in zip(query.reshape(episodes, *query.shape[-2:]),
                                                           support.reshape(episodes, *support.shape[-2:]),
                                                           support_mask.reshape(episodes, *support_mask.shape[-1:]))]
        return torch.stack(encoded).view_as(query) if encoded else query

    def _encode(self, query: Tensor, support: Tensor) -> Tensor:
        h, c = query, torch.zeros_like(query)
        for _ in range(len(support) if self.steps is None else self.steps):
            read = (h @ support.mT).softmax(-1) @ support
            h, c = self.cell(torch.cat([query, read], -1), (h, c))
            h = h + query
        return h
