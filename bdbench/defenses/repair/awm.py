"""AWM: soft masks on all weights of convolutions, learned against perturbations that change the answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.perturbing import Universal, added, universal
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import Repair
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

MASKING: Mapping[str, Any] = {
    "epochs": 20, "batch_size": 128, "lr": 0.01, "weight_decay": 0.0, "schedule": "constant",
}  # fmt: skip


class AWM(Repair):
    """Masks the weights of convolutions that a perturbation of all images needs to change the answers.

    In each epoch one perturbation of all images is found that raises the cross entropy with what the network answers
    without it, and is scaled into an L1 ball. Then masks M in [0, 1], one for each weight of each convolution, fall
    along alpha * CE(f(x)) + (1 - alpha) * CE(f(x + delta)) + sparsity * |M|, by Adam, in evaluation mode. The masks are
    multiplied into the weights, so the network stays what it is. There are more masks than images.

    Paper: Chai and Chen, One-shot Neural Backdoor Erasing via Adversarial Weight Masking, NeurIPS 2022,
    https://arxiv.org/abs/2207.04497.

    The official code takes its clean images from the test set, and prints test accuracy and ASR of every epoch; here
    they are the trusted images, and the last epoch is kept. Its ball, 1000 of 3072 values, hardly binds, and its
    sparsity of 1e-8 does next to nothing. It takes 15 steps for each perturbation, on 500 images, 5 times each. For ten
    images it has `--alpha 0.99 --radius 100`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2207.04497"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**MASKING, "perturb_epochs": 5},
        "fast": {**MASKING, "epochs": 12},
        "tiny": {**MASKING, "batch_size": 16, "radius": 80.0},
    }

    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the clean loss; the perturbed one has the rest.")
    radius: float = Field(1000.0, gt=0, description="Largest L1 norm of the perturbation, in pixel units.")
    perturb_epochs: int = Field(1, ge=1, description="Passes for the perturbation in each epoch.")
    perturb_lr: float = Field(10.0, gt=0, description="Its learning rate.")
    sparsity: float = Field(1e-8, ge=0, description="Weight of the sum of all masks.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Take turns: find a perturbation, learn the masks against it."""
        masks = WeightMasks(suspect).to(task.engine.device)
        recipe = task.recipe
        adam = torch.optim.Adam(
            masks.parameters(), recipe.lr, (recipe.momentum, 0.999), weight_decay=recipe.weight_decay
        )
        norms = []
        for epoch in range(recipe.epochs):
            delta = self._perturbation(task, masks.folded(suspect), trusted, epoch + 1)
            norms.append(round(float(delta.abs().sum()), 4))

            def loss(masks: WeightMasks, batch: Batch, delta: Tensor = delta) -> Tensor:
                masks.clamp()
                changed = masks.changed(suspect)
                clean, perturbed = (
                    F.cross_entropy(called(suspect, changed, images), batch.labels)
                    for images in (batch.images, added(batch.images, delta, valid=True))
                )
                return self.alpha * clean + (1 - self.alpha) * perturbed + self.sparsity * masks.size()

            task.engine.fit(
                masks, trusted, loss, _of_epoch(recipe, epoch), phase=f"mask-{epoch + 1}", optimizer=adam,
                compiled=False,
            )  # fmt: skip
            masks.clamp()
        return Defended(masks.folded(suspect), findings={"perturbation_norms": norms, "mask_mean": masks.mean()})

    def _perturbation(self, task: Task, network: Classifier, trusted: ImageDataset, number: int) -> Tensor:
        """Return the perturbation (1, C, H, W) of an epoch, within its ball."""

        def loss(perturbation: Universal, batch: Batch) -> Tensor:
            with torch.no_grad():
                answers = network(batch.images).argmax(1)
            return -F.cross_entropy(network(perturbation(batch.images)), answers)

        recipe = task.recipe.model_copy(
            update={"epochs": self.perturb_epochs, "lr": self.perturb_lr, "schedule": "constant", "warmup": 0.0}
        )
        delta = universal(
            task.engine, trusted, loss, recipe, phase=f"perturb-{number}", ball=None, valid=False,
            lr_flag="--perturb-lr",
        )  # fmt: skip
        return scaled(delta, self.radius)


class WeightMasks(nn.Module):
    """A factor in [0, 1] for each weight of each convolution of a network, at first 1; the network is no part of it.

    Raises:
        OptionError: the network has no convolutions.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.names = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
        if not self.names:
            raise OptionError("method 'awm' masks convolutions, and this network has none; choose one that has them")
        self.factors = nn.ParameterList([torch.ones_like(model.get_parameter(name)) for name in self.names])

    def changed(self, model: Classifier) -> dict[str, Tensor]:
        """Return the weights of all convolutions, times their masks, by name."""
        return {
            name: model.get_parameter(name).detach() * factor
            for name, factor in zip(self.names, self.factors, strict=True)
        }

    def size(self) -> Tensor:
        """Return the sum of all masks."""
        return torch.stack([factor.abs().sum() for factor in self.factors]).sum()

    def mean(self) -> float:
        """Return the mean of all masks."""
        return round(float(self.size().detach()) / sum(int(factor.numel()) for factor in self.factors), 4)

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the masks back into [0, 1]: at the start of every call of the loss, and after the phase."""
        for factor in self.factors:
            factor.clamp_(0, 1)

    @torch.no_grad()
    def folded(self, model: Classifier) -> Classifier:
        """Return a copy of a network with the masks in its weights."""
        folded = copy.deepcopy(model)
        for name, weight in self.changed(model).items():
            folded.get_parameter(name).copy_(weight)
        return folded


def scaled(delta: Tensor, radius: float) -> Tensor:
    """Return a perturbation made smaller, as a whole, until its L1 norm is at most the radius."""
    return delta * (radius / delta.abs().sum().clamp_min(1e-12)).clamp_max(1)


def _of_epoch(recipe: Recipe, epoch: int) -> Recipe:
    """Return the recipe of one epoch, at its rate."""
    return recipe.model_copy(update={"epochs": 1, "lr": recipe.lr_at(epoch), "schedule": "constant", "warmup": 0.0})
