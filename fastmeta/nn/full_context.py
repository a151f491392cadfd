"""Full context embeddings, all episodes at once: equal to the loops of :mod:`fastmeta.reference.full_context`."""

import torch
from torch import Tensor

from .. import reference
from ..functional.cosine_attention import flatten_batch


class SupportEncoder(reference.SupportEncoder):
    __doc__ = reference.SupportEncoder.__doc__

    def __init__(self, feature_dim: int):
        super().__init__(feature_dim)
        # torch.compile stops at a module of type nn.LSTM, but not at torch.lstm: keep the parameters alone, under the same names.
        self.lstm = torch.nn.ParameterDict(self.lstm.named_parameters())

    def forward(self, support: Tensor, support_mask: Tensor | None = None) -> Tensor:
        if not support.numel():
            return support
        batch = support.shape[:-2]
        rows = flatten_batch(support, batch, 2)
        if support_mask is None:
            ahead, back = self._run(rows, "", "_reverse").chunk(2, -1)
            return (rows + ahead + back).view_as(support)

        mask = flatten_batch(support_mask, batch, 1)
        # Position of the j-th real row of each episode, padding behind; and the same read from the last real row to the first.
        order = mask.logical_not().argsort(dim=-1, stable=True)
        steps, lengths = torch.arange(mask.shape[-1], device=mask.device), mask.sum(-1, keepdim=True)
        reverse = order.gather(-1, torch.where(steps < lengths, lengths - 1 - steps, steps))
        clean = torch.where(mask.unsqueeze(-1), rows, 0.0)
        context = 0.0
        for positions, direction in ((order, ""), (reverse, "_reverse")):
            there, back = (p.unsqueeze(-1).expand_as(rows) for p in (positions, positions.argsort(-1)))
            context = context + self._run(clean.gather(-2, there), direction).gather(-2, back)
        return torch.where(mask.unsqueeze(-1), clean + context, rows).view_as(support)

    def _run(self, rows: Tensor, *directions: str) -> Tensor:
        """The LSTM with the weights of these directions, the second reading backwards: ``[B, S, D] -> [B, S, D * len(directions)]``."""
        weights = [self.lstm[name + direction] for direction in directions
                   for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
        if rows.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # In float32: PyTorch's LSTM raises in half precision on a processor that has no instructions for it.
            with torch.autocast("cpu", enabled=False):
                return self._lstm(rows.to(weights[0].dtype), weights)
        return self._lstm(rows, weights)

    def _lstm(self, rows: Tensor, weights: list[Tensor]) -> Tensor:
        directions = len(weights) // 4
        start = rows.new_zeros(directions, len(rows), self.feature_dim)
        return torch.lstm(rows, (start, start), weights, True, 1, 0.0, self.training, directions == 2, True)[0]


class QueryEncoder(reference.QueryEncoder):
    __doc__ = reference.QueryEncoder.__doc__

    def forward(self, query: Tensor, support: Tensor, support_mask: Tensor | None = None) -> Tensor:
        batch = torch.broadcast_shapes(query.shape[:-2], support.shape[:-2])
        shape = (*batch, *query.shape[-2:])
        query, support = flatten_batch(query, batch, 2), flatten_batch(support, batch, 2)
        steps, lengths = self.steps, None
        if support_mask is not None:
            support_mask = flatten_batch(support_mask, batch, 1)
            support = torch.where(support_mask.unsqueeze(-1), support, 0.0)
        if steps is None:
            steps = support.shape[-2]
            if support_mask is not None and support_mask.numel():
                lengths = support_mask.sum(-1)[:, None, None]
                shortest, steps = map(int, lengths.aminmax())  # read from the device: give `steps` to stay asynchronous
                lengths = None if shortest == steps else lengths
        if not steps or not query.numel():
            return query.view(shape)

        # With h = h^ + f'(x), all that f'(x) adds to the scores and to the gates is the same at every step.
        d = self.feature_dim
        order = [0, 1, 3, 2]  # gates i f g o -> i f o g, the three sigmoids side by side
        w_ih = self.cell.weight_ih.unflatten(0, (4, d))[order].flatten(0, 1)
        w_hh = self.cell.weight_hh.unflatten(0, (4, d))[order].flatten(0, 1)
        bias = (self.cell.bias_ih + self.cell.bias_hh).unflatten(0, (4, d))[order].flatten()
        w_query, w_read = w_ih.split(d, -1)
        first_scores = query @ support.mT
        if support_mask is not None:
            first_scores = first_scores.masked_fill(~support_mask.unsqueeze(-2) & support_mask.any(-1)[:, None, None], -torch.inf)
        first_gates = torch.nn.functional.linear(query, w_query + w_hh, bias)
        reads = support @ w_read.T  # sum_j a_j g(s_j) W_r = sum_j a_j (g(s_j) W_r)
        h, c = None, None
        for k in range(steps):
            scores = first_scores if k == 0 else torch.baddbmm(first_scores, h, support.mT)
            gates = torch.baddbmm(first_gates, scores.softmax(-1), reads)
            if k:
                gates = gates + h @ w_hh.T
            i, f, o = gates[..., :3 * d].sigmoid().chunk(3, -1)
            c = i * gates[..., 3 * d:].tanh() if k == 0 else torch.addcmul(i * gates[..., 3 * d:].tanh(), f, c)
            new = o * c.tanh()
            h = new if lengths is None else torch.where(k < lengths, new, 0.0 if h is None else h)
        return (h + query).view(shape)
