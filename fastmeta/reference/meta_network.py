"""Meta Networks (Munkhdalai & Yu, 2017): fast weights made from gradients, read by cosine attention. Algorithm 1 of the paper::

    1. for T groups of supports: D_t = grad_Q loss(u(Q, x'_t), y'_t);   Q* = d(D_1, .., D_T)
    2. for every support:        D_i = grad_W loss(b(W, x'_i), y'_i);   W*_i = m(D_i);   key r'_i = u(Q, Q*, x'_i)
    3. for a query x:            r = u(Q, Q*, x);   a_i = softmax_i c(r'_i, r);   W* = sum_i a_i W*_i;   y = b(W, W*, x)

W and Q are the slow weights of the base learner b and of the embedding learner u; W* and Q* are the fast ones, which the generators m and
d make coordinate by coordinate. Written as loops, to be read beside the algorithm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coordinate_generator import CoordinateLSTM, CoordinateMLP
from .cosine_attention import cosine_attention

COSINE = dict(eps_mode="sqrt", eps=1e-6)


class Generator(nn.Module):
    """Fast weights by the name of the slow weight, ``forward(gradients by name) -> fast weights by name``.

    Convolutions have a generator of their own (``conv``), and so have linear layers (``linear``).
    """

    def __init__(self, conv: nn.Module, linear: nn.Module):
        super().__init__()
        self.conv, self.linear = conv, linear

    def forward(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (self.conv if name.startswith("convs") else self.linear)(gradient) for name, gradient in gradients.items()}


class AugmentedLearner(nn.Module):
    """The network of b and u: blocks of 3x3 convolution, ReLU and 2x2 max pooling (a part of a window counts), then two linear layers.

    ``forward(images [N, in_channels, size, size], fast=None) -> logits [N, C]``. There are no biases. ``fast`` holds fast weights by the
    names of the parameters. They augment the layers: a hidden layer gives ``relu(W x) + relu(W* x)``, the last one ``W x + W* x``.

    Parameters: ``convs.i.weight``, ``hidden.weight`` and ``output.weight``.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, channels: int, blocks: int, hidden: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=False) for i in range(blocks))
        size = math.ceil(image_size / 2**blocks)
        self.hidden = nn.Linear((channels if blocks else in_channels) * size**2, hidden, bias=False)
        self.output = nn.Linear(hidden, num_classes, bias=False)

    def augment(self, name: str, x: Tensor, fast: dict[str, Tensor] | None, activation=F.relu) -> Tensor:
        """One layer, by its name."""
        slow = activation(self.get_submodule(name)(x))
        if fast is None:
            return slow
        weight = fast[name + ".weight"]
        return slow + activation(F.conv2d(x, weight, padding=1) if weight.dim() == 4 else F.linear(x, weight))

    def block(self, name: str, x: Tensor, fast: dict[str, Tensor] | None) -> Tensor:
        """One block, by the name of its convolution."""
        return F.max_pool2d(self.augment(name, x, fast), 2, ceil_mode=True)

    def convolve(self, images: Tensor, fast: dict[str, Tensor] | None) -> Tensor:
        x = images
        for i in range(len(self.convs)):
            x = self.block(f"convs.{i}", x, fast)
        return x.flatten(1)

    def forward(self, images: Tensor, fast: dict[str, Tensor] | None = None) -> Tensor:
        hidden = self.augment("hidden", self.convolve(images, fast), fast)
        return self.augment("output", hidden, fast, activation=nn.Identity())

    def key(self, images: Tensor, fast: dict[str, Tensor]) -> Tensor:
        """The embedding ``[N, hidden]``: here ``hidden`` is the last layer."""
        return self.augment("hidden", self.convolve(images, fast), fast, activation=nn.Identity())

    def loss(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross entropy with the slow weights ``parameters`` alone: the mean, or the sum by ``weights [N]``."""
        losses = F.cross_entropy(torch.func.functional_call(self, parameters, (images,)), labels, reduction="none")
        return losses.mean() if weights is None else (losses * weights).sum()


class MetaNetwork(nn.Module):
    """Few-shot classifier of N supports; the defaults are the published sizes for Omniglot (152,448 fast weights with 5 classes).

    Args:
        num_classes: C, the classes of an episode.
        in_channels, image_size: images are ``[in_channels, image_size, image_size]``.
        channels, blocks, hidden: sizes of both learners, as in :class:`AugmentedLearner`.
        generator_width: hidden width of both generators.
        embedding_steps: T; the supports, in their order, fall into T groups as equal as can be, the larger ones first. T = N where N < T.
        second_order: gradients flow through the D too; as published, they are constants.

    Parameters: ``base`` and ``embedding``, learners; ``base_generator`` (m) and ``embedding_generator`` (d). No fast weight is made for
    ``embedding.output``, which only the loss of step 1 uses. Weights start as in the published code: normal, of variance 1 / inputs, biases 0,
    the forget gate's 1. Only the last layer of a generator starts a hundred times smaller: else the fast weights are ten times the slow ones,
    and the first logits of the published sizes are of the order of 1e8.
    """

    learner_type = AugmentedLearner
    mlp_type = CoordinateMLP
    lstm_type = CoordinateLSTM

    def __init__(self, num_classes: int, in_channels: int = 1, image_size: int = 28, channels: int = 64, blocks: int = 5, hidden: int = 64,
                 *, generator_width: int = 20, embedding_steps: int = 5, second_order: bool = False):
        super().__init__()
        sizes = dict(num_classes=num_classes, in_channels=in_channels, image_size=image_size, channels=channels, blocks=blocks, hidden=hidden,
                     generator_width=generator_width, embedding_steps=embedding_steps)
        for name, value in sizes.items():
            least = 0 if name == "blocks" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MetaNetwork: {name} must be an integer of at least {least}, got {value!r}")
        self.num_classes, self.image_shape = num_classes, (in_channels, image_size, image_size)
        self.embedding_steps, self.second_order = embedding_steps, second_order
        self.base = self.learner_type(num_classes, in_channels, image_size, channels, blocks, hidden)
        self.embedding = self.learner_type(num_classes, in_channels, image_size, channels, blocks, hidden)
        self.base_generator = Generator(self.mlp_type(generator_width), self.mlp_type(generator_width))
        self.embedding_generator = Generator(self.lstm_type(generator_width), self.lstm_type(generator_width))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    last = "_generator." in name and name.endswith(("layers.4.weight", "output.weight"))
                    nn.init.normal_(parameter, std=parameter[0].numel()**-0.5 * (0.01 if last else 1))
                else:
                    nn.init.zeros_(parameter)
                    if name.endswith("bias_ih"):
                        parameter[generator_width:2 * generator_width] = 1

    def forward(self, support: Tensor, support_labels: Tensor, query: Tensor) -> Tensor:
        """Logits ``[*, Q, C]``; ``*`` are dimensions of independent episodes.

        Args:
            support: ``[*, N, in_channels, image_size, image_size]``, N >= 1, in the dtype of the parameters.
            support_labels: integer ``[*, N]`` in ``[0, num_classes)``.
            query: ``[*, Q, in_channels, image_size, image_size]``.

        Raises:
            TypeError: what is not a tensor, or has the wrong dtype.
            ValueError: shapes that do not fit, a label out of range.
        """
        self.check(support, support_labels, query)
        batch, episodes = support_labels.shape[:-1], math.prod(support_labels.shape[:-1])
        logits = self.episodes(support.reshape(episodes, *support.shape[-4:]), support_labels.reshape(episodes, support.shape[-4]).long(),
                               query.reshape(episodes, *query.shape[-4:]))
        return logits.view(*batch, query.shape[-4], self.num_classes)

    def check(self, support: Tensor, support_labels: Tensor, query: Tensor) -> None:
        dtype = self.base.output.weight.dtype
        for name, images in (("support", support), ("query", query)):
            if not isinstance(images, Tensor):
                raise TypeError(f"MetaNetwork: {name} must be a tensor, got {type(images).__name__}")
            if images.dtype != dtype:
                raise TypeError(f"MetaNetwork: {name} must have the dtype of the parameters, {dtype}, got {images.dtype}")
            if images.dim() < 4 or images.shape[-3:] != self.image_shape:
                letters = "N" if name == "support" else "Q"
                raise ValueError(f"MetaNetwork: {name} must be [*, {letters}, {', '.join(map(str, self.image_shape))}], got shape {list(images.shape)}")
        if not isinstance(support_labels, Tensor):
            raise TypeError(f"MetaNetwork: support_labels must be a tensor, got {type(support_labels).__name__}")
        if support_labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"MetaNetwork: support_labels must have an integer dtype, got {support_labels.dtype}")
        if support_labels.shape != support.shape[:-3]:
            raise ValueError(f"MetaNetwork: support_labels must be {list(support.shape[:-3])}, as support is, got shape {list(support_labels.shape)}")
        if query.shape[:-4] != support.shape[:-4]:
            raise ValueError(f"MetaNetwork: support and query must have the same episode dimensions, got {list(support.shape[:-4])} and "
                             f"{list(query.shape[:-4])}")
        if not support.shape[-4]:
            raise ValueError("MetaNetwork: an episode must have at least one support, got none")
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or support_labels.is_meta:
            return
        wrong = support_labels[(support_labels < 0) | (support_labels >= self.num_classes)]
        if wrong.numel():
            raise ValueError(f"MetaNetwork: support_labels must be in [0, {self.num_classes}), got {wrong[0].item()}")

    def episodes(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """``[B, N, ...], [B, N], [B, Q, ...] -> [B, Q, C]``."""
        if not support.shape[0] or not query.shape[1]:
            return query.new_zeros(support.shape[0], query.shape[1], self.num_classes)
        return torch.stack([self.episode(*episode) for episode in zip(support, labels, query)])

    def gradient(self, learner: AugmentedLearner, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of the mean loss, by the slow weights."""
        gradients = torch.func.grad(learner.loss)(dict(learner.named_parameters()), images, labels)
        return gradients if self.second_order else {name: gradient.detach() for name, gradient in gradients.items()}

    def generate_embedding(self, support: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Q* of ``[N, ...], [N]``: step 1."""
        steps = min(self.embedding_steps, len(support))
        gradients = [self.gradient(self.embedding, x, y) for x, y in zip(support.tensor_split(steps), labels.tensor_split(steps))]
        return self.embedding_generator({name: torch.stack([gradient[name] for gradient in gradients])
                                         for name in gradients[0] if name != "output.weight"})

    def episode(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """``[N, ...], [N], [Q, ...] -> [Q, C]``: the three steps above."""
        embedding_fast = self.generate_embedding(support, labels)
        memory, keys = [], []
        for x, y in zip(support.split(1), labels.split(1)):
            memory.append(self.base_generator(self.gradient(self.base, x, y)))
            keys.append(self.embedding.key(x, embedding_fast))
        keys = torch.cat(keys)

        logits = []
        for x in query.split(1):
            key = self.embedding.key(x, embedding_fast)
            fast = {}
            for name, weight in self.base.named_parameters():
                rows = torch.stack([row[name].flatten() for row in memory])
                fast[name] = cosine_attention(key, keys, rows, **COSINE).view(weight.shape)
            logits.append(self.base(x, fast))
        return torch.cat(logits)
