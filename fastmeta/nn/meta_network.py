"""Meta Networks without loops over supports, queries or episodes: equal to :mod:`fastmeta.reference.meta_network`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, reference
from ..reference.meta_network import COSINE
from .coordinate_generator import CoordinateLSTM, CoordinateMLP

# Multiplications that writing and reading a fast weight of a query cost, forward and backward: where they part on Zen 3.
TRAFFIC = 48


def episode_product(x: Tensor, weights: Tensor) -> Tensor:
    """``x * W`` with weights of each episode: ``[B, Q, C, H, W], [B, O, C, 3, 3]`` or ``[B, Q, I], [B, O, I]``, to ``[B, Q, O, ...]``."""
    if weights.dim() == 3:
        return x @ weights.mT
    # Episodes are groups of channels: the queries of one share their weights.
    y = F.conv2d(x.transpose(0, 1).flatten(1, 2), weights.flatten(0, 1), padding=1, groups=len(weights))
    return y.unflatten(1, weights.shape[:2]).transpose(0, 1)


def attended_product(x: Tensor, memory: Tensor, attention: Tensor) -> Tensor:
    """``x * W*`` of each query, ``W* = sum_i a_i W*_i``: ``[B, Q, C, H, W], [B, N, O, C, 3, 3], [B, Q, N] -> [B, Q, O, H, W]``, or linear.

    A layer of P weights on L pixels costs N L P multiplications as ``sum_i a_i (x * W*_i)``, and (N + L) P where W* is built, which
    then must be written and read. The cheaper way is taken.
    """
    rows, pixels = memory.shape[1], x[0, 0, 0].numel() if x.dim() == 5 else 1
    if rows * pixels <= rows + pixels + TRAFFIC:
        products = episode_product(x, memory.flatten(1, 2)).unflatten(2, memory.shape[1:3])
        return (attention.unsqueeze(-2) @ products.flatten(3)).view(*products.shape[:2], *products.shape[3:])
    weights = (attention @ memory.flatten(2)).flatten(0, 1).view(-1, *memory.shape[2:])
    return episode_product(x.flatten(0, 1).unsqueeze(1), weights).view(*x.shape[:2], memory.shape[2], *x.shape[3:])


class AugmentedLearner(reference.AugmentedLearner):
    __doc__ = reference.AugmentedLearner.__doc__

    def augment(self, name, x, fast, activation=F.relu):
        """``fast`` is a function: it gives ``x * W*`` of the images of all the episodes, for the weight of that layer."""
        slow = super().augment(name, x, None, activation)
        return slow if fast is None else slow + activation(fast(name + ".weight", x))

    def block(self, name, x, fast):
        if fast is None:
            return super().block(name, x, None)
        slow = self.get_submodule(name)(x)
        # It has a kernel for the CPU alone: a backend chosen for the others must not fail here.
        return functional.augmented_pool(slow, fast(name + ".weight", x), backend=None if slow.device.type == "cpu" else "reference")


class MetaNetwork(reference.MetaNetwork):
    __doc__ = reference.MetaNetwork.__doc__

    learner_type = AugmentedLearner
    mlp_type = CoordinateMLP
    lstm_type = CoordinateLSTM

    def gradients(self, learner: AugmentedLearner, images: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Of each group of supports, in one pass: ``[G, n, ...], [G, n], [G, n] -> [G, ...]`` by the name of the slow weight."""
        with torch.set_grad_enabled(self.second_order and torch.is_grad_enabled()):
            return torch.func.vmap(torch.func.grad(learner.loss), (None, 0, 0, 0))(dict(learner.named_parameters()), images, labels, weights)

    def episodes(self, support, labels, query):
        (episodes, supports), queries = labels.shape, query.shape[1]
        if not episodes or not queries:
            return query.new_zeros(episodes, queries, self.num_classes)
        ones = support.new_ones(episodes * supports, 1)

        # 1. Groups of unequal size are filled up with supports that count nothing.
        steps = min(self.embedding_steps, supports)
        groups = torch.arange(supports).tensor_split(steps)
        index = torch.stack([F.pad(group, (0, len(groups[0]) - len(group)), value=-1) for group in groups]).to(support.device)
        weights = (index >= 0).to(support) / (index >= 0).sum(1, keepdim=True)
        gradients = self.gradients(self.embedding, support[:, index].flatten(0, 1), labels[:, index].flatten(0, 1),
                                   weights.repeat(episodes, 1))
        embedding_fast = self.embedding_generator({name: gradient.unflatten(0, (episodes, steps)).transpose(0, 1)
                                                   for name, gradient in gradients.items() if name != "output.weight"})
        images = torch.cat([support, query], 1)
        keys = self.embedding.key(images.flatten(0, 1), lambda name, x: episode_product(
            x.unflatten(0, images.shape[:2]), embedding_fast[name]).flatten(0, 1)).unflatten(0, images.shape[:2])

        # 2.
        gradients = self.gradients(self.base, support.flatten(0, 1).unsqueeze(1), labels.reshape(-1, 1), ones)
        memory = self.base_generator(gradients)

        # 3. With one-hot values, the attention reads its own weights a_i.
        one_hot = torch.eye(supports, dtype=keys.dtype, device=keys.device).expand(episodes, -1, -1)
        attention = functional.cosine_attention(keys[:, supports:], keys[:, :supports], one_hot, **COSINE)
        return self.base(query.flatten(0, 1), lambda name, x: attended_product(
            x.unflatten(0, (episodes, queries)), memory[name].unflatten(0, (episodes, supports)), attention).flatten(0, 1)
        ).unflatten(0, (episodes, queries))
