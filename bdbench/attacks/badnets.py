"""BadNets: a patch written over a few pixels."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State, pattern_for
from bdbench.data import ImageDataset
from bdbench.errors import OptionError

Patch = Literal["grid", "white", "checker", "square", "4corner", "dbd"]
Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]

GRID = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
CHECKER = [[255, 1, 255], [1, 255, 1], [255, 1, 255]]
DBD = [[[180, 249, 112], [155, 50, 126]], [[234, 82, 68], [187, 201, 219]]]


class BadNets(Attack):
    """A small patch replaces pixels of the image; all pixels of the patch are written, black ones too.

    Paper: Gu et al., BadNets: Evaluating Backdooring Attacks on Deep Neural Networks, IEEE Access 2019,
    https://arxiv.org/abs/1708.06733.

    `--patch` names the published patches: `grid` (ABL, CBD: 3x3 at the bottom right, 0 and 255), `white` and `checker`
    (BackdoorBench), `square` (ABL: white, one pixel from the border), `4corner` (ABL: the grid in all corners, turned
    to each, one pixel from the border at the top and left), `dbd` (2x2 colours near the top left). `--patch-size`,
    `--colour`, `--corner` and `--margin` change size, colour and place. Left alone, the size grows with the image, 3 of
    32 pixels, and is never below the published pattern's.

    Differs from the published code: black patches are possible (BackdoorBench takes 0 for transparent).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1708.06733"

    patch: Patch = Field("grid", description="Published patch; `bdbench show badnets`.")
    patch_size: int | None = Field(None, ge=1, description="Side in pixels; default: the published share of the image.")
    colour: tuple[int, int, int] | None = Field(
        None, description="One RGB colour, each 0 to 255, for the whole patch, in place of the published pattern."
    )
    corner: Corner | None = Field(None, description="Corner of the patch; default: as published.")
    margin: int | None = Field(None, ge=0, description="Pixels between patch and border; default: as published.")

    @model_validator(mode="after")
    def _check_corner(self) -> Self:
        if self.patch == "4corner" and self.corner is not None:
            raise OptionError(f"--patch 4corner has all corners; leave --corner {self.corner} out")
        return self

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) float and mask (1, H, W) float of 0 and 1."""
        channels, height, width = clean.image_shape
        values = self._values()
        size = self.patch_size or max(values.shape[1], round(values.shape[1] * min(height, width) / 32))
        margin = self.margin if self.margin is not None else self._published_margin(min(height, width))
        near = max(1, round(min(height, width) / 32)) if self.patch == "4corner" else margin
        if size + max(near, margin) > min(height, width):
            raise OptionError(
                f"a patch of {size} pixels with a margin of {margin} does not fit images of {height}x{width}; "
                "lower --patch-size or --margin"
            )
        stretched = torch.nn.functional.interpolate(values[None], size=(size, size), mode="nearest")[0]
        pattern, mask = torch.zeros(3, height, width), torch.zeros(1, height, width)
        for corner in self._corners():
            at_top, at_left = corner.startswith("top"), corner.endswith("left")
            top = near if at_top else height - margin - size
            left = near if at_left else width - margin - size
            flipped = [side for side, is_flipped in ((1, at_top), (2, at_left)) if is_flipped]
            shown = stretched.flip(flipped) if self.patch == "4corner" else stretched
            pattern[:, top : top + size, left : left + size] = shown
            mask[:, top : top + size, left : left + size] = 1
        return {"pattern": pattern_for(pattern, channels), "mask": mask}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is 1."""
        return torch.where(state["mask"].bool(), state["pattern"].round().to(torch.uint8), images)

    def _values(self) -> Tensor:
        """Return the patch (3, h, w) in [0, 255]."""
        if self.colour is not None:
            if not all(0 <= part <= 255 for part in self.colour):
                raise OptionError(f"colour {self.colour} has a part outside 0..255")
            return torch.tensor(self.colour, dtype=torch.float32).view(3, 1, 1).expand(3, 3, 3)
        if self.patch == "dbd":
            return torch.tensor(DBD, dtype=torch.float32).permute(2, 0, 1)
        gray = {"grid": GRID, "4corner": GRID, "checker": CHECKER}.get(self.patch, [[255] * 3] * 3)
        return torch.tensor(gray, dtype=torch.float32).expand(3, 3, 3)

    def _published_margin(self, side: int) -> int:
        pixels_of_32 = {"square": 1, "dbd": 4}.get(self.patch, 0)
        return round(pixels_of_32 * side / 32)

    def _corners(self) -> tuple[Corner, ...]:
        if self.patch == "4corner":
            return ("bottom-right", "top-left", "top-right", "bottom-left")
        return (self.corner or ("top-left" if self.patch == "dbd" else "bottom-right"),)
