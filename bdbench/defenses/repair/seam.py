"""SEAM: make the model forget by wrong labels, then teach it again by the right ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.loop import Batch

RECOVERY: Mapping[str, Any] = {
    "epochs": 100, "batch_size": 32, "lr": 0.001, "schedule": "constant", "weight_decay": 0.0,
}  # fmt: skip


class SelectiveAmnesia(Repair):
    """Makes the model forget its task and its backdoor by wrong labels, and then learn its task again.

    1. `forget`: a part of the trusted images, with labels drawn anew for every batch from the classes that are wrong,
    until the model classifies less than `forget_stop` of that part right after an epoch. 2. `recover`: all trusted
    images with their labels, until more than `recover_stop` of them are classified right during an epoch, augmented as
    they are; with augmentation that may never happen, and `--epochs` ends it. Nothing teaches the backdoor again.

    The recipe (`--epochs`, `--batch-size`, `--lr`, `--weight-decay`, `--augment`) is that of the second phase, whose
    steps are Adam's. The first one has its learning rate.

    Paper: Zhu et al., Selective Amnesia: On Efficient, High-Fidelity and Blind Suppression of Backdoor Effects in
    Trojaned Machine Learning Models, IEEE S&P 2023, https://arxiv.org/abs/2212.04687.

    No code of its authors was at hand; `paper` is the setting of the copy in backdoor-toolbox, which takes 1 % of the
    training images to forget with and 10 % to recover with. Here both phases share the trusted images, as every other
    repair has them. Few images may not be enough to recover with: then the accuracy falls.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2212.04687"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": RECOVERY,
        "fast": {**RECOVERY, "epochs": 20},
        "tiny": {**RECOVERY, "epochs": 50, "batch_size": 16, "lr": 0.003},
    }

    forget_share: float = Field(0.2, gt=0, le=1, description="Share of the trusted images that it forgets with.")
    forget_stop: float | None = Field(
        None, gt=0, le=1, description="Accuracy below which they are forgotten; default: 2 / classes, at most 0.6."
    )
    forget_epochs: int = Field(10, ge=0, description="Passes over them, at most.")
    recover_stop: float = Field(
        0.97, gt=0, le=1, description="Accuracy on the images of an epoch at which the recovery ends."
    )

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Forget and recover, with a copy."""
        engine, model = task.engine, copied(suspect)
        findings = self._forget(task, model, trusted) if self.forget_epochs else {}
        recovery = Recovery(self.recover_stop, engine.device)
        engine.fit(
            model, trusted, recovery.loss, task.recipe, phase="recover", stop=recovery.is_over,
            optimizer=torch.optim.Adam(model.parameters(), task.recipe.lr, weight_decay=task.recipe.weight_decay),
        )  # fmt: skip
        return Defended(model, findings={**findings, "recovered_accuracy": round(accuracy(engine, model, trusted), 4)})

    def _forget(self, task: Task, model: Classifier, trusted: ImageDataset) -> dict[str, Any]:
        """Train with wrong labels, in place; return what to tell of it."""
        engine, classes = task.engine, trusted.num_classes
        limit = twice_chance(classes) if self.forget_stop is None else self.forget_stop
        order = torch.randperm(len(trusted), generator=generator(engine.seed, "forget", "rows"))
        part = trusted.take(order[: max(2, round(self.forget_share * len(trusted)))])

        def loss(model: Classifier, batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch.images), wrong_labels(batch.labels, classes))

        def forgotten(model: Classifier) -> bool:
            return accuracy(engine, model, part) < limit

        recipe = task.recipe.model_copy(update={"epochs": self.forget_epochs, "schedule": "constant", "warmup": 0.0})
        optimizer = torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        engine.fit(model, part, loss, recipe, phase="forget", stop=forgotten, optimizer=optimizer)
        left = accuracy(engine, model, part)
        epochs = sum(row["phase"] == "forget" for row in engine.history)
        did = "forgot" if left < limit else "did not forget"
        said = f"{did}: accuracy {left:.2f} on {len(part)} trusted images after epoch {epochs}, limit {limit:g}"
        engine.progress.note(said)
        return {"said": said, "forgotten_accuracy": round(left, 4), "forget_epochs_taken": epochs}


class Recovery:
    """Fine-tuning that counts, during each epoch, what is classified right, and ends when that is enough.

    Args:
        limit: the accuracy above which it is.
        device: where the images are.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        self.limit = limit
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = 0

    def loss(self, model: Classifier, batch: Batch) -> Tensor:
        """Return the cross entropy, and count."""
        logits = model(batch.images)
        self.right += (logits.argmax(1) == batch.labels).sum()
        self.seen += len(batch.labels)
        return F.cross_entropy(logits, batch.labels)

    def is_over(self, model: Classifier) -> bool:  # noqa: ARG002 - it was watched while it was trained
        """Say after an epoch whether it was enough, and begin to count anew."""
        accurate = int(self.right) / self.seen
        self.right.zero_()
        self.seen = 0
        return accurate > self.limit


def twice_chance(num_classes: int) -> float:
    """Return the accuracy below which a model has forgotten its classes; of few classes, 0.6."""
    return min(2 / num_classes, 0.6)


def wrong_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Draw for each label (B,) one of the other classes, all as likely, from the global stream of its device."""
    return (labels + torch.randint_like(labels, 1, num_classes)) % num_classes
