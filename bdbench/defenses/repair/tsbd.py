"""TSBD: unlearning shows which weights carry the backdoor; they are set to 0, and fine-tuning mends the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.parts.sharpness import with_flat_gradient
from bdbench.defenses.repair.base import Repair, copied
from bdbench.defenses.repair.ft import FAST, TINY, TUNING
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch

SHORTCUTS = ("shortcut", "downsample")
"""How networks call the convolutions beside their blocks, which are left alone."""
CAP = 10
"""Unlearning stops pulling at so many times the loss of guessing; else the weights grow beyond all limits."""


class TSBD(Repair):
    """Unlearns trusted images to see which weights carry the backdoor, sets those to 0, and fine-tunes.

    1. `unlearn`: a copy of the suspect ascends the cross entropy of the trusted images until its accuracy on them is at
    most `unlearn_stop` (or that of always answering one class, where that is more). Filters of convolutions that change
    most in it (the sum of |change| of their weights) are those that a backdoor uses too. 2. Of the `filter_share` of
    all filters that changed most, the `weight_share` of weights that changed most become 0 in the suspect. 3. `tune`:
    fine-tuning with a penalty on the gradient's length: a step follows 1 - `penalty` of the gradient, and `penalty` of
    that a step of `radius` uphill. Convolutions of shortcuts are left alone.

    Paper: Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
    Activeness, NeurIPS 2024, https://arxiv.org/abs/2405.20291.

    The authors' code runs all of it with eleven shares of filters, prints accuracy and attack success of each on the
    test set, and has no rule to choose. Here the share is fixed, and all trusted images are used. Their images are
    visited in one order; here they are shuffled.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.20291"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**TUNING, "epochs": 20, "weight_decay": 0.0},
        "fast": {**FAST, "epochs": 12, "weight_decay": 0.0, "unlearn_epochs": 15, "unlearn_lr": 1e-3},
        "tiny": {**TINY, "unlearn_epochs": 20, "unlearn_lr": 0.01},
    }

    unlearn_epochs: int = Field(1000, ge=1, description="The most epochs of unlearning.")
    unlearn_lr: float = Field(1e-4, gt=0, description="Learning rate of unlearning.")
    unlearn_stop: float = Field(0.1, ge=0, le=1, description="Accuracy on trusted images at which it ends.")
    filter_share: float = Field(0.15, ge=0, le=1, description="Share of all filters that lose weights.")
    weight_share: float = Field(0.7, ge=0, le=1, description="Share of their weights that become 0.")
    penalty: float = Field(0.7, ge=0, le=1, description="Share of the gradient that is taken uphill.")
    radius: float = Field(0.05, ge=0, description="Length of the step uphill, in each tensor of weights.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Unlearn, set to zero, fine-tune."""
        guessing = float(torch.bincount(trusted.labels).max()) / len(trusted)
        stop = max(self.unlearn_stop, guessing)
        unlearned = self._unlearned(task, suspect, trusted, stop)
        gone = largest(changes(suspect, unlearned), self.filter_share, self.weight_share)
        left = accuracy(task.engine, unlearned, trusted)
        if left > stop:
            task.engine.progress.note(
                f"unlearning did not take: the accuracy on the trusted images is {left:.3f} after "
                f"{self.unlearn_epochs} epochs (limit {stop:.3g}); raise --unlearn-lr or --unlearn-epochs"
            )
        model = copied(suspect)
        with torch.no_grad():
            for name, zeroed in gone.items():
                model.get_parameter(name).masked_fill_(zeroed, 0)
        findings = {
            "unlearned_accuracy": round(left, 4), "took": left <= stop,
            "zeroed": {name: int(zeroed.sum()) for name, zeroed in gone.items() if zeroed.any()},
            "accuracy_without_them": round(accuracy(task.engine, model, trusted), 4),
        }  # fmt: skip

        def loss(model: Classifier, batch: Batch) -> Tensor:
            def at(weights: Mapping[str, Tensor]) -> Tensor:
                return F.cross_entropy(called(model, weights, batch.images), batch.labels)

            return with_flat_gradient(model, at, self.radius, self.penalty)

        return Defended(
            task.engine.fit(model, trusted, loss, task.recipe, phase="tune", compiled=False), findings=findings
        )

    def _unlearned(self, task: Task, suspect: Classifier, trusted: ImageDataset, stop_at: float) -> Classifier:
        """Return a copy of the suspect that has unlearned the images."""
        cap = CAP * math.log(trusted.num_classes)
        recipe = task.recipe.model_copy(
            update={
                "epochs": self.unlearn_epochs, "lr": self.unlearn_lr, "schedule": "constant", "warmup": 0.0,
                "weight_decay": 0.0,
            }
        )  # fmt: skip

        def loss(model: Classifier, batch: Batch) -> Tensor:
            return -F.cross_entropy(model(batch.images), batch.labels).clamp_max(cap)

        def has_unlearned(model: Classifier) -> bool:
            return accuracy(task.engine, model, trusted) <= stop_at

        return task.engine.fit(
            copied(suspect), trusted, loss, recipe, phase="unlearn", stop=has_unlearned, lr_flag="--unlearn-lr"
        )


def changes(before: Classifier, after: Classifier) -> dict[str, Tensor]:
    """Return |change| of the weights of all convolutions but those of shortcuts, by name, (O, ...) by output channel.

    Raises:
        OptionError: the network has none.
    """
    found = {}
    for name, part in before.named_modules():
        if isinstance(part, nn.Conv2d) and not set(name.split(".")) & set(SHORTCUTS):
            weight = f"{name}.weight"
            found[weight] = (after.get_parameter(weight) - part.weight).detach().abs()
    if not found:
        raise OptionError("method 'tsbd' works on convolutions, and this network has none; choose a network with some")
    return found


def largest(changed: Mapping[str, Tensor], filters: float, weights: float) -> dict[str, Tensor]:
    """Return which weights changed most among those of the filters that changed most, bool, by name.

    Args:
        changed: |change| of weights, (O, ...) by output channel.
        filters: share of all filters that are looked at, by the sum of their weights' changes.
        weights: share of the weights of these.
    """
    sums = torch.cat([change.flatten(1).sum(1) for change in changed.values()])
    is_chosen = among_largest(sums, math.floor(filters * len(sums)))
    places = is_chosen.split([len(change) for change in changed.values()])
    ranked = torch.cat(
        [
            torch.where(place[:, None], change.flatten(1), -1.0).flatten()
            for place, change in zip(places, changed.values(), strict=True)
        ]
    )
    gone = among_largest(ranked, math.floor(weights * int((ranked >= 0).sum())))
    parts = gone.split([change.numel() for change in changed.values()])
    return {name: part.view(change.shape) for (name, change), part in zip(changed.items(), parts, strict=True)}


def among_largest(values: Tensor, count: int) -> Tensor:
    """Return a mask (N,) of the `count` largest values."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.topk(count).indices, True)
