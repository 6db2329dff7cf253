"""SAU: unlearn perturbations that mislead the model and the suspect to the same class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.perturbing import Ball, perturb
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.models.structure import untracked_norms
from bdbench.training.engine import others_over_own
from bdbench.training.loop import Batch

PAPER: Mapping[str, Any] = {
    "epochs": 100, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "augment": "none",
}  # fmt: skip


class SAU(Repair):
    """Unlearns perturbations that the model under repair shares with the suspect: a trigger is one that both know.

    For every batch, each trusted image gets a perturbation (Linf) by steps that raise the cross entropy of both models,
    where they still answer as before, and pull their answers together, where they are not yet misled to one class.
    Then the weights learn the clean labels (`clean_weight`), the labels of the perturbed images (`robust_weight`), and
    to avoid the suspect's answer to a perturbed image where that is neither the label nor its answer to the clean one
    (`shared_weight`). Adam with amsgrad; beta1 is `--momentum`.

    Paper: Wei et al., Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples,
    NeurIPS 2023, https://arxiv.org/abs/2307.10562. Its code keeps batch norm in evaluation mode, unless it is
    told otherwise (here `--norms batch`, where the perturbed images do not move the statistics); it bounds
    probabilities in the shared term at 0.001, and computes it as the mean of two equal forms; here it is the exact one.
    Its pixels may leave [0, 1]; `--valid` keeps them. Its step is as long as the radius.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2307.10562"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": PAPER,
        "fast": {**PAPER, "epochs": 10, "lr": 3e-4},
        "tiny": {**PAPER, "epochs": 30, "batch_size": 16, "lr": 1e-3},
    }

    radius: float = Field(0.2, ge=0, description="Largest change of a pixel, of which the full range is 1.")
    inner_steps: int = Field(5, ge=0, description="Steps of a perturbation.")
    step_size: float = Field(0.2, gt=0, description="Change of a pixel in one step.")
    adversarial_weight: float = Field(0.01, ge=0, description="Weight of cross entropy in a perturbation.")
    agreement_weight: float = Field(1.0, ge=0, description="Weight of the models' agreement in a perturbation.")
    clean_weight: float = Field(1.0, ge=0, description="Weight of the clean images.")
    robust_weight: float = Field(0.0, ge=0, description="Weight of the perturbed images' labels.")
    shared_weight: float = Field(1.0, ge=0, description="Weight of unlearning what both models share.")
    norms: Literal["kept", "batch"] = Field("kept", description="Statistics of batch norm: as they are, or trained.")
    valid: bool = Field(False, description="Keep perturbed pixels in [0, 1].")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Train a copy."""
        model = copied(suspect)
        adam = torch.optim.Adam(
            model.parameters(), task.recipe.lr, (task.recipe.momentum, 0.999),
            weight_decay=task.recipe.weight_decay, amsgrad=True,
        )  # fmt: skip

        def loss(model: Classifier, batch: Batch) -> Tensor:
            clean = model(batch.images)
            with torch.no_grad():
                known = suspect(batch.images).argmax(1)
            with untracked_norms(model):
                seen = batch.images + self._perturbation(model, suspect, batch, clean.argmax(1), known)
                perturbed = model(seen)
            with torch.no_grad():
                misled = suspect(seen).argmax(1)
            total = self.clean_weight * F.cross_entropy(clean, batch.labels)
            if self.robust_weight:
                total = total + self.robust_weight * F.cross_entropy(perturbed, batch.labels)
            return total + self.shared_weight * unlearned(perturbed, misled, known, batch.labels)

        mended = task.engine.fit(
            model, trusted, loss, task.recipe, phase="unlearn", optimizer=adam, frozen_norms=self.norms == "kept",
            compiled=False,
        )  # fmt: skip
        return Defended(mended)

    def _perturbation(
        self, model: Classifier, suspect: Classifier, batch: Batch, before: Tensor, known: Tensor
    ) -> Tensor:
        """Find the perturbations (B, C, H, W) of a batch, from both models' answers (B,) to its clean images."""

        def objective(seen: Tensor) -> Tensor:
            raised, apart = shared_terms(model(seen), suspect(seen), batch.labels, before, known)
            return self.agreement_weight * apart - self.adversarial_weight * raised

        return perturb(
            batch.images, objective, Ball("linf", self.radius), steps=self.inner_steps, step=self.step_size,
            start=self.radius, valid=self.valid,
        )  # fmt: skip


def shared_terms(one: Tensor, other: Tensor, labels: Tensor, before: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a perturbation raises, and what it lowers.

    Args:
        one, other: (B, K) logits of perturbed images by the two models.
        labels: (B,) of the images.
        before, known: (B,) their answers to the clean images.

    Returns:
        The mean over models and images of the cross entropy, 0 where a model's answer has changed; and the mean over
        images of the divergence of their answers, 0 where both have changed to the same class.
    """
    answers = torch.stack([one.argmax(1), other.argmax(1)])
    fooled = answers != torch.stack([before, known])
    entropies = F.cross_entropy(torch.cat([one, other]), labels.repeat(2), reduction="none").view(2, -1)
    shared = fooled.all(0) & (answers[0] == answers[1])
    return (entropies * ~fooled).mean(), (divergence(one, other) * ~shared).mean()


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (B,) of the softmax of logits (B, K), in [0, ln 2]."""
    first, second = one.log_softmax(1), other.log_softmax(1)
    middle = torch.logaddexp(first, second) - math.log(2)
    return ((first.exp() * (first - middle)).sum(1) + (second.exp() * (second - middle)).sum(1)) / 2


def unlearned(logits: Tensor, misled: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over B images of -log(1 - p), 0 where the suspect was not misled.

    Args:
        logits: (B, K) of perturbed images; p is the probability of the suspect's answer to them.
        misled, known: (B,) the suspect's answers to the perturbed and to the clean images; it was misled where the
            first is neither the second nor the label.
        labels: (B,).
    """
    counts = (misled != labels) & (misled != known)
    return (F.softplus(-others_over_own(logits, misled)) * counts).mean()
