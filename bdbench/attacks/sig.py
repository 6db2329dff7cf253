"""SIG: a sinusoid added to images of the target class."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State
from bdbench.data import ImageDataset


class Sig(Attack):
    """A horizontal sinusoid, delta * sin(2 pi f j / W) over the columns j, is added to images of the target class.

    Clean-label: no label changes, so a person who checks labels finds nothing. At test time the same signal on any
    image calls the target. Weak where few images of the class carry it or training is short.

    Paper: Barni et al., A New Backdoor Attack in CNNs by Training Set Corruption, ICIP 2019,
    https://arxiv.org/abs/1902.11237.

    Differs from the published code: the masks of ABL and CBD wrap negative values round to 237..255 and nearly hide the
    image; here the sum is clipped, as the paper's formula says. The default rate, 2 % of the set, is a fifth of a
    CIFAR-10 class; BackdoorBench's 10 % takes the whole class.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.11237"

    rate: float | None = Field(0.02, gt=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="Clean by default; the dirty-label rules work too.")
    delta: float = Field(40.0, gt=0, le=255, description="Amplitude in training, of 255.")
    delta_test: float | None = Field(None, gt=0, le=255, description="Amplitude at test time; default: as in training.")
    frequency: float = Field(6.0, gt=0, description="Periods per image width.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the wave (1, 1, W) float in [-1, 1]."""
        width = clean.image_shape[2]
        return {"wave": torch.sin(2 * math.pi * self.frequency * torch.arange(width) / width).view(1, 1, width)}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the wave to every row and channel."""
        amplitude = self.delta_test if occasion.use == "test" and self.delta_test is not None else self.delta
        return images + amplitude * state["wave"]
