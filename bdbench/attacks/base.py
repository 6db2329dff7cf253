"""What an attack is: whom it may poison, what label it wants, and how its trigger changes images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.options import Options
from bdbench.seeds import generator

CHUNK = 2048

Labels = Literal["all-to-one", "all-to-all", "clean"]
Use = Literal["poison", "cover", "test"]
State = dict[str, Tensor]


class Attack(Options, ABC):
    """Base of attacks: the options that all share; a subclass adds `fit` and `stamp`.

    The attacker changes part of the training images and labels, before any augmentation, and later shows the same
    trigger at test time. Rates are shares of the whole training split unless `class_rate` is given.
    """

    paper: ClassVar[str]
    threat: ClassVar[str]
    version: ClassVar[int] = 1

    target: int = Field(0, ge=0, description="Class that the attacker wants (all-to-one and clean labels).")
    rate: float | None = Field(0.1, gt=0, le=1, description="Poisoned share of the whole training split.")
    class_rate: float | None = Field(
        None, gt=0, le=1, description="Poisoned share of the target class, in place of --rate."
    )
    labels: Labels = Field(
        "all-to-one",
        description="all-to-one: relabel to the target; all-to-all: to the next class; clean: target class only, kept.",
    )
    exclude_target: bool = Field(False, description="Never draw images of the target class (all-to-one only).")

    @model_validator(mode="before")
    @classmethod
    def _one_rate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Let `class_rate` take the place of the default rate."""
        return {"rate": None, **values} if values.get("class_rate") is not None else values

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if (self.rate is None) == (self.class_rate is None):
            raise OptionError("give either rate or class_rate")
        if self.class_rate is not None and self.labels == "all-to-all":
            raise OptionError("class_rate has no meaning with all-to-all labels; give rate")
        if self.exclude_target and self.labels != "all-to-one":
            raise OptionError(f"exclude_target has no meaning with {self.labels} labels; leave it out")
        return self

    def files(self) -> tuple[Path, ...]:
        """Return the user's files that the trigger is made from; their content is part of the artifact's id."""
        return ()

    @abstractmethod
    def fit(self, clean: ImageDataset, seed: int) -> State:
        """Return all that triggering needs, as tensors that are stored with the data set.

        Args:
            clean: the training split before poisoning.
            seed: streams are drawn from it by purpose.

        Raises:
            OptionError: the trigger does not fit the images.
        """

    @abstractmethod
    def stamp(self, images: Tensor, state: State, use: Use, noise: list[torch.Generator]) -> Tensor:
        """Put the trigger on a batch.

        Args:
            images: (B, C, H, W) float in [0, 255].
            state: from `fit`.
            use: for a poisoned or cover training sample, or for testing.
            noise: B generators, one an image, for triggers that are random per image; empty where `random_for`
                says that this use draws nothing.

        Returns:
            (B, C, H, W) float; the caller clips to [0, 255] and rounds.
        """

    def random_for(self, use: Use) -> bool:
        """Say whether `stamp` draws per-image noise for this use."""
        return False

    def trigger(self, images: Tensor, rows: Tensor, state: State, use: Use, seed: int) -> Tensor:
        """Return triggered copies of uint8 images; image i depends on its own row only, never on the batch.

        Args:
            images: (N, C, H, W) uint8.
            rows: (N,) int64, each image's row in its split: the address of its noise.
            state: from `fit`.
            use: see `stamp`.
            seed: of the attack.

        Returns:
            (N, C, H, W) uint8, rounded to nearest.
        """
        out = torch.empty_like(images)
        for start in range(0, len(images), CHUNK):
            part = slice(start, start + CHUNK)
            noise = (
                [generator(seed, "trigger", use, row) for row in rows[part].tolist()] if self.random_for(use) else []
            )
            stamped = self.stamp(images[part].float(), state, use, noise)
            out[part] = stamped.clamp_(0, 255).round_().to(torch.uint8)
        return out

    def cover_count(self, poison_count: int) -> int:
        """Return how many cover samples (triggered, truthfully labelled) go with so many poisoned ones."""
        return 0


def pattern_for(values: Tensor, channels: int) -> Tensor:
    """Return an RGB pattern (3, H, W) for images of 3 or 1 channels; gray is its luma (0.299, 0.587, 0.114)."""
    if channels == 3:
        return values
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=values.dtype).view(3, 1, 1)
    return (values * weights).sum(0, keepdim=True)
