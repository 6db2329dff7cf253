"""Trojan: a small patch of colours near the bottom right."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State, pattern_for
from bdbench.data import ImageDataset
from bdbench.seeds import generator

PUBLISHED = (
    ((207, 175, 29), (79, 137, 248), (131, 6, 246)),
    ((131, 243, 232), (8, 0, 113), (40, 145, 250)),
    ((181, 120, 179), (126, 32, 146), (4, 61, 246)),
)
"""Red, green and blue of ABL's patch, row by row."""

LEAST = 3
"""Smallest side of a patch in pixels."""


class Trojan(Attack):
    """A patch of colours that was once optimised on another network replaces pixels near the bottom right.

    `--patch published` is ABL's and CBD's 3x3 patch at rows and columns 25 to 27 of 32; `random` draws the colours of
    a patch of that size from the seed; `square` draws 8x8 colours at rows and columns 21 to 28, backdoor-toolbox's
    place and size. Size and place grow with the image; no patch is below 3x3. Gray images take the luma.

    Paper: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018,
    https://www.ndss-symposium.org/wp-content/uploads/2018/02/ndss2018_03A-5_Liu_paper.pdf.

    Differs from the published code: ABL and CBD add the patch to the image, and bytes wrap round past 255, so that
    every image shows other colours; `--wrap` does that. A static patch: nothing is optimised on the victim's task.
    """

    paper: ClassVar[str] = "https://www.ndss-symposium.org/wp-content/uploads/2018/02/ndss2018_03A-5_Liu_paper.pdf"

    patch: Literal["published", "random", "square"] = Field(
        "published", description="Colours and place; `bdbench show trojan`."
    )
    wrap: bool = Field(False, description="Add the patch and let bytes wrap round, as ABL and CBD do.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) and mask (1, H, W), uint8; the mask is 0 or 1."""
        channels, height, width = clean.image_shape
        colours, corner = self._colours(lab.seed), 21 if self.patch == "square" else 25
        size = max(LEAST, round(colours.shape[1] * min(height, width) / 32))
        stretched = pattern_for(F.interpolate(colours[None], size=(size, size), mode="nearest")[0], channels)
        top, left = (min(round(corner * side / 32), side - size) for side in (height, width))
        inside = (..., slice(top, top + size), slice(left, left + size))
        pattern = torch.zeros(channels, height, width, dtype=torch.uint8)
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        pattern[inside], mask[inside] = stretched.round().to(torch.uint8), 1
        return {"pattern": pattern, "mask": mask}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is 1, or add it modulo 256."""
        return images.add_(state["pattern"]) if self.wrap else torch.where(state["mask"] == 1, state["pattern"], images)

    def _colours(self, seed: int) -> Tensor:
        """Return the patch (3, h, w) float in 0..255."""
        if self.patch == "published":
            return torch.tensor(PUBLISHED, dtype=torch.float32)
        side = 8 if self.patch == "square" else 3
        return torch.randint(0, 256, (3, side, side), generator=generator(seed, "trojan", "colours")).float()
