"""Wide ResNet 16-1, the model of the ABL and CBD papers.

Paper: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from bdbench.models.classifier import pool


class WideResNet(nn.Module):
    """Depth 16, width 1: 16, 16, 32 and 64 channels, two pre-activation blocks a stage; D is 64.

    The average pool adapts to the image size (the published fixed 8x8 pool multiplies the batch above 32 pixels).
    """

    size = 64
    stages = ("blocks.1", "blocks.3", "blocks.5")

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Block(*width) for width in widths))
        self.norm = nn.BatchNorm2d(self.size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 64), not negative."""
        return pool(F.relu(self.norm(self.blocks(self.stem(images)))))


class Block(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, added to the input (projected from the activation where shapes differ)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut = (
            None
            if channels_in == channels_out and stride == 1
            else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels_in, h, w) to (B, channels_out, h / stride, w / stride)."""
        activated = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(activated)
        hidden = F.relu(self.norm2(self.conv1(activated)))
        return cast("Tensor", kept + self.conv2(hidden))
