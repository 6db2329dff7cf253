"""Attacks that look at a network of their own: one surrogate, trained once on the clean training split, serves all."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab
from bdbench.data import ImageDataset
from bdbench.engine import Batch, Recipe, frozen
from bdbench.errors import TrainingError
from bdbench.models.classifier import Classifier

JUDGED = 5000
LEARNED = 0.25
"""Least accuracy of a surrogate on its training images, as a share of the way from chance to 1."""

ADVERSARIAL_SIZE = 8 / 255
ADVERSARIAL_STEP = 10 / 255


class SurrogateAttack(Attack):
    """Base of attacks that need a classifier of the clean images, trained by the attacker on the same training split.

    The trained surrogate is kept in the cache folder by what determines it, so that several attacks share it.
    """

    surrogate: str = Field("auto", description="Network of the surrogate: as --model takes it, or auto.")
    surrogate_epochs: int = Field(10, ge=1, description="Epochs of the surrogate's training.")
    surrogate_adversarial: bool = Field(
        False, description="Train the surrogate against perturbations of up to 8/255 (one step, random start)."
    )

    def train_surrogate(self, clean: ImageDataset, lab: Lab) -> Classifier:
        """Return the surrogate: frozen, in evaluation mode, on the lab's device.

        Args:
            clean: the training split before poisoning.
            lab: trains it, or has it in its cache.

        Raises:
            TrainingError: it has not learned the classes, so that nothing it says would help.
        """
        model = lab.new_model(self.surrogate, clean, "surrogate")
        recipe = Recipe(epochs=self.surrogate_epochs, augment=lab.augment)
        loss = adversarial_cross_entropy if self.surrogate_adversarial else cross_entropy
        phase = "surrogate-adversarial" if self.surrogate_adversarial else "surrogate"
        said = [self.surrogate, recipe.model_dump(), phase, lab.seed, lab.engine.bf16, lab.engine.device.type]
        key = hashlib.sha256(json.dumps([clean.fingerprint, *said]).encode()).hexdigest()
        folder = lab.cache / "surrogates" if lab.cache else None
        train = partial(lab.engine.fit, model, clean, loss, recipe, phase=phase)
        lab.engine.reuse_or_train(folder, key, {"surrogate": model}, "surrogate", train)
        check_learned(lab, model, clean, "surrogate", "--surrogate-epochs")
        return frozen(model)


def check_learned(lab: Lab, model: Classifier, clean: ImageDataset, name: str, option: str) -> None:
    """Raise if a model does not know its own training images.

    Args:
        lab: asks it.
        model: any classifier of these images.
        clean: N images; at most 5,000 of them are asked.
        name: what to call it.
        option: what to raise if it does not.

    Raises:
        TrainingError: its accuracy is less than a quarter of the way from chance to 1.
    """
    rows = torch.arange(len(clean))[:: max(1, len(clean) // JUDGED)]
    accuracy = float((lab.engine.logits(model, clean.images[rows]).argmax(1) == clean.labels[rows]).float().mean())
    least = 1 / clean.num_classes + LEARNED * (1 - 1 / clean.num_classes)
    if accuracy < least:
        raise TrainingError(
            f"the {name} did not learn: accuracy {accuracy:.3f} on its training images, at least {least:.3f} is needed "
            f"for {clean.num_classes} classes; raise {option}"
        )


def cross_entropy(model: Classifier, batch: Batch) -> Tensor:
    """Return the loss of plain training."""
    return F.cross_entropy(model(batch.images), batch.labels)


def adversarial_cross_entropy(model: Classifier, batch: Batch) -> Tensor:
    """Return the loss of images that one signed gradient step has made harder, within 8/255 of a random start.

    Source: Wong et al., Fast is better than free, ICLR 2020, https://arxiv.org/abs/2001.03994.
    """
    delta = torch.empty_like(batch.images).uniform_(-ADVERSARIAL_SIZE, ADVERSARIAL_SIZE).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(batch.images + delta), batch.labels), delta)
    moved = (delta.detach() + ADVERSARIAL_STEP * gradient.sign()).clamp_(-ADVERSARIAL_SIZE, ADVERSARIAL_SIZE)
    return F.cross_entropy(model((batch.images + moved).clamp(0, 1)), batch.labels)
