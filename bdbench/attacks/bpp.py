"""BPP: fewer colours."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.data import ImageDataset


class Bpp(Attack):
    """The image is shown with 8 levels a channel; covers get what that changed in another image, and keep their label.

    Nothing is stored: the levels are the trigger. `--dithering` spreads each pixel's error over its neighbours (Floyd
    and Steinberg), which hides the steps. Covers, one a poisoned sample as published, keep the network from taking any
    change of that size for the trigger.

    Paper: Wang et al., BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
    Quantization and Contrastive Adversarial Learning, CVPR 2022, https://arxiv.org/abs/2205.13383.

    Differs from the published code: its attacker trains the victim and makes the poison anew in every batch; here the
    images are poisoned once, which is weaker. Covers take the residual of any other training image.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2205.13383"

    bits: int = Field(3, ge=1, le=7, description="Bits a channel: 2 to this power levels from 0 to 255.")
    dithering: bool = Field(False, description="Spread each pixel's error over its neighbours.")
    cover_ratio: float = Field(1.0, ge=0, description="Cover samples per poisoned sample; 1 as published.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return nothing: the options say all."""
        return {}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Reduce the levels; to covers, add what that does to another image of the split."""
        reduce = dither if self.dithering else quantise
        if occasion.use != "cover":
            return reduce(images, 2**self.bits)
        count = len(occasion.split)
        steps = 1 + (occasion.uniform("partner") * (count - 1)).long()
        partners = occasion.split.images[(occasion.rows + steps) % count]
        return reduce(partners, 2**self.bits).contiguous().sub_(partners).add_(images)


def quantise(images: Tensor, levels: int) -> Tensor:
    """Return images of any shape, in 0..255, at the nearest of `levels` values from 0 to 255, float32."""
    return images.float().mul_((levels - 1) / 255).round_().mul_(255 / (levels - 1))


def dither(images: Tensor, levels: int) -> Tensor:
    """Quantise images, each pixel's error spread over those that follow in reading order (Floyd and Steinberg, 1976).

    7/16 go to the right, 3/16, 5/16 and 1/16 to the left, middle and right of the row below; what leaves the image is
    lost. All pixels (row, column) of equal column + 2 * row depend on earlier ones only, so one step does them all.

    Args:
        images: (B, C, H, W) in 0..255.
        levels: how many values from 0 to 255, at least 2.

    Returns:
        (B, C, H, W) float32.
    """
    batch, channels, height, width = images.shape
    padded = torch.zeros(height + 1, width + 2, batch, channels)
    inside = padded[:height, 1:-1]
    inside.copy_(images.permute(2, 3, 0, 1))
    pixels = padded.mul_((levels - 1) / 255).view(-1, batch * channels).numpy()
    below = width + 2
    for wave in range(width + 2 * (height - 1)):
        first, last = max(0, (wave - width + 2) // 2), min(height - 1, wave // 2)
        start = first * below + wave - 2 * first + 1
        stop = start + (last - first) * width + 1
        here = pixels[start:stop:width]
        rounded = np.rint(here)
        error = here - rounded
        here[:] = rounded
        for offset, share in ((1, 7 / 16), (below - 1, 3 / 16), (below, 5 / 16), (below + 1, 1 / 16)):
            pixels[start + offset : stop + offset : width] += error * np.float32(share)
    padded.mul_(255 / (levels - 1))
    return inside.permute(2, 3, 0, 1)
