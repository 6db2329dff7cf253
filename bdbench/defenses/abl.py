"""ABL: isolate what is learned first, train on the rest, then unlearn what was isolated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.augment import gather_batch, parse_augment
from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Defense, Task, lowest, mean_cross_entropy
from bdbench.engine import Batch, LossFunction
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator

Trap = Literal["batch", "sample", "flooding"]


class ABL(Defense):
    """Isolates the samples that are learned first, trains on the rest, and unlearns the isolated ones.

    1. `isolate`: a short training without augmentation whose loss is kept near gamma, so that only what is learned
    very fast falls below; then the `isolation_rate` of samples with the lowest loss is set aside. 2. `finetune`: plain
    training on the rest. 3. `unlearn`: ascent on the loss of the isolated samples up to a cap, the loss of guessing,
    together with descent on the rest (`--objective joint`) or alone, for a dose of steps.

    Paper: Li et al., Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021,
    https://arxiv.org/abs/2110.11571.

    Differs from the published code: there the ascent has no clean term, no cap, keeps the momentum of the phase before
    and runs 32 steps at 5e-4 (`--objective ascent --unlearn-steps 32 --unlearn-lr 5e-4 --unlearn-stop 1000`, with
    fresh momentum). The paper's objective is joint. The cap is ours: ascent on cross entropy has no bound, and beyond
    guessing it only teaches the model never to say the target class, which target recall shows and papers that leave
    that class out do not. Local ascent acts on the batch mean, as in the code; the paper's formula read per sample
    (`--trap sample`) also pushes triggered samples back up to gamma. The code's default `--trap flooding` has the same
    gradient as `batch`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.11571"
    threat: ClassVar[str] = "the defender controls training; has the poisoned set only, no clean data"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "isolation_epochs": 20, "epochs": 60, "batch_size": 64, "schedule": "step", "milestones": (2 / 3, 1.0),
                    },
        "fast": {"isolation_epochs": 3, "epochs": 9},
        "tiny": {
            "isolation_epochs": 3, "isolation_lr": 0.05, "isolation_rate": 0.05, "isolation_augment": "auto",
            "epochs": 20, "batch_size": 32, "lr": 0.05,
        },
    }  # fmt: skip

    isolation_epochs: int = Field(20, ge=1, description="Epochs of the isolating phase.")
    isolation_rate: float = Field(0.01, gt=0, lt=1, description="Share of the training set that is isolated.")
    isolation_augment: str = Field("none", description="Augmentation while isolating; see --augment.")
    isolation_lr: float = Field(0.1, gt=0, description="Constant learning rate while isolating.")
    gamma: float = Field(0.5, ge=0, description="Loss that the isolating phase is kept at.")
    trap: Trap = Field(
        "batch", description="How it is kept there: ascent below gamma by batch mean or sample, or flooding."
    )
    objective: Literal["joint", "ascent"] = Field(
        "joint",
        description="Unlearning: descent on the rest and ascent on the isolated (paper), or ascent alone (code).",
    )
    unlearn_steps: int = Field(300, ge=0, description="Dose: steps of unlearning.")
    unlearn_batch_size: int = Field(64, ge=2, description="Isolated samples in a step of unlearning.")
    unlearn_lr: float = Field(2e-3, gt=0, description="Learning rate of unlearning.")
    unlearn_stop: float = Field(
        1.0, gt=0, description="Cap of the ascent, in units of ln(K), the loss of guessing; alone, it ends there."
    )
    unlearn_norms: Literal["batch", "frozen"] = Field(
        "batch", description="Batch norm while unlearning: statistics of the (joint) batch, or kept as they are."
    )

    def run(self, task: Task) -> Defended:
        """Isolate, fine-tune, unlearn; the scores are the negated losses after isolation."""
        engine, recipe = task.engine, task.recipe
        count = int(self.isolation_rate * len(task.train))
        if count < 2:
            raise OptionError(
                f"isolation_rate {self.isolation_rate} isolates {count} of {len(task.train)} samples; raise it to at "
                f"least {2 / len(task.train):.2g}"
            )
        isolation = recipe.model_copy(
            update={
                "epochs": self.isolation_epochs, "lr": self.isolation_lr, "schedule": "constant", "warmup": 0.0,
                "augment": recipe.augment if self.isolation_augment == "auto" else self.isolation_augment,
            }
        )  # fmt: skip
        loss = trapped_loss(self.trap, self.gamma)
        model = engine.fit(task.new_model("model"), task.train, loss, isolation, phase="isolate")
        losses = engine.losses(model, task.train)
        isolated = lowest(losses, count)
        rest = task.train.take(~isolated)
        model = engine.fit(model, rest, mean_cross_entropy, recipe, phase="finetune")
        model = self._unlearn(task, model, task.train.take(isolated), rest)
        return Defended(model, scores=-losses, set_aside=isolated)

    def _unlearn(self, task: Task, model: Classifier, isolated: ImageDataset, rest: ImageDataset) -> Classifier:
        if self.unlearn_steps == 0:
            return model
        engine = task.engine
        recipe = task.recipe.model_copy(
            update={
                "epochs": self.unlearn_steps, "batch_size": self.unlearn_batch_size,  # `max_steps` ends it
                "lr": self.unlearn_lr, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "augment": "none",
            }
        )  # fmt: skip
        cap = self.unlearn_stop * math.log(isolated.num_classes)
        descent = _Descent(rest, task) if self.objective == "joint" else None

        def loss(model: Classifier, batch: Batch) -> Tensor:
            if descent is None:
                return -F.cross_entropy(model(batch.images), batch.labels).clamp_max(cap)
            images, labels = descent.batch(batch.step, len(batch.labels))
            logits = model(torch.cat([batch.images, images]))
            split = len(batch.labels)
            ascent = F.cross_entropy(logits[:split], batch.labels).clamp_max(cap)
            return F.cross_entropy(logits[split:], labels) - ascent

        return engine.fit(
            model, isolated, loss, recipe, phase="unlearn", max_steps=self.unlearn_steps,
            stop=None if descent is not None else lambda model: float(engine.losses(model, isolated).mean()) >= cap,
            frozen_norms=self.unlearn_norms == "frozen",
        )  # fmt: skip


def trapped_loss(trap: Trap, gamma: float) -> LossFunction:
    """Return the isolating loss: descent above `gamma`, ascent below it.

    ``batch``: sign(L - gamma) * L of the batch mean L; ``sample``: the mean of sign(l - gamma) * l over samples;
    ``flooding``: |L - gamma| + gamma.
    """

    def loss(model: Classifier, batch: Batch) -> Tensor:
        return trap_losses(F.cross_entropy(model(batch.images), batch.labels, reduction="none"), trap, gamma)

    return loss


def trap_losses(losses: Tensor, trap: Trap, gamma: float) -> Tensor:
    """Return the scalar of `trapped_loss` for per-sample cross entropies (B,)."""
    if trap == "sample":
        return ((losses.detach() - gamma).sign() * losses).mean()
    mean = losses.mean()
    if trap == "flooding":
        return (mean - gamma).abs() + gamma
    return (mean.detach() - gamma).sign() * mean


class _Descent:
    """Batches of the samples that were not isolated, addressed by step."""

    def __init__(self, rest: ImageDataset, task: Task) -> None:
        self.images = rest.images.to(task.engine.device)
        self.labels = rest.labels.to(task.engine.device)
        self.operations = parse_augment(task.recipe.augment)
        self.seed = task.engine.seed

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) in [0, 1] and labels (B,)."""
        rng = generator(self.seed, "unlearn", "descent", step)
        rows = torch.randint(len(self.labels), (size,), generator=rng).to(self.labels.device)
        return gather_batch(self.images, rows, self.operations, rng), self.labels[rows]
