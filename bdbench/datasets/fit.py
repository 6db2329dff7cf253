"""How images are brought to one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps


@dataclass(frozen=True)
class Fit:
    """How images are brought to one size, in bilinear resampling.

    Attributes:
        side: pixels of the square that comes out.
        method: "crop" resizes the shorter side and crops the centre; "squash" resizes the whole image.
    """

    side: int
    method: Literal["crop", "squash"] = "crop"

    @property
    def description(self) -> str:
        """What happens to each image, for "all were ..."."""
        if self.method == "crop":
            return f"cropped to their centre square and resized to {self.side}x{self.side}"
        return f"squashed to {self.side}x{self.side}"

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image as a square."""
        square = (self.side, self.side)
        if self.method == "crop":
            return ImageOps.fit(image, square, Image.Resampling.BILINEAR)
        return image.resize(square, Image.Resampling.BILINEAR)
