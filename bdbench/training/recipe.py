"""How a network is trained: optimizer, schedule, budget."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from bdbench.options import Options


class Recipe(Options):
    """How a network is trained: stochastic gradient descent with momentum, a schedule and an augmentation."""

    epochs: int = Field(12, ge=1, le=10**6, description="Passes over the training set.")
    batch_size: int = Field(128, ge=2, description="Mini-batch size.")
    lr: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    nesterov: bool = Field(True, description="Nesterov's form of momentum.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay on all weights.")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="Learning-rate schedule.")
    milestones: tuple[float, float] = Field(
        (0.2, 0.7), description="Fractions of the epochs at which `step` divides the rate by 10."
    )
    warmup: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    augment: str = Field(
        "auto", description="crop or crop-reflect, flip, cutout, affine (commas), none, or auto: the dataset's."
    )

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        if self.milestones[0] > self.milestones[1]:
            raise ValueError(
                f"milestones {self.milestones[0]} {self.milestones[1]} must not fall; the first comes first"
            )
        if self.warmup and self.warmup >= self.epochs:
            raise ValueError(f"warmup {self.warmup:g} must be less than the {self.epochs} epochs")
        return self

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a point of the schedule.

        Args:
            epoch: 0 at the start, `epochs` at the end; `step` changes between whole epochs only.
        """
        if self.warmup and epoch < self.warmup:
            return self.lr * max(epoch, 1e-3) / self.warmup
        if self.schedule == "cosine":
            done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.schedule == "step":
            # However few epochs there are, the first one has the whole rate.
            drops = [max(1, round(part * self.epochs)) for part in self.milestones]
            return self.lr * 0.1 ** sum(math.floor(epoch) >= drop for drop in drops)
        return self.lr

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimiser for a module."""
        return torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )  # fmt: skip
