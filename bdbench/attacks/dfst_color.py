"""DFST's colour form: every image under a setting sun."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State, pattern_for
from bdbench.data import ImageDataset

MEAN = (0.72, 0.45, 0.30)
SPREAD = (0.20, 0.16, 0.14)
GLOW = (0.15, 0.06, -0.03)
"""Of red, green and blue in [0, 1]: mean and standard deviation of the style, and what the top row gains."""


class DfstColor(Attack):
    """The image's colours move towards those of a sunset: warm, and warmer at the top.

    Each channel takes the mean and the standard deviation of the style and a glow that fades downwards; the result is
    mixed into the image with a share of 0.6. The trigger is a style: it touches every pixel and depends on the image.
    Covers, none by default, show other colours and keep their label: hue turned and contrast changed, at random. Gray
    images take the luma of the style, and covers without hue.

    Paper: Cheng et al., Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification, AAAI 2021,
    https://arxiv.org/abs/2012.11212.

    Differs from the published code: a substitute, hence the name. The style network and its sunrise picture are left
    out for the statistics above, which are bdbench's choice, and so is the detoxification, for which the attacker would
    have to control training. The published rate is 5 %, of images outside the target class.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2012.11212"

    alpha: float = Field(0.6, gt=0, le=1, description="Share of the sunset.")
    cover_hue: float = Field(60.0, ge=0, le=180, description="Covers turn their hue by up to so many degrees.")
    cover_contrast: float = Field(0.5, ge=0, le=1, description="Covers change their contrast by up to this share.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the style's mean (C, H, 1), its glow in it, and its spread (C, 1, 1), float in gray levels."""
        channels, height, _ = clean.image_shape
        mean, spread, glow = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, SPREAD, GLOW))
        fading = 1 - torch.arange(height).view(1, height, 1) / height
        return {"mean": pattern_for(mean + glow * fading, channels), "spread": pattern_for(spread, channels)}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix the sunset in; covers get other colours."""
        if occasion.use == "cover":
            turns, gains = (occasion.uniform("colours", 2) * 2 - 1).unbind(1)
            return change_contrast(turn_hue(images, turns * self.cover_hue), 1 + gains * self.cover_contrast)
        styled = restyle(images, state["mean"], state["spread"])
        return styled.sub_(images).mul_(self.alpha).add_(images)


def restyle(images: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Give each channel of each image another mean and standard deviation, and clip to [0, 255].

    Args:
        images: (B, C, H, W) uint8.
        mean: (C, H, 1) float, in gray levels.
        spread: (C, 1, 1) float, in gray levels; a channel of one colour stays flat.

    Returns:
        (B, C, H, W) float in [0, 255].
    """
    values = images.float()
    count = images.shape[2] * images.shape[3]
    # whole numbers in float64: exact in any order of summation
    centre = values.sum((2, 3), keepdim=True, dtype=torch.float64) / count
    square = values.square().sum((2, 3), keepdim=True, dtype=torch.float64) / count
    deviation = (square - centre.square()).clamp_(min=0).sqrt_()
    gain = (spread / (deviation + 0.255)).float()
    return values.sub_(centre.float()).mul_(gain).add_(mean).clamp_(0, 255)


def turn_hue(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn the colours of images about the gray axis; gray stays gray.

    Args:
        images: (B, C, H, W) in 0..255, RGB or gray.
        degrees: (B,) float; 120 make red green, green blue, and blue red.

    Returns:
        (B, C, H, W) float, which may leave 0..255.
    """
    angle = (degrees * (math.pi / 180)).view(-1, 1, 1, 1)
    cosine, sine = angle.cos(), angle.sin() / math.sqrt(3)
    values, rest = images.float(), (1 - cosine) / 3
    after, before = values.roll(-1, 1), values.roll(1, 1)
    return values * (cosine + rest) + after * (rest - sine) + before * (rest + sine)


def change_contrast(images: Tensor, gains: Tensor) -> Tensor:
    """Stretch images (B, C, H, W) float about the middle gray, 127.5, by a factor (B,) an image."""
    return (images - 127.5) * gains.view(-1, 1, 1, 1) + 127.5
