"""Attacks that look at a network of their own: one surrogate, trained once on the clean training split, serves all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Attack, Lab
from bdbench.data import ImageDataset
from bdbench.errors import OptionError, TrainingError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.seeds import generator
from bdbench.training.devices import out_of_memory_advice
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.training.recipe import Recipe

JUDGED = 5000
LEARNED = 0.25
"""Least accuracy of a surrogate on its training images, as a share of the way from chance to 1."""

ADVERSARIAL_SIZE = 8 / 255
ADVERSARIAL_STEP = 10 / 255

CHANGED_AT_ONCE = 128


class SurrogateAttack(Attack):
    """Base of attacks that need a classifier of the clean images, trained by the attacker on the same training split.

    The trained surrogate is kept in the cache folder by what determines it, so that several attacks share it.
    """

    surrogate: str = Field("auto", description="Network of the surrogate: as --model takes it, or auto.")
    surrogate_epochs: int = Field(10, ge=1, description="Epochs of the surrogate's training.")
    surrogate_lr: float = Field(0.1, gt=0, description="Peak learning rate of the surrogate's training.")
    surrogate_adversarial: bool = Field(
        False, description="Train the surrogate against perturbations of up to 8/255 (one step, random start)."
    )

    def train_surrogate(self, clean: ImageDataset, lab: Lab) -> Classifier:
        """Return the surrogate: frozen, in evaluation mode, on the lab's device. A lab trains it once.

        Args:
            clean: the training split before poisoning.
            lab: trains it, or has it in its memory or its cache.

        Raises:
            TrainingError: it has not learned the classes, so that nothing it says would help.
        """
        model = lab.new_model(self.surrogate, clean, "surrogate")
        recipe = Recipe(epochs=self.surrogate_epochs, lr=self.surrogate_lr, augment=lab.augment)
        loss = adversarial_cross_entropy if self.surrogate_adversarial else mean_cross_entropy
        phase = "surrogate-adversarial" if self.surrogate_adversarial else "surrogate"
        key = surrogate_key(model, clean, recipe, phase, lab)
        if key not in lab.surrogates:
            folder = lab.cache / "surrogates" if lab.cache else None
            train = partial(lab.engine.fit, model, clean, loss, recipe, phase=phase, lr_flag="--surrogate-lr")
            lab.engine.reuse_or_train(folder, key, {"surrogate": model}, "surrogate", train)
            check_learned(lab, model, clean, "surrogate", "--surrogate-epochs or lower --surrogate-lr")
            lab.surrogates[key] = frozen(model)
        return lab.surrogates[key]


def surrogate_key(model: Classifier, clean: ImageDataset, recipe: Recipe, phase: str, lab: Lab) -> str:
    """Hash what determines a surrogate: first weights, images and labels, recipe, loss, seed, arithmetic."""
    said = [recipe.model_dump(), phase, lab.seed, lab.engine.bf16, lab.engine.device.type]
    digest = hashlib.sha256(json.dumps([clean.fingerprint, *said]).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.cpu().numpy()).data)
    return digest.hexdigest()


def check_learned(lab: Lab, model: Classifier, clean: ImageDataset, name: str, option: str) -> None:
    """Raise if a model does not know its own training images.

    Args:
        lab: asks it.
        model: any classifier of these images.
        clean: N images; at most 5,000 of them, drawn at random, are asked.
        name: what to call it.
        option: what to raise if it does not.

    Raises:
        TrainingError: its accuracy, the mean over the classes that were asked, is less than a quarter of the way from
            chance to 1.
    """
    rows = torch.randperm(len(clean), generator=generator(lab.seed, name, "judged"))[:JUDGED]
    labels = clean.labels[rows]
    correct = (lab.engine.logits(model, clean.images[rows]).argmax(1) == labels).double()
    asked = labels.bincount()
    accuracy = float((labels.bincount(correct)[asked > 0] / asked[asked > 0]).mean())
    least = 1 / clean.num_classes + LEARNED * (1 - 1 / clean.num_classes)
    if accuracy < least:
        raise TrainingError(
            f"the {name} did not learn: accuracy {accuracy:.3f} on its training images, at least {least:.3f} is needed "
            f"for {clean.num_classes} classes; raise {option}"
        )


def adversarial_cross_entropy(model: Classifier, batch: Batch) -> Tensor:
    """Return the loss of images that one signed gradient step has made harder, within 8/255 of a random start.

    Source: Wong et al., Fast is better than free, ICLR 2020, https://arxiv.org/abs/2001.03994.
    """
    delta = torch.empty_like(batch.images).uniform_(-ADVERSARIAL_SIZE, ADVERSARIAL_SIZE)
    start = (batch.images + delta).clamp_(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), batch.labels), start)
    delta = (start.detach() - batch.images + ADVERSARIAL_STEP * gradient.sign()).clamp_(
        -ADVERSARIAL_SIZE, ADVERSARIAL_SIZE
    )
    return F.cross_entropy(model((batch.images + delta).clamp_(0, 1)), batch.labels)


def rows_of_target(clean: ImageDataset, target: int) -> Tensor:
    """Return the rows (M,) int64 of the target class.

    Raises:
        OptionError: there are none, or nothing else.
    """
    rows = torch.nonzero(clean.labels == target).flatten()
    if not 0 < len(rows) < len(clean):
        raise OptionError(
            f"{len(rows)} of {len(clean)} training images are of class {target}, some and not all must be; "
            "choose another --target"
        )
    return rows


def on_device(images: Tensor, lab: Lab) -> Tensor:
    """Return uint8 images (B, C, H, W) as networks take them: float in [0, 1], on the lab's device."""
    return images.to(lab.engine.device).float() / 255


def change_images(lab: Lab, label: str, images: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return images changed batch by batch, with a bar.

    Args:
        lab: says where, and is told how far it is.
        label: of the bar.
        images: (N, C, H, W) uint8.
        change: from images (B, C, H, W) float in [0, 1], on the device, and their places (B,) among the N, to images
            of the same form.

    Returns:
        (N, C, H, W) uint8, clipped and rounded to nearest.

    Raises:
        DeviceError: out of memory.
    """
    changed, progress = torch.empty_like(images), lab.engine.progress
    progress.start(label, len(images))
    for places in torch.arange(len(images)).split(CHANGED_AT_ONCE):
        with out_of_memory_advice("the load of the device, or use --device cpu"):
            part = change(on_device(images[places], lab), places)
        changed[places] = part.float().mul(255).clamp_(0, 255).round_().to(torch.uint8).cpu()
        progress.advance(len(places))
    progress.finish()
    return changed
