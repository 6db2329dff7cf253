"""What methods share that mend a backdoored model with a few trusted images."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Defense, Task
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.wording import listed


class Repair(Defense):
    """Base of methods that mend a suspect: they fill in `mend`."""

    threat: ClassVar[str] = "the defender has the backdoored model and a few trusted clean images, no training set"
    needs_suspect: ClassVar[bool] = True
    needs_trusted: ClassVar[bool] = True

    def run(self, task: Task) -> Defended:
        """Check what was given, and mend."""
        if task.suspect is None or (self.needs_trusted and task.trusted is None):
            needed = "the undefended model and trusted images" if self.needs_trusted else "the undefended model"
            raise OptionError(f"this method needs {needed}")
        suspect = frozen(task.suspect.to(task.engine.device).to(memory_format=torch.channels_last))
        trusted = task.train.take(torch.empty(0, dtype=torch.int64)) if task.trusted is None else task.trusted
        missing = self._missing_classes(task, trusted) if self.needs_trusted else []
        result = self.mend(task, suspect, trusted)
        return result._replace(findings={**result.findings, "missing_classes": missing} if missing else result.findings)

    @abstractmethod
    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Return the mended model.

        Args:
            task: all that a defense may use.
            suspect: the backdoored model on the engine's device, in evaluation mode, without gradients. It must stay
                as it is; see `copied`.
            trusted: the trusted images; none where the method needs none.
        """

    def _missing_classes(self, task: Task, trusted: ImageDataset) -> list[int]:
        """Return the classes without a trusted image, and say that nothing holds their accuracy."""
        counts = torch.bincount(trusted.labels, minlength=trusted.num_classes)
        missing = torch.nonzero(counts == 0).flatten().tolist()
        if missing:
            names = [trusted.class_names[label] for label in missing[:5]]
            names += [f"{len(missing) - 5} more"] if len(missing) > 5 else []
            count = f"{len(missing)} of {trusted.num_classes} classes"
            task.engine.progress.note(
                f"no trusted image of {count} (class {listed(names)}): a repair may forget them; --trusted-per-class "
                "of `bdbench poison` reserves some of each"
            )
        return missing


class ChoosingRepair(Repair):
    """Base of those that choose a setting, by the accuracy on trusted images that they hold out and by nothing else."""

    holdout: float = Field(
        0.5, gt=0, lt=1, description="Share of the trusted images held out to choose the setting with."
    )
    tolerance: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Accuracy on held-out images that a repair may cost; default: 0.05, below 100 such images 0.1.",
    )


def copied(suspect: Classifier) -> Classifier:
    """Return a copy of the suspect that may be trained."""
    return copy.deepcopy(suspect).requires_grad_(True)
