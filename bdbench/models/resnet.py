"""ResNet-18 in three forms, with the 3x3 stem for small images and without max-pooling.

Papers: He et al., Deep Residual Learning, CVPR 2016; Identity Mappings in Deep Residual Networks, ECCV 2016.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from bdbench.models import wide_resnet
from bdbench.models.classifier import pool

STAGES = [
    (64, 64, 1),
    (64, 64, 1),
    (64, 128, 2),
    (128, 128, 1),
    (128, 256, 2),
    (256, 256, 1),
    (256, 512, 2),
    (512, 512, 1),
]
STAGE_ENDS = ("blocks.1", "blocks.3", "blocks.5", "blocks.7")


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18: 64 to 512 channels, two blocks a stage; D is 512."""

    size = 512
    stages = STAGE_ENDS

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(wide_resnet.Block(*stage) for stage in STAGES))
        self.norm = nn.BatchNorm2d(self.size)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 512), not negative."""
        return pool(F.relu(self.norm(self.blocks(self.stem(images)))))


class OpenPreActResNet18(nn.Module):
    """Pre-activation ResNet-18 without the last norm and ReLU, as BackdoorBench has it; D is 512.

    Its maps go into the pool as the last block leaves them. Names of weights are those of BackdoorBench up to a change
    of words: `layerS.I` is `blocks.{2 (S - 1) + I}`, `conv1` of the network is `stem`, `bnN` is `normN`.
    """

    size = 512
    stages = STAGE_ENDS

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(wide_resnet.Block(*stage) for stage in STAGES))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 512), of either sign."""
        return pool(self.blocks(self.stem(images)))


class ResNet18(nn.Module):
    """ResNet-18: convolution, norm, ReLU; 64 to 512 channels, two blocks a stage; D is 512."""

    size = 512
    stages = STAGE_ENDS

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(PostActBlock(*stage) for stage in STAGES))
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 512), not negative."""
        return pool(self.blocks(self.stem(images)))


class PostActBlock(nn.Module):
    """3x3, norm, ReLU, 3x3, norm, added to the input, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = (
            nn.Identity()
            if channels_in == channels_out and stride == 1
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels_in, h, w) to (B, channels_out, h / stride, w / stride)."""
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(cast("Tensor", hidden + self.shortcut(x)))


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
