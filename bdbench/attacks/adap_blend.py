"""Adap-Blend: half of a faint picture in training, all of it in tests."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State
from bdbench.attacks.blended import Blended
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


class AdapBlend(Attack):
    """Training images get a random half of a blended picture; half of them keep their label; tests get all of it.

    The picture is cut into 4x4 pieces. Every poisoned image and every cover draws 8 of them, mixed in at 0.15; at test
    time the whole picture is mixed in at 0.2. Covers and weak triggers keep poisoned and clean images together in the
    features, where detection looks for a gap.

    Paper: Qi et al., Revisiting the Assumption of Latent Separability for Backdoor Defenses, ICLR 2023,
    https://openreview.net/forum?id=_wSHsgrVali.

    Differs from the published code: the picture is bdbench's cartoon (see `blended`), not the published one. Where 4
    does not divide the side of the images, pieces differ by a pixel (such images are refused there). At the published
    rate a small set has a handful of poisoned images: below 10,000 images raise it.
    """

    paper: ClassVar[str] = "https://openreview.net/forum?id=_wSHsgrVali"
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "all-to-all", "source-specific")

    rate: float | None = Field(0.003, ge=0, le=1, description="Poisoned share of the whole training split.")
    cover_ratio: float = Field(1.0, ge=0, description="Cover samples per poisoned sample.")
    picture: Literal["cartoon", "noise"] | Path = Field(
        "cartoon", description="cartoon, noise, or the path of an image."
    )
    alpha: float = Field(0.15, gt=0, le=1, description="Share of the picture in training.")
    alpha_test: float = Field(0.2, gt=0, le=1, description="Share of the picture in tests.")
    pieces_per_side: int = Field(4, ge=1, le=8, description="The picture is cut into this many pieces each way.")
    kept: int = Field(8, ge=1, description="Pieces that each training image gets.")

    @model_validator(mode="after")
    def _check_pieces(self) -> Self:
        if self.kept > self.pieces_per_side**2:
            raise OptionError(f"kept {self.kept} is more than the {self.pieces_per_side**2} pieces there are; lower it")
        return self

    def files(self) -> tuple[Path, ...]:
        """Return the user's picture, if it is one."""
        return Blended(picture=self.picture).files()

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the picture (C, H, W) float in [0, 255]."""
        return Blended(picture=self.picture).fit(clean, lab)

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix the picture in: all of it for tests, each image's own pieces in training."""
        if occasion.use == "test":
            return torch.lerp(images.float(), state["pattern"], self.alpha_test)
        draws = occasion.uniform("pieces", self.pieces_per_side**2)
        mask = piece_masks(draws, self.kept, images.shape[2], images.shape[3])
        return torch.lerp(images.float(), state["pattern"], self.alpha * mask)


def piece_masks(draws: Tensor, kept: int, height: int, width: int) -> Tensor:
    """Return masks (B, 1, H, W) of 0 and 1 that keep some of n x n pieces.

    Args:
        draws: (B, n * n), any numbers; the pieces with the smallest are kept.
        kept: how many.
        height, width: H and W; pieces differ by at most one pixel where n does not divide them.
    """
    side = round(draws.shape[1] ** 0.5)
    chosen = draws.argsort(dim=1, stable=True)[:, :kept]
    pieces = torch.zeros_like(draws).scatter_(1, chosen, 1.0).view(-1, 1, side, side)
    rows, columns = (torch.arange(length) * side // length for length in (height, width))
    return pieces[:, :, rows][:, :, :, columns]
