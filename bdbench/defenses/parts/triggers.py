"""The triggers of all classes of a suspect, inverted together, and what tells whether one of them is a backdoor's."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Task
from bdbench.defenses.parts.inversion import FORMS, Stamp, Triggers
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.seeds import scoped
from bdbench.training.loop import Batch

MIN_CLASSES = 3
"""Of two sizes none lies more than 0.7 deviations from their median."""

IMAGES_AT_ONCE = 1024
"""Stamped images in a step of the inversion: classes beyond it wait for the next group."""

PASS = {"cpu": 128}
"""Stamped images in a pass through the network, where all of a step are too many for the caches of a device."""


class Search(NamedTuple):
    """How triggers are inverted.

    Attributes:
        form: of the triggers; see `FORMS`.
        epochs: passes over the trusted images.
        batch_size: trusted images in a step.
        lr: Adam's; None for the form's.
        cost: weight of a trigger's size; None for the form's.
        augment: as `Recipe.augment`; auto takes the recipe's.
        keep: the smallest trigger that works, or the last one.
    """

    form: Literal["mask", "pixel"]
    epochs: int
    batch_size: int
    lr: float | None
    cost: float | None
    augment: str = "none"
    keep: Literal["best", "last"] = "best"


class Found(NamedTuple):
    """What the inversion found: classes, trigger sizes and success rates (K,), and the triggers."""

    classes: Tensor
    sizes: Tensor
    success: Tensor
    stamps: list[Stamp]

    @classmethod
    def join(cls, groups: list[Found]) -> Found:
        """Put groups of classes together."""
        classes = torch.cat([group.classes for group in groups])
        sizes = torch.cat([group.sizes for group in groups])
        success = torch.cat([group.success for group in groups])
        return cls(classes, sizes, success, [stamp for group in groups for stamp in group.stamps])


def classes_to_invert(num_classes: int, told: int | None, method: str) -> Tensor:
    """Return all classes, (K,) int64, or the one that is told, (1,).

    Raises:
        OptionError: there is no such class, or there are too few for one to stand out.
    """
    classes = torch.arange(num_classes)
    if told is not None:
        if told >= num_classes:
            raise OptionError(f"oracle_target {told} does not exist: classes are 0..{num_classes - 1}")
        return classes[told:][:1]
    if num_classes < MIN_CLASSES:
        raise OptionError(
            f"among {num_classes} classes none can stand out: {method} infers the target of at least {MIN_CLASSES}; "
            "tell it with --oracle-target"
        )
    return classes


def invert(task: Task, suspect: Classifier, trusted: ImageDataset, classes: Tensor, search: Search) -> Found:
    """Find the smallest trigger of each class, as many classes together as fit."""
    step = max(1, IMAGES_AT_ONCE // search.batch_size)
    return Found.join([invert_together(task, suspect, trusted, group, search) for group in classes.split(step)])


def invert_together(task: Task, suspect: Classifier, trusted: ImageDataset, classes: Tensor, search: Search) -> Found:
    """Find the triggers of some classes in one phase, `invert` or, of a part of the classes, `invert-FIRST`."""
    engine = task.engine
    with scoped(engine.seed, "triggers", int(classes[0])):
        triggers = FORMS[search.form](classes, trusted.image_shape, search.cost, search.keep)
    triggers.patience = max(1, round(triggers.patience_share * search.epochs))
    lr = search.lr or triggers.lr
    recipe = task.recipe.model_copy(
        update={
            "epochs": search.epochs, "batch_size": search.batch_size, "lr": lr, "schedule": "constant", "warmup": 0.0,
            "augment": task.recipe.augment if search.augment == "auto" else search.augment,
        }
    )  # fmt: skip

    plain = recipe.augment == "none"
    known = engine.logits(suspect, trusted.images).argmax(1).to(engine.device) if plain else None
    at_once = max(1, PASS.get(engine.device.type, IMAGES_AT_ONCE) // search.batch_size)

    def loss(triggers: Triggers, batch: Batch) -> Tensor:
        triggers.clamp()
        stamped = triggers.stamp(batch.images)
        losses, answers = pulled(suspect, stamped, triggers.classes, at_once)
        with torch.no_grad():
            before = suspect(batch.images).argmax(1) if known is None else known[batch.rows]
            triggers.count(before, answers)
        return (losses + triggers.cost * triggers.penalty()).sum()

    phase = "invert" if len(classes) == trusted.num_classes else f"invert-{int(classes[0])}"
    engine.fit(
        triggers, trusted, loss, recipe, phase=phase, stop=Triggers.finish_epoch,
        optimizer=torch.optim.Adam(triggers.parameters(), lr, betas=triggers.betas), lr_flag="--inversion-lr",
    )  # fmt: skip
    return Found(classes, triggers.best_size.cpu(), triggers.best_success.cpu(), triggers.stamps())


def with_failures(sizes: Tensor, works: Tensor, place: int, whole_image: float) -> Tensor:
    """Return trigger sizes (K,) in which those that do not work are as large as the largest that does.

    At least that large is what they are; the whole image would spread the sizes so far that none stands out.

    Args:
        sizes, works: (K,).
        place: of the smallest that works, which has no part in it.
        whole_image: pixels, for where no other one works.
    """
    others = sizes[works & (torch.arange(len(sizes)) != place)]
    return torch.where(works, sizes, others.max() if len(others) else torch.tensor(whole_image))


def pulled(suspect: Classifier, stamped: Tensor, classes: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Return each class's mean cross entropy (k,) of its stamped images (k, B, C, H, W), and the answers (k, B).

    Classes have nothing to do with each other, so `at_once` of them go through the network and back at a time: the
    gradient is that of all together, and the activations of few are held.
    """
    losses, answers = [], []
    for part, wanted in zip(stamped.split(at_once), classes.split(at_once), strict=True):
        seen = part.detach().requires_grad_()
        logits = suspect(seen.flatten(0, 1))
        each = F.cross_entropy(logits, wanted.repeat_interleave(part.shape[1]), reduction="none")
        own = each.view(part.shape[:2]).mean(1)
        (slope,) = torch.autograd.grad(own.sum(), seen)
        losses.append(own.detach() + ((part - part.detach()) * slope).flatten(1).sum(1))
        answers.append(logits.argmax(1).view(part.shape[:2]))
    return torch.cat(losses), torch.cat(answers)


def rounded(values: Tensor) -> list[float | None]:
    """Return JSON numbers; infinity becomes None."""
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]
