"""WaNet: a smooth warp of the image."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.data import ImageDataset
from bdbench.seeds import generator
from bdbench.training.devices import sent

LARGEST_SIDE = 32
"""Pixels of the side that the published strength is for."""


class WaNet(Attack):
    """A smooth random warp, one for all images, is the trigger; covers are warped otherwise and keep their label.

    The field: k x k control points, uniform in [-1, 1], divided by their mean size, enlarged bicubically, times
    `strength` over the image side, of which no more than 32 pixels count: on larger images the shift grows with them.
    Cover samples add their own uniform noise, of up to one such step, to the same field.

    Paper: Nguyen and Tran, WaNet: Imperceptible Warping-based Backdoor Attack, ICLR 2021,
    https://arxiv.org/abs/2102.10369.

    Differs from the published code: the paper's attacker controls training and warps anew in every batch; here the
    images are poisoned once, which is weaker at the published strength of 0.5 (the mean shift is a quarter of a
    pixel, mostly a blur), so the default is 1.0. Every cover image draws its own noise (backdoor-toolbox reuses one).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2102.10369"
    version: ClassVar[int] = 2

    control_points: int = Field(4, ge=2, description="k: the warp is drawn on a k x k grid.")
    strength: float = Field(
        1.0, gt=0, description="s: mean shift of the control points, in half pixels (of 32); 0.5 as published."
    )
    cover_ratio: float = Field(2.0, ge=0, description="Cover samples per poisoned sample.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the sampling grid (H, W, 2) float in [-1, 1], x before y."""
        _, height, width = clean.image_shape
        points = torch.rand(1, 2, *[self.control_points] * 2, generator=generator(lab.seed, "wanet", "field")) * 2 - 1
        return {"grid": warp_grid(points, self.strength, height, width)}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Sample the images at the grid; covers at a grid with noise of their own."""
        _, _, height, width = images.shape
        grid = state["grid"].expand(len(images), -1, -1, -1)
        if occasion.use == "cover":
            grid = shaken(grid, occasion.uniform("shifts", height, width, 2))
        return warped(images.float(), grid)


def warp_grid(points: Tensor, strength: float, height: int, width: int) -> Tensor:
    """Return the sampling grid (H, W, 2), in [-1, 1], x before y, that control points (1, 2, k, k) of any size make."""
    points = points / points.abs().mean()
    field = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (torch.stack([x, y], 2) + strength / counted_sides(height, width) * field).clamp(-1, 1)


def shaken(grid: Tensor, drawn: Tensor) -> Tensor:
    """Shift every point of grids (B, H, W, 2) on its own, up to half a pixel of 32; `drawn` is as large, in [0, 1)."""
    _, height, width, _ = grid.shape
    return (grid + (drawn * 2 - 1) / sent(counted_sides(height, width), grid.device)).clamp(-1, 1)


def counted_sides(height: int, width: int) -> Tensor:
    """Return by how many pixels, x and y, a shift is divided: those of the side, 32 at most."""
    return torch.tensor([width, height]).clamp_max(LARGEST_SIDE)


def warped(images: Tensor, grid: Tensor) -> Tensor:
    """Sample images (B, C, H, W) float at grids (B, H, W, 2): bilinear, aligned corners, zero outside."""
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
