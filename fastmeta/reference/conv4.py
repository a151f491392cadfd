"""The four-block convolutional embedding of Matching Networks (Vinyals et al., 2016, section 4.1)."""

from torch import nn


class Conv4(nn.Sequential):
    """Four blocks of 3x3 convolution, batch normalisation, ReLU and 2x2 max pooling, then flattened.

    ``[N, in_channels, H, W] -> [N, channels * (H // 16) * (W // 16)]``; 28x28 images give ``channels`` features. ``H, W >= 16``.
    """

    def __init__(self, in_channels: int = 1, channels: int = 64):
        def block(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                                 nn.MaxPool2d(2))
        super().__init__(block(in_channels), block(channels), block(channels), block(channels), nn.Flatten())
