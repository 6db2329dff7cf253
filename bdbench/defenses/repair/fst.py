"""FST: draw a new head, and fine-tune while it is pushed away from the old one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.loop import Batch, mean_cross_entropy

TUNING: Mapping[str, Any] = {"epochs": 10, "batch_size": 128, "lr": 0.01, "weight_decay": 0.0, "nesterov": False}


def product(weight: Tensor, old: Tensor) -> Tensor:
    """Return the sum of the products of weights (K, D)."""
    return (weight * old).sum()


def cosine(weight: Tensor, old: Tensor) -> Tensor:
    """Return the cosine of weights (K, D), taken as two vectors."""
    return F.cosine_similarity(weight.flatten(), old.flatten(), dim=0)


SHIFTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"product": product, "cosine": cosine}


class FeatureShiftTuning(Repair):
    """Draws a new last layer and fine-tunes all of the model, while the new layer is pushed away from the old one.

    With W the weights of the last layer and W0 those of the suspect, the loss is the cross entropy plus
    alpha * sum(W * W0), and after every step W is scaled to the length of W0. The features have to shift, because the
    last layer that they were trained with does not come back.

    Paper: Min et al., Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023,
    https://arxiv.org/abs/2310.01875.

    Presets follow the command that the published code gives for CIFAR-10, with 2 % of the images; the default of its
    `alpha` is 0.2. It advises a small alpha or 0 where there are 100 classes or more. The term grows with the square of
    the length of W0, so one alpha means different things for different networks; `--shift cosine` takes
    alpha * cos(W, W0), which does not depend on it. The preset `fast` does so: in small networks W0 is long (its square
    is about 100 in a wrn-16-1), and the product costs far too much accuracy there. The variants of the published code:
    `--alpha 0` is its ft-init, `--trainable features` its fe-tuning (the new layer stays as it was drawn).

    Differs from the published code: the new layer has the length of W0 from the start, there only after the first step.
    The learning rate falls with every step, there with every epoch.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.01875"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": TUNING,
        "fast": {**TUNING, "epochs": 20, "alpha": 1.0, "shift": "cosine"},
        "tiny": {**TUNING, "epochs": 20, "batch_size": 16, "lr": 0.05},
    }

    alpha: float = Field(0.1, ge=0, description="Weight of the push away from the old last layer.")
    shift: Literal["product", "cosine"] = Field(
        "product", description="What is pushed down: the product of the new weights with the old ones, or their cosine."
    )
    trainable: Literal["all", "features"] = Field("all", description="What is trained; the last layer is new in both.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Draw a head and tune a copy."""
        model, old = copied(suspect), suspect.head.weight
        length = old.norm()  # on the device: nothing waits for it
        draw(model.head, generator(task.engine.seed, "head"))
        rescale(model.head.weight, length)
        model.head.requires_grad_(self.trainable == "all")
        pushed = SHIFTS[self.shift]

        def loss(model: Classifier, batch: Batch) -> Tensor:
            rescale(model.head.weight, length)
            return mean_cross_entropy(model, batch) + self.alpha * pushed(model.head.weight, old)

        tuned = task.engine.fit(model, trusted, loss, task.recipe, phase="tune")
        rescale(tuned.head.weight, length)
        return Defended(tuned)


@torch.no_grad()
def draw(head: nn.Linear, rng: torch.Generator) -> None:
    """Draw the weights (K, D) and biases (K,) of a layer from U(-D^-0.5, D^-0.5), in place.

    Args:
        head: on any device.
        rng: on the CPU, so that all devices get the same.
    """
    bound = head.in_features**-0.5
    for parameter in (head.weight, head.bias):
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))


@torch.no_grad()
def rescale(weight: Tensor, length: Tensor) -> None:
    """Bring weights to a length (Frobenius norm), in place."""
    weight.mul_(length / weight.norm().clamp_min(1e-12))
