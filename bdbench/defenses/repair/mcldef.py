"""MCLDef: reconstruct the trigger from a backdoored model, then push its effect out of the features by contrast."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Defense, Task
from bdbench.defenses.parts.inversion import SUCCESS, Stamp, anomaly, smallest_p
from bdbench.defenses.parts.triggers import Found, Search, classes_to_invert, invert, rounded, with_failures
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.training.augment import parse_augment
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe


class MCLDef(Defense):
    """Reconstructs the trigger of a backdoored model and tunes the features until stamped images look like clean ones.

    1. `invert`: for every class, all together, the trigger that turns trusted images into it, as small as it gets. The
    target is the class whose trigger is smaller than the others' by more than chance makes it: `significance` bounds
    the p-value of its size among theirs (Grubbs' test on logarithms). 2. `purify`: with z the embedding of a stamped
    image by the model that is tuned, and z+ and z- those of the clean and the stamped image by the model as it was,
    -log(e^(cos(z, z+) / tau) / (e^(cos(z, z+) / tau) + e^(cos(z, z-) / tau))) falls. The head is left alone. Labels of
    the trusted images are not used, unless `clean_weight` asks for it. If no class stands out, or no trigger works,
    the model is returned as it was, and the row is marked.

    Paper: Yue et al., Model-Contrastive Learning for Backdoor Defense, https://arxiv.org/abs/2205.04411.

    Two codes are published, with different inversions: `--form mask` (2022: a mask and a pattern, the mask's size
    penalised) and `--form pixel` (2023: a pattern that is added, its cost raised while it works and lowered while it
    does not). Both are told the target (`--oracle-target`), which here is inferred. The first one keeps the last
    trigger, however well it works (`--inversion-keep last`), augments (`--inversion-augment crop,flip`), and clamps
    patterns in normalised space, where black and white cannot be reached; here pixels are pixels. The second one keeps
    a pattern that has a lower penalty and fewer changed pixels, goes on from what it kept, zeroes what is under 1/255
    on either side, and leaves out a last batch that is not full; here the pattern that changes least is kept, training
    goes on from where it is, and what is zeroed is the difference of the sides. Success is counted over the images that
    are not of the class before. Images of the target class are purified too, as there. In both the tuned model sees
    stamped images only, so its batch-norm statistics are those of stamped images (`--clean-norms` adds the clean ones),
    and nothing holds its accuracy (`--clean-weight`, which takes `--clean-norms` with it). The learning rate of
    purification is 0.1, 0.01 and 0.001, as there for CIFAR-10; for GTSRB it begins at 0.01.

    Purification augments as the code of the chosen form does: with `--form mask` it takes `--augment` (crops and flips
    there), with `--form pixel`, which `paper` and `fast` have, the images are as they are. `--purify-augment` takes
    another one. On a few hundred trusted images augmentation leaves more of the trigger.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2205.04411"
    threat: ClassVar[str] = "the defender has the backdoored model and a few trusted clean images, no training set"
    needs_trusted: ClassVar[bool] = True
    needs_suspect: ClassVar[bool] = True
    version: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "epochs": 20, "batch_size": 64, "lr": 0.1, "schedule": "step", "milestones": (0.05, 0.5), "nesterov": False,
        },
        "fast": {
            "inversion_epochs": 10, "epochs": 20, "batch_size": 64, "lr": 0.1, "schedule": "step",
            "milestones": (0.05, 0.5), "nesterov": False,
        },
        "tiny": {
            "form": "mask", "inversion_epochs": 50, "inversion_batch_size": 36, "inversion_lr": 0.1,
            "inversion_cost": 0.05, "epochs": 20, "batch_size": 16, "lr": 0.1,
            "schedule": "step", "milestones": (0.05, 0.5), "nesterov": False,
        },
    }  # fmt: skip

    form: Literal["mask", "pixel"] = Field(
        "pixel", description="What is reconstructed: mask and pattern, or pixels added."
    )
    oracle_target: int | None = Field(None, ge=0, description="Tell it the target class; marked in every table.")
    significance: float = Field(
        0.05,
        gt=0,
        le=1,
        description="The largest p-value at which the smallest trigger is the target's; 1: it always is.",
    )
    inversion_epochs: int = Field(100, ge=1, description="Passes over the trusted images for the inversion.")
    inversion_batch_size: int = Field(64, ge=2, description="Trusted images in a step of it.")
    inversion_lr: float | None = Field(
        None, gt=0, description="Its learning rate (Adam); default: the form's, 0.005 for mask, 0.1 for pixel."
    )
    inversion_cost: float | None = Field(
        None,
        ge=0,
        description="Weight of the trigger's size; default: the form's, 0.01 for mask, 0.001 (at first) for pixel.",
    )
    inversion_augment: str = Field("none", description="Augmentation for the inversion; see --augment.")
    inversion_keep: Literal["best", "last"] = Field(
        "best", description="Keep the smallest trigger that works, or the last one."
    )
    purify_augment: str = Field(
        "auto",
        description="Augmentation for the purification; auto: as the form's code, --augment for mask, none for pixel.",
    )
    tau: float = Field(0.5, gt=0, description="Temperature of the contrast.")
    clean_weight: float = Field(
        0.0, ge=0, description="Weight of a cross entropy on the clean trusted images; takes --clean-norms with it."
    )
    clean_norms: bool = Field(
        False, description="Let batch norm see the clean images too, in one batch with the stamped."
    )

    def run(self, task: Task) -> Defended:
        """Invert, decide, purify."""
        if task.suspect is None or task.trusted is None:
            raise OptionError("MCLDef needs the undefended model and trusted images; see `bdbench show mcldef`")
        classes = classes_to_invert(task.trusted.num_classes, self.oracle_target, "MCLDef")
        purification = replace(task, recipe=self._purification(task))
        suspect = frozen(task.suspect.to(task.engine.device))
        found = invert(task, suspect, task.trusted, classes, self.search)
        target, findings = self._decide(found)
        task.engine.progress.note(findings["said"])
        if target is None:
            return Defended(suspect, findings=findings)
        return Defended(self._purify(purification, suspect, task.trusted, found.stamps[target]), findings=findings)

    def _purification(self, task: Task) -> Recipe:
        """Return the recipe of the purification, whose augmentation is checked before anything is trained."""
        augment = self.augment_of_purification(task.recipe.augment)
        parse_augment(augment)
        if self.purify_augment == "auto" and augment != task.recipe.augment:
            task.engine.progress.note(
                f"purification: the images as they are, as in the code of --form {self.form}; "
                f"--purify-augment {task.recipe.augment} augments them"
            )
        return task.recipe.model_copy(update={"augment": augment})

    @property
    def search(self) -> Search:
        """How triggers are inverted."""
        return Search(
            self.form, self.inversion_epochs, self.inversion_batch_size, self.inversion_lr, self.inversion_cost,
            self.inversion_augment, self.inversion_keep,
        )  # fmt: skip

    def _decide(self, found: Found) -> tuple[int | None, dict[str, Any]]:
        """Return the place of the target's trigger, or None, and what to tell of it."""
        works = found.success >= SUCCESS
        place = int(torch.where(works, found.sizes, math.inf).argmin())
        sizes = with_failures(found.sizes, works, place, float(found.stamps[0].add[0].numel()))
        scores = anomaly(sizes)
        target = int(found.classes[place])
        told = self.oracle_target is not None
        p = smallest_p(sizes)
        stands_out = told or p <= self.significance
        unchanged = not (works[place] and stands_out)
        if not works[place]:
            said = f"inversion failed: no trigger turns {SUCCESS:.0%} of the trusted images to a class; model unchanged"
        elif not stands_out:
            said = (
                f"no class stands out: the smallest trigger, of class {target}, has a p-value of {p:.2g} "
                f"(limit {self.significance:g}); model unchanged"
            )
        else:
            said = f"target class {target} {'as told' if told else f'inferred, p-value {p:.2g}'}"
        findings = {
            "said": said, "unchanged": unchanged, "target": None if unchanged else target,
            "classes": found.classes.tolist(), "sizes": rounded(found.sizes), "success": rounded(found.success),
            "anomaly": rounded(scores), "p": None if told else p,
        }  # fmt: skip
        return None if unchanged else place, findings

    def _purify(self, task: Task, suspect: Classifier, trusted: ImageDataset, trigger: Stamp) -> Classifier:
        """Tune a copy of the suspect's features."""
        model = copy.deepcopy(suspect).requires_grad_(True)
        model.head.requires_grad_(False)
        trigger = Stamp(*(part.to(task.engine.device) for part in trigger))
        joint = self.clean_norms or self.clean_weight > 0

        def loss(model: Classifier, batch: Batch) -> Tensor:
            stamped = trigger(batch.images)
            with torch.no_grad():
                positive, negative = suspect.embed(batch.images), suspect.embed(stamped)
            embedding = model.embed(torch.cat([stamped, batch.images]) if joint else stamped)
            total = contrast(embedding[: len(stamped)], positive, negative, self.tau)
            if self.clean_weight:
                clean = model.classify(embedding[len(stamped) :])
                total = total + self.clean_weight * F.cross_entropy(clean, batch.labels)
            return total

        return task.engine.fit(model, trusted, loss, task.recipe, phase="purify")

    def augment_of_purification(self, usual: str) -> str:
        """Return how purification augments: as asked, else as the form's published code does.

        Args:
            usual: the recipe's augmentation.
        """
        if self.purify_augment != "auto":
            return self.purify_augment
        return "none" if self.form == "pixel" else usual


def contrast(anchor: Tensor, positive: Tensor, negative: Tensor, tau: float) -> Tensor:
    """Return the model-contrastive loss of embeddings (B, D): ln 2 where positive and negative are equal."""
    difference = F.cosine_similarity(anchor, positive) - F.cosine_similarity(anchor, negative)
    return F.softplus(-difference / tau).mean()
