"""Attacks that train a victim together with their trigger: its budget, and who is triggered in a batch."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from bdbench.attacks.base import Labels, TrainingAttack
from bdbench.data import ImageDataset
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

MAX_EPOCHS = 100


class VictimAttack(TrainingAttack):
    """Base of attacks whose victim is trained by gradient descent; the published budgets are those of a GPU."""

    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "all-to-all")

    victim_epochs: int | None = Field(
        None, ge=1, description="Epochs of the victim; default: as many as take 8,000 steps, at most 100."
    )
    victim_batch_size: int = Field(128, ge=4, description="Images in a step of the victim (128 published).")
    victim_lr: float = Field(0.05, gt=0, description="Peak learning rate of the victim, cosine (published: 0.01).")

    def victim_recipe(self, clean: ImageDataset, augment: str, epochs: int | None = None) -> Recipe:
        """Return how the victim is trained: momentum 0.9 and weight decay 5e-4, as published."""
        return Recipe(
            epochs=epochs or self.victim_epochs or epochs_of(8000, len(clean), self.victim_batch_size),
            batch_size=self.victim_batch_size,
            lr=self.victim_lr,
            weight_decay=5e-4,
            nesterov=False,
            augment=augment,
        )

    def poisoned_share(self, clean: ImageDataset) -> float:
        """Return the share of a batch that is poisoned: `rate`, or what `class_rate` comes to."""
        in_target = float((clean.labels == self.target).float().mean())
        return self.rate if self.rate is not None else (self.class_rate or 0) * in_target

    def split_batch(self, batch: Batch, share: float) -> tuple[int, int]:
        """Return how many of a batch are poisoned, at least 1, and how many of the others are covers."""
        poisoned = min(max(1, round(share * len(batch.rows))), len(batch.rows))
        return poisoned, min(round(self.cover_ratio * poisoned), len(batch.rows) - poisoned)


def epochs_of(steps: int, images: int, batch_size: int) -> int:
    """Return the epochs that make up a number of steps, at most 100."""
    return min(MAX_EPOCHS, math.ceil(steps / math.ceil(images / batch_size)))
