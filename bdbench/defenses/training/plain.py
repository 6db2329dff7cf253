"""Plain training: the row that every defense is read against, and the two that bound it from above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bdbench.data import ImageDataset, joined
from bdbench.defenses.base import Defended, Defense, Task
from bdbench.errors import OptionError
from bdbench.training.loop import mean_cross_entropy


class NoDefense(Defense):
    """Trains on the poisoned set as it is, with mean cross entropy.

    The `paper` budget is the one that CBD's authors give their clean model: 100 epochs, learning rate divided by 10
    after 20 and 70 of them, but in batches of 128, where their code (and `cbd` here) takes 64.
    """

    paper: ClassVar[str] = "none"
    threat: ClassVar[str] = "the defender suspects nothing"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"epochs": 100, "schedule": "step"},
        "fast": {"epochs": 12},
        "tiny": {"epochs": 20, "batch_size": 32, "lr": 0.05},
    }

    def run(self, task: Task) -> Defended:
        """Train one model."""
        data, rows = self._data(task)
        model = task.engine.fit(
            task.new_model("model"), data, mean_cross_entropy, task.recipe, phase="train", rows=rows
        )
        return Defended(model)

    def _data(self, task: Task) -> tuple[ImageDataset, Tensor | None]:
        """Return what to train on: images, and which rows of them if not all."""
        return task.train, None


class WithTrusted(NoDefense):
    """Trains on the poisoned set and the trusted images together, undefended: the suspect that `bdbench scan` makes.

    A detector calibrates on trusted images. They compare with training samples only where the model has learned both
    alike: a sample that a model never saw looks less certain. Budgets are those of `none`.
    """

    needs_trusted: ClassVar[bool] = True

    def _data(self, task: Task) -> tuple[ImageDataset, Tensor | None]:
        if task.trusted is None:
            raise OptionError("none-trusted needs trusted images")
        return joined(task.train, task.trusted), None


class Oracle(NoDefense):
    """Trains on the set without its poisoned samples: what a defense that finds all of them, and only them, would give.

    A reference row, not a defense: it reads which samples are poisoned. Covers, truthfully labelled, stay. Budgets are
    those of `none`.
    """

    threat: ClassVar[str] = "a reference, not a defense: it is told which samples are poisoned"
    needs_truth: ClassVar[bool] = True

    def _data(self, task: Task) -> tuple[ImageDataset, Tensor | None]:
        return task.train, torch.nonzero(~task.known_truth().is_poison).flatten()


class Clean(NoDefense):
    """Trains on the set as it was before the attack: the undefended model in a world without one.

    A reference row, not a defense: it reads the original images and labels. Budgets are those of `none`.
    """

    threat: ClassVar[str] = "a reference, not a defense: it is given the set as it was before the attack"
    needs_truth: ClassVar[bool] = True

    def _data(self, task: Task) -> tuple[ImageDataset, Tensor | None]:
        return task.known_truth().unpoisoned, None
