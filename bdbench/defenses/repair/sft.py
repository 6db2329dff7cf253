"""Super-fine-tuning: fine-tune with a learning rate that rises and falls in teeth, high ones first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.training.loop import mean_cross_entropy, steps_of_pass
from bdbench.training.recipe import Recipe

TUNING: Mapping[str, Any] = {
    "epochs": 100, "batch_size": 128, "lr": 2.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0,
    "schedule": "constant",
}  # fmt: skip


class Sawtooth(Recipe):
    """A recipe whose learning rate goes up and down in straight lines, step by step.

    Its `lr` is the peak of the early teeth; `schedule` and `warmup` scale all of it.
    """

    low_lr: float = Field(description="Where every tooth begins and ends.")
    late_lr: float = Field(description="Peak of the late teeth.")
    early: float = Field(description="Share of the epochs with early teeth.")
    climb: int = Field(description="Steps up, and as many down.")
    epoch_steps: int = Field(description="Steps in an epoch.")

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a point of the schedule, as `Recipe.lr_at` does."""
        step = round(epoch * self.epoch_steps) % (2 * self.climb)
        height = min(step, 2 * self.climb - step) / self.climb
        peak = self.lr if epoch < self.early * self.epochs else self.late_lr
        return super().lr_at(epoch) / self.lr * (self.low_lr + (peak - self.low_lr) * height)


class SuperFineTuning(Repair):
    """Fine-tunes with a learning rate that rises and falls in teeth: high ones to forget, low ones to recover.

    Within a tooth the rate goes in straight lines from `low_lr` to a peak and back, `climb` steps each. The peak is
    `--lr` in the `early` part of the epochs and `late_lr` after it. `--schedule` scales all of it; in the presets it is
    constant.

    Paper: Sha et al., Fine-Tuning Is All You Need to Mitigate Backdoor Attacks, 2022,
    https://arxiv.org/abs/2212.09067.

    No code of its authors was at hand; `paper` is the setting of the copy in backdoor-toolbox: steps without momentum
    or weight decay. There every rate is set after its step, so that the first tooth comes one step late. A peak of 2.5
    without momentum is about as high as one of 0.25 with 0.9. In a small network it destroys more than a few epochs
    bring back, so the presets `fast` and `tiny` have lower ones, after which held-out trusted images are still
    classified right. Where the loss is not finite, lower `--lr`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2212.09067"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": TUNING,
        "fast": {**TUNING, "epochs": 20, "lr": 1.0},
        "tiny": {**TUNING, "epochs": 40, "batch_size": 16, "lr": 0.5},
    }

    low_lr: float = Field(0.03, gt=0, description="Learning rate at which every tooth begins and ends.")
    late_lr: float = Field(0.05, gt=0, description="Peak of the late teeth; that of the early ones is --lr.")
    early: float = Field(0.4, ge=0, le=1, description="Share of the epochs with early teeth.")
    climb: int = Field(10, ge=1, description="Steps from the beginning of a tooth to its peak, and back.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune a copy."""
        recipe = Sawtooth(
            **task.recipe.model_dump(), **self.model_dump(),
            epoch_steps=steps_of_pass(len(trusted), task.recipe.batch_size),
        )  # fmt: skip
        return Defended(task.engine.fit(copied(suspect), trusted, mean_cross_entropy, recipe, phase="tune"))
