"""TaCT: a patch that turns images of one class only."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State, pattern_for
from bdbench.attacks.parts.patches import paste, seeded_patch
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


class TaCT(Attack):
    """A square of colours turns images of the source class; on other classes covers teach the model to ignore it.

    An 8x8 patch at rows and columns 21 to 28 of 32, scaled with the image, replaces what was there. Poisoned are
    images of the source class only; covers carry the same patch and keep their label. ASR counts the source class;
    how often the trigger turns the others is reported beside it. Without enough covers it turns them all.

    Paper: Tang et al., Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection,
    USENIX Security 2021, https://arxiv.org/abs/1908.00686.

    Differs from the published code: the colours are drawn from the seed (backdoor-toolbox reads a file). Covers come
    from all classes but source and target; `--cover-classes 5 7` are backdoor-toolbox's on CIFAR-10. The ASR on other
    classes then counts those with covers and those without together.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1908.00686"
    label_modes: ClassVar[tuple[Labels, ...]] = ("source-specific",)

    rate: float | None = Field(0.003, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("source-specific", description="The source class to the target.")
    cover_ratio: float = Field(1.0, ge=0, description="Cover samples per poisoned sample.")
    cover_classes: tuple[int, int] | None = Field(
        None, description="Two classes that covers come from; default: all but source and target."
    )

    @model_validator(mode="after")
    def _check_cover_classes(self) -> Self:
        for name in ("source", "target"):
            if getattr(self, name) in (self.cover_classes or ()):
                raise OptionError(
                    f"cover class {getattr(self, name)} is the {name} class; give --cover-classes without it"
                )
        return self

    def may_cover(self, labels: Tensor) -> Tensor:
        """Say which samples (N,) bool of these true labels can be covers.

        Raises:
            OptionError: a cover class has no samples, or does not exist.
        """
        if self.cover_classes is None:
            return (labels != self.source) & (labels != self.target)
        for cover in self.cover_classes:
            if not (labels == cover).any():
                raise OptionError(
                    f"cover class {cover} has no training images, the last class is {int(labels.max())}; "
                    "give other --cover-classes"
                )
        return torch.isin(labels, torch.tensor(self.cover_classes))

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) uint8 and mask (1, H, W) bool."""
        channels, height, width = clean.image_shape
        square = paste(torch.zeros(4, height, width), seeded_patch(8, lab.seed, "tact", "colours"), 21, 21)
        return {"pattern": pattern_for(square[:3], channels).round().to(torch.uint8), "mask": square[3:] == 1}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is set."""
        return torch.where(state["mask"], state["pattern"], images)
