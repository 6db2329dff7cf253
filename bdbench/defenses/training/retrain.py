"""Retrain: plain training without the samples that a scan set aside."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Task
from bdbench.defenses.training.plain import NoDefense
from bdbench.errors import OptionError
from bdbench.seeds import generator


class Retrain(NoDefense):
    """Trains on the set without the samples that a scan set aside: what the scan is good for in the end.

    `bdbench defend --method retrain --without SCAN`. Where the scan set nothing aside, it is `none` bit for bit.
    `--random` leaves out as many samples of the same labels at random: how much of a change is mere loss of data.
    A scan that would remove nearly a whole class is refused. Budgets are those of `none`.
    """

    threat: ClassVar[str] = "the defender has the poisoned set and a scan of it"
    needs_scan: ClassVar[bool] = True

    random: bool = Field(False, description="Leave out as many samples of the same labels, at random: the control.")
    largest_loss: float = Field(0.9, gt=0, le=1, description="Share of a class that may be left out, at most.")

    def _data(self, task: Task) -> tuple[ImageDataset, Tensor | None]:
        if task.set_aside is None:
            raise OptionError("retrain needs a scan; name it with --without")
        labels = task.train.labels
        gone = at_random(task.set_aside, labels, task.engine.seed) if self.random else task.set_aside
        for label, name in enumerate(task.train.class_names):
            own = labels == label
            total, lost = int(own.sum()), int((own & gone).sum())
            if lost and (lost > self.largest_loss * total or total - lost < 2):
                raise OptionError(
                    f"the scan sets aside {lost:,} of the {total:,} samples of class {name}, more than --largest-loss "
                    f"{self.largest_loss:g}; raise it, or scan with a stricter --decide"
                )
        task.engine.progress.note(f"left out: {int(gone.sum()):,} of {len(gone):,} samples")
        return task.train, torch.nonzero(~gone).flatten() if bool(gone.any()) else None


def at_random(set_aside: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return a mask (N,) with as many samples of every label as `set_aside` (N,) has, drawn at random."""
    drawn = torch.zeros_like(set_aside)
    order = torch.randperm(len(labels), generator=generator(seed, "left out at random"))
    for label in labels[set_aside].unique():
        count = int((set_aside & (labels == label)).sum())
        drawn[order[labels[order] == label][:count]] = True
    return drawn
