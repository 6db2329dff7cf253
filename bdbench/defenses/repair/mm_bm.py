"""MM-BM: upper bounds on the activations of early layers, as small as clean images allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.bounding import Bounds, bounded
from bdbench.defenses.repair.base import Repair, copied
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import rectified, stages_of
from bdbench.training.loop import Batch

ADAPTS_AT = (0.4, 0.6, 0.8)
"""Shares of the epochs after which the cost is adapted: 20, 30 and 40 of 50."""
FACTOR = 1.2
KEPT = 0.95
"""Share of the images that has to stay right for the cost to rise."""


class MMBM(Repair):
    """Bounds the activations of early layers from above, since a trigger works by unusually large ones.

    After the first ReLU and after the first two stages each channel gets an upper bound. The weights stay; the bounds
    are trained on trusted images that the suspect classifies right: the squared difference of the logits from those of
    the suspect, plus `cost` times the sum over the layers of the length of their bounds, falls. After 40, 60 and 80 %
    of the epochs the cost rises by a factor of 1.2 if at least 95 % of the epoch's images were right, else it falls by
    as much. The bounds are stored beside the weights by the wrapper `upper-bounds`.

    Paper: Wang et al., MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types Using a
    Maximum Margin Statistic, S&P 2024, https://arxiv.org/abs/2205.06900. Its detection is another method.

    The authors' code takes its images from the test set, and evaluates on the rest of it. In a pre-activation network
    the outputs of stages are sums, not rectified; a bound cuts them all the same.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2205.06900"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"epochs": 50, "batch_size": 200, "lr": 0.1, "schedule": "constant", "augment": "none"},
        "fast": {"epochs": 50, "batch_size": 200, "lr": 0.1, "schedule": "constant", "augment": "none"},
        "tiny": {"epochs": 50, "batch_size": 36, "lr": 0.1, "schedule": "constant", "augment": "none"},
    }

    per_class: int = Field(50, ge=1, description="The most images of a class that are used.")
    cost: float = Field(0.5, ge=0, description="Weight of the bounds' length, at first.")
    first_bound: float = Field(8.0, ge=0, description="What every bound is at first.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Train the bounds."""
        engine, shape = task.engine, trusted.image_shape
        sites = list(dict.fromkeys([*rectified(suspect, shape)[:1], *stages_of(suspect, shape)[:2]]))
        if not sites:
            raise OptionError(
                "method 'mm-bm' bounds maps of activations, and this network has none; choose a network of convolutions"
            )
        right = engine.logits(suspect, trusted.images).argmax(1) == trusted.labels
        rows = first_of_each(trusted.labels, right, self.per_class)
        if len(rows) < 2:
            raise OptionError(
                f"the suspect classifies {len(rows)} trusted images right, and 'mm-bm' needs 2 or more of them"
            )
        limits = Tightening(bounded(copied(suspect), sites, "channel", shape), self.cost, task.recipe.epochs)
        limits.start([torch.tensor(self.first_bound)] * len(sites))

        def loss(limits: Tightening, batch: Batch) -> Tensor:
            limits.clamp()
            logits = limits.logits(batch.images)
            with torch.no_grad():
                wanted = suspect(batch.images)
                limits.count(logits.argmax(1) == batch.labels)
            return F.mse_loss(logits, wanted) + limits.cost * limits.length()

        engine.fit(
            limits, trusted, loss, task.recipe, phase="bound", rows=rows, compiled=False, stop=Tightening.finish_epoch,
            optimizer=torch.optim.Adam(limits.parameters(), task.recipe.lr),
        )  # fmt: skip
        means = [round(float(limit.detach().mean()), 4) for limit in limits.limits]
        findings = {
            "images": len(rows), "cost": round(float(limits.cost), 4), "kept": round(limits.kept, 4),
            "mean_bounds": dict(zip(sites, means, strict=True)),
        }  # fmt: skip
        return Defended(limits.write(), findings=findings)


class Tightening(Bounds):
    """Bounds of channels, with the cost of their length.

    Args:
        network: see `Bounds`.
        cost: at first.
        epochs: of the phase.
    """

    cost: Tensor
    right: Tensor
    seen: Tensor
    done: Tensor

    def __init__(self, network: Classifier, cost: float, epochs: int) -> None:
        super().__init__(network)
        self.due = {round(share * epochs) for share in ADAPTS_AT}
        self.register_buffer("cost", torch.tensor(cost))
        for name in ("right", "seen", "done", "share"):
            self.register_buffer(name, torch.zeros(()))

    @property
    def kept(self) -> float:
        """Share of the images of the last epoch that were classified right."""
        return float(self.get_buffer("share"))

    def length(self) -> Tensor:
        """Return the sum over the layers of the length of their bounds."""
        return torch.stack([limit.norm() for limit in self.limits]).sum()

    def count(self, right: Tensor) -> None:
        """Count the images of a batch, and those that are classified right, (B,) bool."""
        self.right += right.sum()
        self.seen += len(right)

    def finish_epoch(self) -> bool:
        """Adapt the cost after the epochs at which it is due; never ends the phase."""
        self.get_buffer("share").copy_(self.right / self.seen)
        self.done += 1
        if int(self.done) in self.due:
            self.cost *= FACTOR if float(self.right) >= KEPT * float(self.seen) else 1 / FACTOR
        self.right.zero_()
        self.seen.zero_()
        return False


def first_of_each(labels: Tensor, usable: Tensor, count: int) -> Tensor:
    """Return the rows of the first `count` usable images of each class, (M,) int64, ascending."""
    rows = torch.nonzero(usable).flatten()
    place = torch.stack([(labels[rows] == label).cumsum(0) for label in range(int(labels.max()) + 1)])
    return rows[place.gather(0, labels[rows][None])[0] <= count]
