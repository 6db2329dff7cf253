"""Neural Cleanse: invert the triggers of all classes, and unlearn those that are far smaller than the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.inversion import SUCCESS, Stamp, anomaly, smallest_p
from bdbench.defenses.parts.triggers import Found, Search, classes_to_invert, invert, rounded, with_failures
from bdbench.defenses.repair.base import Repair, copied
from bdbench.defenses.repair.ft import TINY, TUNING
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch
from bdbench.wording import listed


class NeuralCleanse(Repair):
    """Inverts a trigger for every class, and unlearns those of the classes that stand out.

    1. `invert`: for every class, all together, the trigger that turns trusted images into it, as small as it gets. A
    class is flagged if its trigger works and its size lies more than `anomaly_threshold` median absolute deviations
    (times 1.4826) below the median of all. 2. `unlearn`: the suspect is fine-tuned on the trusted images with their
    true labels, while a share of every batch, drawn anew, carries the trigger of each flagged class. If no class is
    flagged, the model is returned as it was, and the row is marked.

    Paper: Wang et al., Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks, S&P 2019,
    https://doi.org/10.1109/SP.2019.00031.

    Of ten classes without a backdoor the index is above 2 for some class in a third of all cases; `smallest_p`, in the
    findings, says how often chance alone makes a smallest trigger as small as this one. The inversion is MCLDef's, with
    a mask whose cost is fixed; `--form pixel` has a cost that follows the success. The authors' code only detects. The
    code in BackdoorBench trains one model and returns another one, which is the suspect; it draws other images for
    unlearning than for the inversion, and stores the trigger as a picture whose range it stretches. Here the model that
    was trained is returned, both use the trusted images, and the trigger is stamped as it was found, after
    augmentation. A trigger that never works counts as large as the largest that does. The code in backdoor-toolbox can
    be told the target class; so can this: `--oracle-target`.
    """

    paper: ClassVar[str] = "https://doi.org/10.1109/SP.2019.00031"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**TUNING, "inversion_epochs": 80},
        "fast": {**TUNING, "epochs": 20, "batch_size": 128, "inversion_epochs": 8},
        "tiny": {
            **TINY, "inversion_epochs": 40, "inversion_batch_size": 36, "inversion_cost": 0.05,
            "anomaly_threshold": 1.5,
        },
    }  # fmt: skip

    anomaly_threshold: float = Field(2.0, ge=0, description="A class is flagged if its anomaly index is larger.")
    stamp_share: float = Field(0.2, ge=0, le=1, description="Share of a batch stamped with each flagged trigger.")
    oracle_target: int | None = Field(None, ge=0, description="Tell it the target class; marked in every table.")
    form: Literal["mask", "pixel"] = Field(
        "mask", description="What is reconstructed: mask and pattern, or pixels added."
    )
    inversion_epochs: int = Field(80, ge=1, description="Passes over the trusted images for the inversion.")
    inversion_batch_size: int = Field(64, ge=2, description="Trusted images in a step of it.")
    inversion_lr: float = Field(0.1, gt=0, description="Its learning rate (Adam).")
    inversion_cost: float | None = Field(
        None,
        ge=0,
        description="Weight of the trigger's size; default: the form's, 0.01 for mask, 0.001 (at first) for pixel.",
    )

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Invert, flag, unlearn."""
        classes = classes_to_invert(trusted.num_classes, self.oracle_target, "Neural Cleanse")
        search = Search(
            self.form, self.inversion_epochs, self.inversion_batch_size, self.inversion_lr, self.inversion_cost
        )
        found = invert(task, suspect, trusted, classes, search)
        places, findings = self.flag(found)
        task.engine.progress.note(findings["said"])
        if not places:
            return Defended(suspect, findings=findings)
        triggers = [found.stamps[place] for place in places]
        return Defended(self._unlearn(task, suspect, trusted, triggers), findings=findings)

    def flag(self, found: Found) -> tuple[list[int], dict[str, Any]]:
        """Return the places of the flagged classes, and what to tell of it."""
        works = found.success >= SUCCESS
        smallest = int(torch.where(works, found.sizes, math.inf).argmin())
        sizes = with_failures(found.sizes, works, smallest, float(found.stamps[0].add[0].numel()))
        scores = anomaly(sizes)
        told = self.oracle_target is not None
        flagged = works if told else works & (scores > self.anomaly_threshold)
        places = torch.nonzero(flagged).flatten().tolist()
        names = [str(int(found.classes[place])) for place in places]
        if not bool(works.any()):
            said = f"inversion failed: no trigger turns {SUCCESS:.0%} of the trusted images to a class; model unchanged"
        elif not places:
            said = (
                f"no class is flagged: the smallest trigger, of class {int(found.classes[smallest])}, has an anomaly "
                f"index of {float(scores[smallest]):.2g} (limit {self.anomaly_threshold:g}); model unchanged"
            )
        elif told:
            said = f"unlearns the trigger of class {names[0]}, as told"
        else:
            indices = listed([f"{float(scores[place]):.2g}" for place in places])
            many = "classes" if len(places) > 1 else "class"
            said = f"unlearns the trigger of {many} {listed(names)}: anomaly index {indices}"
        return places, {
            "said": said, "unchanged": not places, "flagged": [int(found.classes[place]) for place in places],
            "classes": found.classes.tolist(), "sizes": rounded(found.sizes), "success": rounded(found.success),
            "anomaly": rounded(scores), "smallest_p": None if told else smallest_p(sizes),
        }  # fmt: skip

    def _unlearn(self, task: Task, suspect: Classifier, trusted: ImageDataset, triggers: Sequence[Stamp]) -> Classifier:
        """Fine-tune a copy on images of which some are stamped."""
        stamps = among_none(triggers, task.engine.device)

        def loss(model: Classifier, batch: Batch) -> Tensor:
            images = stamped(batch.images, stamps, self.stamp_share)
            return F.cross_entropy(model(images), batch.labels)

        return task.engine.fit(copied(suspect), trusted, loss, task.recipe, phase="unlearn")


def among_none(triggers: Sequence[Stamp], device: torch.device) -> Stamp:
    """Return k triggers, and one that changes nothing as the last, in one: keep (k + 1, 1, H, W), add (k + 1, C, H, W).

    Of triggers that keep pixels, channel by channel, `keep` has C channels.
    """
    none = Stamp(torch.ones_like(triggers[0].keep), torch.zeros_like(triggers[0].add))
    keep, add = (torch.stack(list(parts)).to(device) for parts in zip(*triggers, none, strict=True))
    return Stamp(keep, add)


def stamped(images: Tensor, stamps: Stamp, share: float) -> Tensor:
    """Return images (B, C, H, W) of which about a share carries each of k triggers; at most one an image.

    Args:
        images: in [0, 1].
        stamps: see `among_none`.
        share: for each trigger, in [0, 1]; where k shares are more than all, all are stamped, in equal parts.
    """
    count = len(stamps.keep) - 1
    edges = torch.arange(1, count + 1, device=images.device) * min(share, 1 / count)
    which = torch.bucketize(torch.rand(len(images), device=images.device), edges, right=True)
    return Stamp(stamps.keep[which], stamps.add[which])(images)
