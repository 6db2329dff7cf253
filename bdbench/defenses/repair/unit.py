"""UNIT: an upper bound for every neuron, as tight as held-out clean images allow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.bounding import Bounds, bounded
from bdbench.defenses.parts.holding import accuracy, floor_of, halves, strongest, unmet
from bdbench.defenses.repair.base import ChoosingRepair, copied
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import rectified
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch

RAISED, LOWERED = 2.0, 2.0**-1.5
"""What the cost is multiplied with after epochs of success, and of failure."""
LARGEST = 1e3
"""The largest cost: beyond it the cross entropy has no say, and the bounds fall as fast as their learning rate lets."""
SETTINGS: Mapping[str, Any] = {"lr": 1e-3, "schedule": "constant", "augment": "none"}


class UNIT(ChoosingRepair):
    """Bounds every neuron before or after a ReLU from above, as tightly as clean images bear it.

    Each place of each channel gets an upper bound: at first the mean of its values on trusted images plus `deviations`
    times their standard deviation. The weights stay; on the trusted images that are not held out the cross entropy plus
    `cost` times the sum over the layers of their mean bound falls. After every epoch the accuracy on the held-out
    images is measured: it keeps within the tolerance or not, and `patience` epochs of either in a row raise the cost or
    lower it. The tightest bounds that kept within the tolerance are taken. They are stored beside the weights by the
    wrapper `upper-bounds`.

    Paper: Cheng et al., UNIT: Backdoor Mitigation via Automated Neural Distribution Tightening, ECCV 2024,
    https://arxiv.org/abs/2407.11372.

    The authors' code takes steps with all images at once (`paper`), augmented once; here they are as they are, and
    `fast` takes as many steps with batches. It stores the bounds of before the step after which the accuracy was
    measured; here those that were measured are stored. It holds out a fifth of the trusted images; so does this.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11372"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**SETTINGS, "epochs": 300, "batch_size": 2000},
        "fast": {**SETTINGS, "epochs": 20, "batch_size": 128, "patience": 1},
        "tiny": {**SETTINGS, "epochs": 75, "batch_size": 16, "patience": 1, "tolerance": 0.1},
    }

    holdout: float = Field(
        0.2, gt=0, lt=1, description="Share of the trusted images held out to choose the bounds with."
    )
    tolerance: float | None = Field(
        0.03, ge=0, le=1, description="Accuracy on held-out images that the bounds may cost."
    )
    deviations: float = Field(4.0, ge=0, description="A neuron's first bound, in standard deviations from its mean.")
    cost: float = Field(1e-3, ge=0, description="Weight of the bounds, at first.")
    patience: int = Field(5, ge=1, description="Epochs in a row after which the cost is changed.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Train the bounds, and take the tightest that keep the accuracy."""
        engine = task.engine
        sites = rectified(suspect, trusted.image_shape)
        if not sites:
            raise OptionError(
                "method 'unit' bounds what ReLUs give, and this network has none; choose a network that has them, such "
                "as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
            )
        tune, held = halves(trusted, self.holdout, engine.seed)
        before = accuracy(engine, suspect, held)
        floor = floor_of(before, len(held), self.tolerance)
        network = bounded(copied(suspect), sites, "place", trusted.image_shape)
        limits = Narrowing(network, self.cost, self.patience, task.recipe.epochs).to(engine.device)
        limits.start(first_bounds(engine, suspect, sites, tune.images, self.deviations))

        def finish_epoch(limits: Narrowing) -> bool:
            limits.finish_epoch(accuracy(engine, limits.write(), held), floor)
            return False

        def loss(limits: Narrowing, batch: Batch) -> Tensor:
            limits.clamp()
            return F.cross_entropy(limits.logits(batch.images), batch.labels) + limits.cost * limits.size()

        finish_epoch(limits)  # the bounds as they start are a candidate too
        engine.fit(
            limits, tune, loss, task.recipe, phase="bound", compiled=False, stop=finish_epoch,
            optimizer=torch.optim.Adam(limits.parameters(), task.recipe.lr, betas=(0.5, 0.9)),
        )  # fmt: skip
        sizes, accuracies, _ = limits.sweep[: int(limits.done)].T.tolist()
        tried = dict(zip(sizes, accuracies, strict=True))
        choice = strongest(sorted(tried, reverse=True), tried.__getitem__, before, len(held), self.tolerance)
        findings = {**choice.findings, "sites": sites, "cost": float(limits.cost)}
        if choice.setting is None:
            return Defended(suspect, findings={**findings, "said": unmet(findings), "unchanged": True})
        limits.start(limits.best())
        return Defended(limits.write(), findings=findings)


class Narrowing(Bounds):
    """Bounds of neurons, with their cost, and the tightest that kept the accuracy.

    Args:
        network: see `Bounds`.
        cost: at first.
        patience: epochs in a row after which the cost is changed.
        epochs: of the phase.
    """

    cost: Tensor
    streak: Tensor
    done: Tensor
    sweep: Tensor
    smallest: Tensor

    def __init__(self, network: Classifier, cost: float, patience: int, epochs: int) -> None:
        super().__init__(network)
        self.patience = patience
        self.register_buffer("cost", torch.tensor(cost))
        self.register_buffer("streak", torch.zeros((), dtype=torch.int64))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sweep", torch.zeros(epochs + 1, 3))
        self.register_buffer("smallest", torch.tensor(torch.inf))
        for place, limit in enumerate(self.limits):
            self.register_buffer(f"best{place}", limit.detach().clone())

    def size(self) -> Tensor:
        """Return what is penalised: the sum over the layers of their mean bound."""
        return torch.stack([limit.mean() for limit in self.limits]).sum()

    def best(self) -> list[Tensor]:
        """Return the tightest bounds that kept the accuracy."""
        return [self.get_buffer(f"best{place}") for place in range(len(self.limits))]

    @torch.no_grad()
    def finish_epoch(self, measured: float, floor: float) -> None:
        """Keep the bounds if they are the tightest of those that keep the accuracy, and adapt the cost.

        Args:
            measured: accuracy of the network with the bounds as they are, on the held-out images.
            floor: what it must not fall below.
        """
        measured = round(measured, 4)  # before it is stored in float32, which may round the other way
        size, keeps = self.size(), measured >= floor
        self.sweep[int(self.done)] = torch.tensor([float(size), measured, float(self.cost)])
        self.done += 1
        if keeps and bool(size < self.smallest):
            self.smallest.copy_(size)
            for kept, limit in zip(self.best(), self.limits, strict=True):
                kept.copy_(limit)
        streak = int(self.streak)
        streak = (streak if keeps == (streak > 0) else 0) + (1 if keeps else -1)
        if abs(streak) >= self.patience:
            self.cost.mul_(RAISED if keeps else LOWERED).clamp_(max=LARGEST)
            streak = 0
        self.streak.fill_(streak)


def first_bounds(
    engine: Engine, model: Classifier, sites: list[str], images: Tensor, deviations: float
) -> list[Tensor]:
    """Return for each site the mean plus so many standard deviations of each neuron (C, h, w), not less than 0.

    Args:
        engine: runs the model.
        model: the suspect.
        sites: modules whose outputs (B, C, h, w) are meant.
        images: (N, C, H, W) uint8.
        deviations: how many.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def leaves(site: str, output: Tensor) -> None:
        values = output.float()
        sums[site] = sums.get(site, 0) + values.sum(0)
        squares[site] = squares.get(site, 0) + values.square().sum(0)

    with ExitStack() as hooks:
        for site in sites:
            part = model.get_submodule(site)
            handle = part.register_forward_hook(lambda _, __, output, site=site: leaves(site, output))
            hooks.callback(handle.remove)
        engine.logits(model, images)
    found = []
    for site in sites:
        mean = sums[site] / len(images)
        spread = (squares[site] / len(images) - mean.square()).clamp_min(0).sqrt()
        found.append((mean + deviations * spread).clamp_min(0).float())
    return found
