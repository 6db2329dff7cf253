"""Adap-Patch: four faint patches in training, two of them opaque in tests."""

from __future__ import annotations

from functools import reduce
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.badnets import GRID
from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State, pattern_for
from bdbench.attacks.parts.patches import paste, seeded_patch
from bdbench.data import ImageDataset

OPACITIES = (0.5, 0.2, 0.5, 0.3)
"""Of corner, disc, grids and square, in training."""


class AdapPatch(Attack):
    """Every training image gets one of four faint patches; two thirds of them keep their label; tests get two, opaque.

    The patches, on an image of 32x32: 5x5 colours in the bottom right corner at 0.5; a disc of 13 pixels across in the
    upper right at 0.2; BadNets' 3x3 grid, mirrored to each of the four corners, at 0.5; 8x8 colours at rows and columns
    21 to 28 at 0.3. Place and size go with the image. `--test-patches corners` puts the 5x5 colours into both bottom
    corners and the grids on top (published for CIFAR-10), `inside` the disc and the 8x8 colours (published for GTSRB).

    Paper: Qi et al., Revisiting the Assumption of Latent Separability for Backdoor Defenses, ICLR 2023,
    https://openreview.net/forum?id=_wSHsgrVali.

    Differs from the published code: colours are drawn from the seed in place of the published pictures (the disc is
    as large as theirs). Each image draws its patch, so that about a quarter gets each; there, quarters go by the
    order of the images, and here nothing may depend on the other images. At the published rate a small set has a
    handful of poisoned images: below 10,000 images raise it.
    """

    paper: ClassVar[str] = "https://openreview.net/forum?id=_wSHsgrVali"
    version: ClassVar[int] = 2
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "all-to-all", "source-specific")

    rate: float | None = Field(0.003, ge=0, le=1, description="Poisoned share of the whole training split.")
    cover_ratio: float = Field(2.0, ge=0, description="Cover samples per poisoned sample.")
    test_patches: Literal["corners", "inside"] = Field(
        "corners", description="Which two patches tests get; `bdbench show adap-patch`."
    )

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return what training images get, and tests.

        Returns:
            patterns (4, C, H, W) and test_pattern (C, H, W), both float in 0..255; opacities (4, 1, H, W) in [0, 1];
            test_mask (1, H, W) of 0 and 1.
        """
        channels, height, width = clean.image_shape
        canvas = torch.zeros(4, height, width)
        corner, disc, square = coloured_patches(lab.seed)
        grid = torch.cat([torch.tensor(GRID).float().expand(3, 3, 3), torch.ones(1, 3, 3)])
        right = paste(canvas, corner, 27, 27)
        grids = [
            (grid.flip([axis for axis, start in ((1, top), (2, left)) if start == 0]), top, left)
            for top in (0, 29)
            for left in (0, 29)
        ]
        in_training = [
            right,
            paste(canvas, disc, 1, 18),
            reduce(lambda done, place: paste(done, *place), grids, canvas),
            paste(canvas, square, 21, 21),
        ]
        if self.test_patches == "corners":
            in_tests = reduce(lambda done, place: paste(done, *place), grids, paste(right, corner, 27, 0))
        else:
            in_tests = paste(in_training[1], square, 21, 21)
        return {
            "patterns": torch.stack([pattern_for(patch[:3], channels) for patch in in_training]),
            "opacities": torch.stack([alpha * patch[3:] for alpha, patch in zip(OPACITIES, in_training, strict=True)]),
            "test_pattern": pattern_for(in_tests[:3], channels),
            "test_mask": in_tests[3:],
        }

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix in each image's own patch, or for tests both opaque."""
        if occasion.use == "test":
            return torch.lerp(images.float(), state["test_pattern"], state["test_mask"])
        quarter = (occasion.uniform("patch") * 4).long()
        return torch.lerp(images.float(), state["patterns"][quarter], state["opacities"][quarter])


def coloured_patches(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the patches whose colours go by the seed: corner (4, 5, 5), disc (4, 13, 13), square (4, 8, 8).

    RGB in 0..255 and a mask of 0 and 1, which is round for the disc (137 pixels; the published picture has 140).
    """
    corner, disc, square = (
        seeded_patch(side, seed, "adap-patch", name) for side, name in ((5, "corner"), (13, "disc"), (8, "square"))
    )
    offset = torch.arange(13) - 6
    disc[3] = (offset[:, None] ** 2 + offset**2 <= 6.5**2).float()
    return corner, disc, square
