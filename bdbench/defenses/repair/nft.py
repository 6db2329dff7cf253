"""NFT: fine-tune a mask for every channel instead of the weights, on mixed images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.masks import Masks
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

TUNING: Mapping[str, Any] = {
    "epochs": 5, "batch_size": 128, "lr": 0.05, "momentum": 0.95, "nesterov": False, "weight_decay": 0.0,
}  # fmt: skip


class Landing(Recipe):
    """A recipe whose schedule falls to `end_lr` where that of `Recipe` falls to 0."""

    end_lr: float = Field(description="Learning rate at the end.")

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a point of the schedule, as `Recipe.lr_at` does."""
        return self.end_lr + (self.lr - self.end_lr) * super().lr_at(epoch) / self.lr


class NeuralMaskFineTuning(Repair):
    """Tunes a factor for every channel of every batch norm and no other weight, so that few images are enough.

    The loss is the cross entropy of mixed images (MixUp: pairs of images, and their labels alike, in a share that is
    uniform in [0, 1]), plus `penalty` times the sum of |1 - mask| over the trusted images of a class. The masks of the
    i-th norm stay between mask_floor * exp(-mask_decay * i) and 1: the first layers can change least. At the end every
    mask is multiplied into the weight of its norm; nothing is pruned. Batch norm is in training mode, so that its
    statistics become those of the trusted images.

    Paper: Karim et al., Augmented Neural Fine-Tuning for Efficient Backdoor Purification, ECCV 2024,
    https://arxiv.org/abs/2407.10052.

    The published code cannot run as it is (variables that count the accuracy are never set). It trains 5 rounds of 200
    steps on 1 % of the training images, and writes the test ASR beside the model of every round for the reader to
    choose; here the last one is taken. `--epochs` are its rounds.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2407.10052"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": TUNING,
        "fast": {**TUNING, "steps_per_epoch": 100},
        "tiny": {**TUNING, "steps_per_epoch": 40, "batch_size": 16},
    }

    steps_per_epoch: int = Field(200, ge=1, description="Steps in an epoch; images are drawn with replacement.")
    penalty: float = Field(0.001, ge=0, description="Weight of the distance of the masks from 1.")
    mask_floor: float = Field(0.8, ge=0, le=1, description="Scale of the lowest values that masks may have.")
    mask_decay: float = Field(0.5, ge=0, description="How fast they fall from norm to norm.")
    end_lr: float = Field(0.02, ge=0, description="Learning rate at the end of the schedule.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Tune masks of a copy, and multiply them into it."""
        model = copied(suspect).requires_grad_(False).train()
        masks = Masks(model, "nft")
        lows = lowest(len(masks.factors), self.mask_floor, self.mask_decay)
        weight = self.penalty / images_of_a_class(trusted)
        size = self.steps_per_epoch * task.recipe.batch_size

        def drawn(epoch: int) -> Tensor:
            return torch.randint(len(trusted), (size,), generator=generator(task.engine.seed, "nft", "rows", epoch))

        def loss(masks: Masks, batch: Batch) -> Tensor:
            clamp(masks, lows)
            share = torch.rand((), device=batch.images.device)
            order = torch.randperm(len(batch.images), device=batch.images.device)
            mixed = mixup(lambda images: called(model, masks.changed(), images), batch, share, order)
            return mixed + weight * distance(masks)

        task.engine.fit(
            masks, trusted, loss, Landing(**task.recipe.model_dump(), end_lr=self.end_lr), phase="mask",
            epoch_steps=self.steps_per_epoch, before_epoch=drawn, companions={"network": model}, compiled=False,
        )  # fmt: skip
        clamp(masks, lows)
        with torch.no_grad():
            for norm, factor in zip(masks.norms.values(), masks.factors, strict=True):
                norm.weight.mul_(factor)
        means = {name: round(float(mask.mean()), 4) for name, mask in masks.by_norm().items()}
        return Defended(model.eval(), findings={"mean_masks": means})


def mixup(network: Callable[[Tensor], Tensor], batch: Batch, share: Tensor, order: Tensor) -> Tensor:
    """Return the cross entropy of images that are mixed in pairs, and of labels in the same share.

    Args:
        network: from images to logits.
        batch: B images and labels.
        share: (), in [0, 1], of the image itself.
        order: (B,) int64, which image it is mixed with.
    """
    logits = network(share * batch.images + (1 - share) * batch.images[order])
    return share * F.cross_entropy(logits, batch.labels) + (1 - share) * F.cross_entropy(logits, batch.labels[order])


def lowest(count: int, floor: float, decay: float) -> list[float]:
    """Return the lowest value of the masks of each of so many norms, from the first to the last."""
    return [floor * math.exp(-decay * place) for place in range(1, count + 1)]


def distance(masks: Masks) -> Tensor:
    """Return how far all masks together are from 1."""
    return torch.stack([(1 - factor).abs().sum() for factor in masks.factors]).sum()


@torch.no_grad()
def clamp(masks: Masks, lows: list[float]) -> None:
    """Bring the masks of each norm back between its lowest value and 1, in place."""
    for factor, low in zip(masks.factors, lows, strict=True):
        factor.clamp_(low, 1)


def images_of_a_class(data: ImageDataset) -> float:
    """Return how many images a class has, on average over the classes that have any."""
    return len(data) / int((torch.bincount(data.labels) > 0).sum())
