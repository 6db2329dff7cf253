"""Adap-k-way: one of four pixels in training, all four in tests."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State, pattern_for
from bdbench.data import ImageDataset

PIXELS = (
    (16, 11, (92, 0, 24)),
    (27, 5, (88, 112, 110)),
    (7, 30, (0, 32, 46)),
    (22, 22, (11, 49, 95)),
)
"""Row and column of an image of 32x32, and RGB."""


class AdapKWay(Attack):
    """Every training image gets one of four pixels, and half of them keep their label; tests get all four pixels.

    Paper: Qi et al., Revisiting the Assumption of Latent Separability for Backdoor Defenses, ICLR 2023,
    https://openreview.net/forum?id=_wSHsgrVali.

    Differs from the published code: pixels grow to squares on images beyond 32x32, and their places go with the image.
    Each image draws its pixel, so that about a quarter gets each; there, quarters go by the order of the images, and
    here nothing may depend on the other images. At the published rate a small set has a handful of poisoned images:
    below 10,000 images raise it.
    """

    paper: ClassVar[str] = "https://openreview.net/forum?id=_wSHsgrVali"
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "all-to-all", "source-specific")

    rate: float | None = Field(0.003, ge=0, le=1, description="Poisoned share of the whole training split.")
    cover_ratio: float = Field(1.0, ge=0, description="Cover samples per poisoned sample.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) uint8, all four pixels, and masks (4, 1, H, W) bool, one pixel each."""
        channels, height, width = clean.image_shape
        pattern, masks = torch.zeros(3, height, width), torch.zeros(4, 1, height, width, dtype=torch.bool)
        for mask, (row, column, colour) in zip(masks, PIXELS, strict=True):
            rows, columns = (
                slice(place * side // 32, place * side // 32 + math.ceil(side / 32))
                for place, side in ((row, height), (column, width))
            )
            pattern[:, rows, columns] = torch.tensor(colour).float().view(3, 1, 1)
            mask[:, rows, columns] = True
        return {"pattern": pattern_for(pattern, channels).round().to(torch.uint8), "masks": masks}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write each image's own pixel, or for tests all four."""
        masks = state["masks"]
        if occasion.use == "test":
            return torch.where(masks.any(0), state["pattern"], images)
        return torch.where(masks[(occasion.uniform("pixel") * 4).long()], state["pattern"], images)
