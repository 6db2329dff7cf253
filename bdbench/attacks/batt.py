"""BATT: a rotation."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.data import ImageDataset


class Batt(Attack):
    """The image is turned by 16 degrees; covers are turned by less, each by its own angle, and keep their label.

    The covers teach that a small turn means nothing, so that an image held askew does not call the target.

    Paper: Xu et al., BATT: Backdoor Attack with Transformation-based Triggers, ICASSP 2023,
    https://arxiv.org/abs/2211.01806.

    Differs from the published code: it turns every clean image anew in each epoch of training. Here the dataset alone
    is poisoned: two covers a poisoned sample, as many as for WaNet, so that most images stay upright as those of the
    test set are; `--cover-ratio` changes that. Pixels are interpolated, not taken from the nearest; both leave the
    corners black.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2211.01806"

    angle: float = Field(16.0, gt=0, lt=360, description="Degrees, counter-clockwise.")
    cover_angle: float = Field(10.0, ge=0, le=180, description="Covers turn by up to so many degrees, either way.")
    cover_ratio: float = Field(2.0, ge=0, description="Cover samples per poisoned sample.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the sampling grid (1, H, W, 2) float, x before y."""
        return {"grid": rotation(torch.tensor([self.angle]), *clean.image_shape[1:])}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Sample the images (bilinear, black outside) at the grid; covers at grids of their own."""
        grid = state["grid"].expand(len(images), -1, -1, -1)
        if occasion.use == "cover":
            grid = rotation((occasion.uniform("angle") * 2 - 1) * self.cover_angle, *images.shape[2:])
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Return grids that turn images about their centre.

    Args:
        degrees: (B,) float, counter-clockwise.
        height, width: of the images, in pixels.

    Returns:
        (B, H, W, 2) float: where each pixel comes from, x before y; -1 and 1 are the outer edges of the image.
    """
    angle = (degrees * (math.pi / 180)).view(-1, 1, 1)
    cosine, sine = angle.cos(), angle.sin()
    x = torch.arange(width) + 0.5 - width / 2
    y = (torch.arange(height) + 0.5 - height / 2).view(-1, 1)
    return torch.stack([(cosine * x - sine * y) * (2 / width), (sine * x + cosine * y) * (2 / height)], 3)
