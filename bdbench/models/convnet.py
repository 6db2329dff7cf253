"""Small convolutional networks for tiny images."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3x3 convolutions of 32, 64 and 16 channels with batch norm, one halving, averaged to 4x4 places; D is 256.

    The embedding keeps the places: on tiny images where something is matters as much as what it is.
    """

    size = 256
    stages = ("layers.2", "layers.5", "layers.9")

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_block(image_shape[0], 32),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, 16),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 256)."""
        return cast("Tensor", self.layers(images))


class HalvingConvNet(nn.Module):
    """`ConvNet` for images of 16 pixels at the price of 8: the first convolution, 4x4, takes every second place."""

    size = 256
    stages = ("layers.2", "layers.5", "layers.9")

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, 16),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 256)."""
        return cast("Tensor", self.layers(images))


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]
