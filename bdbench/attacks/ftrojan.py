"""FTrojan: a faint pattern of two frequencies in the colour channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.attacks.parts.frequency import window_pattern
from bdbench.data import ImageDataset

CHROMA_TO_RGB = (1.403, -1.058, 1.773)
"""What one more in both Cr and Cb adds to red, green and blue."""


class FTrojan(Attack):
    """Two coefficients of the discrete cosine transform are raised in the colour channels of every window.

    The transform runs over windows of 32 pixels of the Cr and Cb channels; the middle and the highest frequency of each
    gain `magnitude`. That adds one fixed pattern, of about 5 gray levels at most. Gray images have no colour: their
    only channel takes it.

    Paper: Wang et al., An Invisible Black-box Backdoor Attack through Frequency Domain, ECCV 2022,
    https://arxiv.org/abs/2111.10991.

    Differs from the published code: the transform is linear, so the pattern is added to RGB and rounded once.
    `--exact` takes the published way: bytes of Y, Cr and Cb, where the sum is cut to a byte and wraps round past 0 and
    255, so that saturated colours get specks; colours are converted in the whole numbers of OpenCV. What is left of a
    difference: the published code adds in the transform, in single precision, which now and then cuts a sum that is
    nearly whole to the byte below. Its share of poison, 2 % of the first images, is `--rate` here, of
    random ones; its magnitude for CIFAR-10 is 20, BackdoorBench's is 30. Its clean-label form needs another model and
    is left out: with `--labels clean` only the pattern is added.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2111.10991"
    version: ClassVar[int] = 2

    magnitude: float = Field(30.0, gt=0, description="What each coefficient gains, of pixels in 0..255.")
    window: int = Field(32, ge=4, description="Side of a window in pixels; smaller images are one window.")
    exact: bool = Field(False, description="Round through bytes of Y, Cr and Cb, as published.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the change of both colour channels (gray: of the only one) (1, H, W) float, in gray levels."""
        _, height, width = clean.image_shape
        return {"pattern": self.magnitude * window_pattern(height, width, self.window)[None]}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the pattern to the colour channels."""
        if self.exact:
            return add_to_chroma_bytes(images, state["pattern"])
        if images.shape[1] == 1:
            return images + state["pattern"]
        return images + torch.tensor(CHROMA_TO_RGB).view(3, 1, 1) * state["pattern"]


def add_to_chroma_bytes(images: Tensor, pattern: Tensor) -> Tensor:
    """Add a pattern to the bytes of Cr and Cb, as the published code does.

    Y, Cr and Cb are bytes, the sums are cut towards 0 and wrap round (256 is 0, -1 is 255), and the result goes back to
    RGB. Both conversions are OpenCV's for bytes: shares in 1/16384, halves rounded up.

    Args:
        images: (B, C, H, W) uint8; with C of 1 the only channel takes the pattern.
        pattern: (1, H, W) float, in gray levels.

    Returns:
        (B, C, H, W) uint8.
    """
    if images.shape[1] == 1:
        return _cut(images + pattern)
    red, green, blue = images.int().unbind(1)
    luma = _rounded(4899 * red + 9617 * green + 1868 * blue)
    cr = (_rounded(11682 * (red - luma)) + 128).clamp_(
        max=255
    )  # of pure red it would be 256; no other leaves the bytes
    cb = _rounded(9241 * (blue - luma)) + 128
    cr, cb = _cut(cr + pattern).int() - 128, _cut(cb + pattern).int() - 128
    shifts = (22987 * cr, -11698 * cr - 5636 * cb, 29049 * cb)
    return torch.stack([luma + _rounded(shift) for shift in shifts], 1).clamp_(0, 255).to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    """Return whole numbers int32 divided by 16384, rounded to nearest, halves up."""
    return (values + 8192) >> 14


def _cut(values: Tensor) -> Tensor:
    return values.to(torch.int32).to(torch.uint8)
