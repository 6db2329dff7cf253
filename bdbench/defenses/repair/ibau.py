"""I-BAU: unlearn the perturbation that misleads most, with the gradient of how it follows the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.perturbing import Ball, Universal, added, universal
from bdbench.defenses.repair.base import Repair, copied
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.training.loop import Batch, LossFunction
from bdbench.training.recipe import Recipe

PAPER: Mapping[str, Any] = {
    "epochs": 5, "batch_size": 100, "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "augment": "none",
}  # fmt: skip
FIXED_POINT_STEP = 0.1
"""Rate of the step downhill whose fixed point the perturbation is."""


class IBAU(Repair):
    """Unlearns, in rounds, the one perturbation of all images that raises the loss on the trusted images most.

    `--epochs` counts the rounds. A round has two passes over the trusted images. 1. A perturbation of all images, from
    0, rises in cross entropy, less `ridge` times its squared length. 2. The weights learn by Adam (beta1 is
    `--momentum`) the true labels of batches of which a share carries it. Their gradient has a second part: how the
    perturbation would follow the weights, by `terms` terms of a series of second derivatives, in float32. Batch norm
    keeps its statistics.

    Paper: Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022,
    https://arxiv.org/abs/2110.03735. Its code bounds the perturbation by `ridge` alone (a bound of 10 stands there in a
    comment) and lets pixels leave [0, 1]. On CIFAR-10 and WRN-16-1 the perturbation then runs away, to lengths of
    thousands, and the accuracy is lost; so `--radius` and `--valid` hold it here. `--radius 1e9 --no-valid` is the
    published form. Its share of perturbed images, 0.01, makes one in a batch of 100, none in a smaller one; here at
    least one. It takes the second derivatives on its first batch, here on the batch at hand; it takes the model's own
    answers as labels of the first pass, here the true labels, as in the second. BackdoorBench takes rate 1e-4 and
    batches of 256. By default that code unlearns on the very test images that it measures, and the reader takes the
    best round; here it is the trusted images and the last round.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.03735"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": PAPER,
        "fast": {**PAPER, "epochs": 3, "lr": 1e-4, "stamp_share": 0.1, "terms": 3},
        "tiny": {**PAPER, "batch_size": 32, "stamp_share": 0.1},
    }

    stamp_share: float = Field(0.01, gt=0, le=1, description="Share of a batch that carries the perturbation.")
    inner_epochs: int = Field(1, ge=1, description="Passes for the perturbation in a round.")
    inner_lr: float = Field(10.0, gt=0, description="Its learning rate.")
    ridge: float = Field(1e-3, ge=0, description="Weight of its squared length.")
    radius: float = Field(10.0, gt=0, description="Its largest length (L2, pixels from 0 to 1).")
    valid: bool = Field(True, description="Keep perturbed pixels in [0, 1].")
    terms: int = Field(5, ge=0, description="Terms of the series of second derivatives; 0: without them.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Take all rounds on a copy."""
        model = copied(suspect)
        if self.terms:
            check_curved(model, trusted)
        adam = torch.optim.Adam(
            model.parameters(), task.recipe.lr, (task.recipe.momentum, 0.999), weight_decay=task.recipe.weight_decay
        )
        lengths = []
        for place in range(task.recipe.epochs):
            delta = self._perturbation(task, frozen(model), trusted, place + 1)
            lengths.append(round(float(delta.norm()), 4))
            task.engine.fit(
                model.requires_grad_(True), trusted, self._unlearning(delta), of_round(task.recipe, place),
                phase=f"unlearn-{place + 1}", optimizer=adam, frozen_norms=True, compiled=False,
            )  # fmt: skip
        return Defended(model, findings={"perturbation_lengths": lengths})

    def _perturbation(self, task: Task, model: Classifier, trusted: ImageDataset, number: int) -> Tensor:
        """Find the perturbation (1, C, H, W) of a round."""

        def loss(perturbation: Universal, batch: Batch) -> Tensor:
            return self.inner(model(perturbation(batch.images)), batch.labels, perturbation.delta)

        recipe = task.recipe.model_copy(
            update={"epochs": self.inner_epochs, "lr": self.inner_lr, "schedule": "constant", "warmup": 0.0}
        )
        return universal(
            task.engine, trusted, loss, recipe, phase=f"perturb-{number}", ball=Ball("l2", self.radius),
            valid=self.valid, lr_flag="--inner-lr",
        )  # fmt: skip

    def _unlearning(self, found: Tensor) -> LossFunction:
        """Return the loss of the second pass."""

        def loss(model: Classifier, batch: Batch) -> Tensor:
            with torch.autocast(batch.images.device.type, enabled=False), curved():
                delta = found.clone().requires_grad_()
                outer = stamped_cross_entropy(model, batch, delta, self.stamp_share, valid=self.valid)
                logits = model(added(batch.images, delta, valid=self.valid))
                return implicit(outer, self.inner(logits, batch.labels, delta), delta, self.terms)

        return loss

    def inner(self, logits: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        """Return what a perturbation (1, C, H, W) lowers, from the logits (B, K) of perturbed images."""
        return self.ridge * delta.square().sum() - F.cross_entropy(logits, labels)


def stamped_cross_entropy(model: Classifier, batch: Batch, delta: Tensor, share: float, *, valid: bool) -> Tensor:
    """Return the cross entropy of a batch whose first images, a share of it and at least one, carry a perturbation."""
    count = max(1, round(share * len(batch.images)))
    seen = torch.cat([added(batch.images[:count], delta, valid=valid), batch.images[count:]])
    return F.cross_entropy(model(seen), batch.labels)


def implicit(outer: Tensor, inner: Tensor, delta: Tensor, terms: int, step: float = FIXED_POINT_STEP) -> Tensor:
    """Return the outer loss, with the gradient in the weights that it has if delta stays at a minimum of the inner one.

    There delta is the fixed point of Phi = delta - step * d inner / d delta. The gradient is d outer / d weights +
    (d Phi / d weights)' v, with v the first `terms` terms of the series sum_k (d Phi / d delta)'^k d outer / d delta.

    Args:
        outer, inner: scalars, with graphs to delta and to the weights.
        delta: a leaf; it gets a gradient too, which means nothing.
        terms: 0 for the direct gradient alone.
        step: of Phi.
    """
    if not terms:
        return outer
    (direct,) = torch.autograd.grad(outer, delta, retain_graph=True)
    (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    vector = direct
    for _ in range(terms - 1):
        (curved,) = torch.autograd.grad(slope, delta, vector, retain_graph=True)
        vector = vector - step * curved + direct
    indirect = -step * (vector * slope).sum()
    return outer + indirect - indirect.detach()


def curved() -> AbstractContextManager[None]:
    """Let attention be computed by operations that have second derivatives, which its fused kernels lack."""
    return cast("AbstractContextManager[None]", sdpa_kernel(SDPBackend.MATH))


def check_curved(model: Classifier, data: ImageDataset) -> None:
    """Refuse a network that cannot be differentiated twice.

    Raises:
        OptionError: it has an operation without a second derivative.
    """
    images = (data.images[:1].to(model.mean.device).float() / 255).requires_grad_()
    try:
        with curved():
            (slope,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        torch.autograd.grad(slope.square().sum(), [*model.parameters(), images], allow_unused=True)
    except RuntimeError as error:
        missing = re.search(r"derivative for (\S+) is not implemented", str(error))
        if missing is None:
            raise
        raise OptionError(
            f"method 'i-bau' takes second derivatives, and this network has an operation without one ({missing[1]}); "
            "take --terms 0, which does without them, or another network, such as wrn-16-1 or resnet-18"
        ) from error


def of_round(recipe: Recipe, place: int) -> Recipe:
    """Return the recipe of one round, whose rate is that of its epoch."""
    return recipe.model_copy(update={"epochs": 1, "lr": recipe.lr_at(place), "schedule": "constant", "warmup": 0.0})
