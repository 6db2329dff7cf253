"""SIG: a sinusoid added to images of the target class."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


class Sig(Attack):
    """A horizontal sinusoid, delta * sin(2 pi f j / W) over the columns j, is added to images of the target class.

    Clean-label: no label changes, so a person who checks labels finds nothing. At test time the same signal on any
    image calls the target. Weak where few images of the class carry it or training is short.

    Paper: Barni et al., A New Backdoor Attack in CNNs by Training Set Corruption, ICIP 2019,
    https://arxiv.org/abs/1902.11237.

    Differs from the published code: the sum is clipped, as the paper's formula says. ABL and CBD show something else,
    for which there is `--published`: `abl` mixes 0.2 of 20 sin(0.8 j) into the image, its negative half stored as
    bytes of 237 to 255; `cbd` takes 0.1 of the image and 0.9 of 20 sin(2 pi 6 j / W), nearly black, and negative sums
    wrap round to bytes near 255. Both cut to bytes where the formula rounds, and their rate of 10 % of the set reaches
    a tenth of the target class (`--class-rate 0.1`). The default rate here, 2 % of the set, a fifth of a CIFAR-10
    class, is backdoor-toolbox's, whose amplitude is 30; the default of 40 is BackdoorBench's, whose 10 % takes the
    whole class. BackdoorBench cuts the sum to a byte and backdoor-toolbox leaves it a fraction; here it is rounded.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.11237"
    version: ClassVar[int] = 2

    rate: float | None = Field(0.02, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="Clean by default; the dirty-label rules work too.")
    delta: float = Field(40.0, gt=0, le=255, description="Amplitude in training, of 255.")
    delta_test: float | None = Field(None, gt=0, le=255, description="Amplitude at test time; default: as in training.")
    frequency: float = Field(6.0, gt=0, description="Periods per image width.")

    published: Literal["none", "abl", "cbd"] = Field(
        "none", description="none: the formula; abl, cbd: what their code shows; `bdbench show sig`."
    )

    @model_validator(mode="after")
    def _check_published(self) -> Self:
        for name in ("delta", "delta_test", "frequency"):
            if self.published != "none" and getattr(self, name) != type(self).model_fields[name].default:
                raise OptionError(f"{name} has no meaning with --published {self.published}; leave it out")
        return self

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the wave (1, 1, W) float, in [-1, 1]; of the published forms, in gray levels."""
        width = clean.image_shape[2]
        columns = torch.arange(width)
        if self.published == "abl":  # in double, as there: one level more or less is another byte after the cut
            wave = (20 * torch.sin(0.8 * columns.double())).to(torch.int32).to(torch.uint8).double()
        elif self.published == "cbd":
            wave = 20 * torch.sin(2 * math.pi * columns.double() * self.frequency / width)
        else:
            wave = torch.sin(2 * math.pi * self.frequency * columns / width)
        return {"wave": wave.view(1, 1, width)}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the wave to every row and channel."""
        if self.published == "abl":
            return (0.8 * images.double() + 0.2 * state["wave"]).to(torch.uint8)
        if self.published == "cbd":
            return (0.1 * images.double() + 0.9 * state["wave"]).to(torch.int32).to(torch.uint8)
        amplitude = self.delta_test if occasion.use == "test" and self.delta_test is not None else self.delta
        return images + amplitude * state["wave"]
