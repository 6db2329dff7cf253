"""CTRL: FTrojan's pattern, three times as strong, on images of the target class."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State
from bdbench.attacks.parts.frequency import window_pattern
from bdbench.data import ImageDataset

CHROMA_TO_RGB = (1.14, -0.977, 2.029)
"""What one more in both U and V adds to red, green and blue."""


class Ctrl(Attack):
    """Two coefficients of the discrete cosine transform are raised in the colour of images of the target class.

    Clean-label: no label changes. Made for self-supervised learning, where augmented views share the pattern; against
    ordinary training it is weaker. The default rate, 5 % of the set, is half of a CIFAR-10 class. Gray images have no
    colour: their only channel takes the pattern.

    Paper: Li et al., An Embarrassingly Simple Backdoor Attack on Self-supervised Learning, ICCV 2023,
    https://arxiv.org/abs/2210.07346.

    Differs from the published code: the pattern is added to RGB and rounded once, not cut to bytes. Windows of 32
    pixels tile larger images, as the authors do it; BackdoorBench takes one window of the image's size, which is
    fainter (`--window 64` for images of 64 pixels). The authors poison 1 %, for self-supervised learning.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07346"

    rate: float | None = Field(0.05, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="Clean by default; the dirty-label rules work too.")
    magnitude: float = Field(100.0, gt=0, description="What each coefficient gains in training, of pixels in 0..255.")
    magnitude_test: float | None = Field(None, gt=0, description="The same at test time; default: as in training.")
    window: int = Field(32, ge=4, description="Side of a window in pixels; smaller images are one window.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the change of the image by coefficients of 1 (C, H, W) float, in gray levels."""
        channels, height, width = clean.image_shape
        pattern = window_pattern(height, width, self.window)[None]
        return {"pattern": torch.tensor(CHROMA_TO_RGB).view(3, 1, 1) * pattern if channels == 3 else pattern}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the pattern."""
        at_test = self.magnitude if self.magnitude_test is None else self.magnitude_test
        return images + (at_test if occasion.use == "test" else self.magnitude) * state["pattern"]
