"""ABL: isolate what is learned first, train on the rest, then unlearn what was isolated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Defense, Round, Task, lowest
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import untracked_norms
from bdbench.seeds import generator
from bdbench.training.augment import parse_augment
from bdbench.training.devices import sent
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch, LossFunction, mean_cross_entropy

Trap = Literal["batch", "sample", "flooding"]
Cap = Literal["batch", "sample"]
Norms = Literal["batch", "apart", "untracked", "frozen"]
Ranking = Literal["last", "mean"]

REACHED = 0.85
"""Share of the cap at which the isolated samples count as unlearned: there the capped loss moves up and down."""


UNCAPPED: Mapping[str, Any] = {
    "unlearn_lr": 5e-4, "unlearn_weight_decay": 1e-4, "unlearn_stop": 1000.0,
}  # fmt: skip
"""How the paper and its code unlearn."""


class ABL(Defense):
    """Isolates the samples that are learned first, trains on the rest, and unlearns the isolated ones.

    1. `isolate`: a short training without augmentation whose loss is kept near gamma, so that only what is learned
    very fast falls below; then the `isolation_rate` of samples with the lowest loss is set aside. 2. `finetune`: plain
    training on the rest. 3. `unlearn`: ascent on the loss of the isolated samples up to a cap, the loss of guessing,
    together with descent on the rest (`--objective joint`) or alone, for a dose of steps.

    What it would isolate is kept after every isolating epoch: `evaluate` says how many of these samples are poison.
    The pass over the training images that this takes costs about a quarter of such an epoch.

    Paper: Li et al., Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021,
    https://arxiv.org/abs/2110.11571.

    What runs unless told otherwise, and in the presets `fast` and `tiny`, is ours: the code's fine-tuning, then the
    paper's joint objective, up to a cap. Ascent on cross entropy has no bound, and beyond guessing it only teaches
    the model never to say the target class, which target recall shows and papers that leave that class out do not.
    The dose (`--unlearn-steps`, its rate, no weight decay) was chosen on the training set of CIFAR-10 with BadNets,
    with its true roles. If the isolated samples' loss is below the cap after it, unlearning goes on until it is
    there, for at most `--unlearn-step-limit` steps (400 in `tiny`, elsewhere none: on clean toy images, where a class
    resists, it costs 12 points of accuracy); if it never is, the findings say so and tables mark the row. A batch's
    mean reaches the cap by the samples that are furthest gone, while others may keep the backdoor; `--unlearn-cap
    sample` takes it from each, and takes the target class as well where most of the isolated are triggered images of
    that class itself, whose loss is the lowest. Where the isolated are fitted almost exactly, their gradient is next
    to nothing, and a batch that they share with the rest keeps it so; with statistics of their own (`--unlearn-norms
    apart`, in `tiny`) they move at once. `--isolate-by mean` is ours too: which samples have the lowest loss turns
    from epoch to epoch, their mean does not. `tiny` was chosen on digits by accuracy on trusted images and by losses
    and labels of training images.

    `--preset paper` goes from isolation straight to the joint objective, without a cap. Its formula of local ascent
    read per sample is `--trap sample`, which also pushes triggered samples back up to gamma; the batch mean, which is
    taken unless told otherwise, is the code's. `--preset code` is the published code on CIFAR-10: ascent alone,
    without a cap, by the optimiser of the fine-tuning as that left it. Since August 2022 it takes half the steps,
    twice as large (`--batch-size 128 --unlearn-batch-size 128 --unlearn-steps 16`). `flooding` has the same gradient
    as `batch`. backdoor-toolbox keeps the statistics of batch norm as they are while unlearning, but does not use
    them: `--unlearn-norms untracked`.

    Differs from the published code in every mode: isolation shuffles its batches, a last batch of one image is left
    out, all runs are seeded. The joint objective draws as many of the rest, augmented, as there are isolated ones in
    the step, with replacement. An accuracy on the rest, as a second reason to stop, is not there.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.11571"
    threat: ClassVar[str] = "the defender controls training; has the poisoned set only, no clean data"
    version: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "isolation_epochs": 20, "finetune": False, "objective": "joint", "batch_size": 64, "unlearn_epochs": 80,
            **UNCAPPED,
        },
        "code": {
            "isolation_epochs": 10, "trap": "flooding", "epochs": 60, "batch_size": 64, "schedule": "step",
            "milestones": (2 / 3, 1.0), "augment": "crop,flip,cutout", "objective": "ascent", "unlearn_steps": 32,
            "unlearn_momentum": "kept", **UNCAPPED,
        },
        "fast": {"isolation_epochs": 3, "epochs": 9},
        "tiny": {
            "isolation_epochs": 3, "isolation_lr": 0.05, "isolation_rate": 0.05, "isolate_by": "mean",
            "epochs": 10, "batch_size": 32, "lr": 0.05,
            "unlearn_cap": "sample", "unlearn_norms": "apart", "unlearn_steps": 40, "unlearn_step_limit": 400,
        },
    }  # fmt: skip

    isolation_epochs: int = Field(20, ge=1, description="Epochs of the isolating phase.")
    isolation_rate: float = Field(0.01, gt=0, lt=1, description="Share of the training set that is isolated.")
    isolation_augment: str = Field("none", description="Augmentation while isolating; see --augment.")
    isolation_lr: float = Field(0.1, gt=0, description="Constant learning rate while isolating.")
    isolate_by: Ranking = Field(
        "last",
        description="Isolate by the loss after the isolating phase (paper, code), or by the mean of those after each "
        "epoch of it (ours), so that one bad last epoch does not decide.",
    )
    gamma: float = Field(0.5, ge=0, description="Loss that the isolating phase is kept at.")
    trap: Trap = Field(
        "batch", description="How it is kept there: ascent below gamma by batch mean or sample, or flooding."
    )
    finetune: bool = Field(
        True, description="Train on the rest between isolating and unlearning; off: the paper's form."
    )
    objective: Literal["joint", "ascent"] = Field(
        "joint",
        description="Unlearning: descent on the rest and ascent on the isolated (paper), or ascent alone (code).",
    )
    unlearn_steps: int = Field(300, ge=0, description="Dose: steps of unlearning.")
    unlearn_epochs: int = Field(
        0,
        ge=0,
        description="The dose in passes over the rest, in place of --unlearn-steps; 0: the steps count (paper: 80).",
    )
    unlearn_step_limit: int = Field(
        0,
        ge=0,
        description="Where the isolated samples' loss is below the cap after the dose, go on until it is there, for at "
        "most so many steps in all; 0: never.",
    )
    unlearn_batch_size: int = Field(64, ge=2, description="Isolated samples in a step of unlearning.")
    unlearn_lr: float = Field(2e-3, gt=0, description="Learning rate of unlearning.")
    unlearn_stop: float = Field(
        1.0, gt=0, description="Cap of the ascent, in units of ln(K), the loss of guessing; alone, it ends there."
    )
    unlearn_cap: Cap = Field("batch", description="The cap holds for the batch's mean loss, or for every sample's.")
    unlearn_momentum: Literal["fresh", "kept"] = Field(
        "fresh", description="Momentum of unlearning begins at zero, or goes on from the phase before (code)."
    )
    unlearn_weight_decay: float = Field(0.0, ge=0, description="Weight decay while unlearning (code: 1e-4).")
    unlearn_norms: Norms = Field(
        "batch",
        description="Batch norm while unlearning: by the (joint) batch, which moves the running statistics; by each "
        "half of it apart; by the batch, these untracked; or by these, frozen.",
    )

    def run(self, task: Task) -> Defended:
        """Isolate, fine-tune, unlearn; the scores rank the losses after isolation, lowest first."""
        engine, recipe = task.engine, task.recipe
        count = isolated_count(self.isolation_rate, len(task.train))
        isolation = recipe.model_copy(
            update={
                "epochs": self.isolation_epochs, "lr": self.isolation_lr, "schedule": "constant", "warmup": 0.0,
                "augment": recipe.augment if self.isolation_augment == "auto" else self.isolation_augment,
            }
        )  # fmt: skip
        model = task.new_model("model")
        # The optimiser that goes on into unlearning takes the steps of the phase before it; None makes fresh ones.
        kept = recipe.optimizer(model) if self.unlearn_momentum == "kept" else None
        isolating = _Isolating(engine, model, task.train, count, self.isolate_by)
        model = engine.fit(
            model, task.train, trapped_loss(self.trap, self.gamma), isolation, phase="isolate",
            optimizer=None if self.finetune else kept, lr_flag="--isolation-lr",
            before_epoch=isolating.look, companions={"isolating": isolating},
        )  # fmt: skip
        isolating.look(self.isolation_epochs)
        isolated = torch.zeros(len(task.train), dtype=torch.bool)
        isolated[isolating.rows[-1]] = True
        rest = torch.nonzero(~isolated).flatten()
        if self.finetune:
            model = engine.fit(
                model, task.train, mean_cross_entropy, recipe, phase="finetune", rows=rest, optimizer=kept
            )
        findings: Mapping[str, Any] = {}
        if self.unlearn_steps or self.unlearn_epochs:
            findings = self._unlearn(task, model, task.train.take(isolated), rest, kept)
            engine.progress.note(findings["said"])
        rounds = [Round("isolate", epoch, rows) for epoch, rows in enumerate(isolating.rows, 1)]
        return Defended(model, scores=-isolating.losses, set_aside=isolated, findings=findings, rounds=rounds)

    def _unlearn(
        self,
        task: Task,
        model: Classifier,
        isolated: ImageDataset,
        rest: Tensor,
        kept: torch.optim.Optimizer | None,
    ) -> Mapping[str, Any]:
        """Unlearn the isolated samples in place, and return what to tell of it."""
        engine = task.engine
        dose = self.unlearn_epochs * math.ceil(len(rest) / self.unlearn_batch_size) or self.unlearn_steps
        recipe = task.recipe.model_copy(
            update={
                "epochs": max(dose, self.unlearn_step_limit), "batch_size": self.unlearn_batch_size,
                "lr": self.unlearn_lr, "schedule": "constant", "warmup": 0.0,  # `max_steps` ends it
                "weight_decay": self.unlearn_weight_decay, "augment": "none",
            }
        )  # fmt: skip
        if kept is not None:
            for group in kept.param_groups:
                group["weight_decay"] = self.unlearn_weight_decay
        guessing = math.log(isolated.num_classes)
        cap = self.unlearn_stop * guessing
        descent = _Descent(rest, task) if self.objective == "joint" else None

        def objective(model: Classifier, batch: Batch, first: int) -> Tensor:
            if descent is None:
                return -capped_loss(model(batch.images), batch.labels, self.unlearn_cap, cap)
            images, labels = descent.batch(first + batch.step, len(batch.labels))
            if self.unlearn_norms == "apart":
                isolated_logits, rest_logits = model(batch.images), model(images)
            else:
                isolated_logits, rest_logits = model(torch.cat([batch.images, images])).chunk(2)
            return F.cross_entropy(rest_logits, labels) - capped_loss(
                isolated_logits, batch.labels, self.unlearn_cap, cap
            )

        def fit(phase: str, first: int, steps: int, stop: Callable[[Classifier], bool] | None) -> None:
            engine.fit(
                model, isolated, partial(objective, first=first), recipe, phase=phase, optimizer=kept, max_steps=steps,
                stop=stop, frozen_norms=self.unlearn_norms == "frozen", lr_flag="--unlearn-lr", unit="step",
            )  # fmt: skip

        def share(of: float) -> float:
            """Return how far the isolated samples' loss is on its way to a cap."""
            return float(capped_loss(engine.logits(model, isolated.images), isolated.labels, self.unlearn_cap, of)) / of

        with untracked_norms(model) if self.unlearn_norms == "untracked" else nullcontext():
            enough = REACHED if self.unlearn_cap == "sample" else 1.0
            fit("unlearn", 0, dose, (lambda _: share(cap) >= enough) if descent is None else None)
            more = self.unlearn_step_limit - dose
            if more > 0 and share(cap) < REACHED:
                fit("unlearn-on", dose, more, lambda _: share(cap) >= REACHED)
        return told(share(min(cap, guessing)), float(engine.losses(model, isolated).mean()), guessing)


def told(share: float, loss: float, guessing: float) -> dict[str, Any]:
    """Return what unlearning came to.

    Args:
        share: of the way to the cap, or to guessing where that is less, that the isolated samples' loss went.
        loss: their mean loss, guessing: that of an even guess.
    """
    took = share >= REACHED
    said = f"unlearned: the samples set aside have a loss of {loss:.2f} (guessing: {guessing:.2f})"
    if not took:
        said = (
            f"unlearning did not take: the samples set aside have a loss of {loss:.2f} (guessing: {guessing:.2f}); "
            "raise --unlearn-lr or --unlearn-step-limit"
        )
    return {"said": said, "took": took, "isolated_loss": round(loss, 4)}


def isolated_count(rate: float, total: int) -> int:
    """Return how many of `total` samples a rate isolates, rounded down.

    Raises:
        OptionError: fewer than two, or fewer than two stay; training needs two.
    """
    count = int(rate * total)
    if count < 2:
        raise OptionError(
            f"isolation_rate {rate} isolates {count} of {total} samples; raise it to at least "
            f"{math.ceil(2e6 / total) / 1e6:g}"
        )
    if total - count < 2:
        raise OptionError(
            f"isolation_rate {rate} isolates {count} of {total} samples and leaves {total - count}; lower it to at "
            f"most {math.floor(1e6 - 2e6 / total) / 1e6:g}"
        )
    return count


def capped_loss(logits: Tensor, labels: Tensor, per: Cap, cap: float) -> Tensor:
    """Return what is ascended: the cross entropy up to a cap, from which it has no gradient.

    ``batch``: min(mean, cap); ``sample``: the mean over samples of min(cross entropy, cap).
    """
    if per == "batch":
        return F.cross_entropy(logits, labels).clamp_max(cap)
    return F.cross_entropy(logits, labels, reduction="none").clamp_max(cap).mean()


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


class _Isolating:
    """What would be isolated after each epoch of the isolating phase so far; part of its checkpoint.

    Attributes:
        losses: (N,), by which the samples were ranked last: margins, or mean losses.
        total: (N,) float64, the losses after each epoch, summed; where the last ones decide, 0.
        rows: (epochs, M) int64, the M samples that would be isolated after each epoch.
    """

    def __init__(self, engine: Engine, model: Classifier, data: ImageDataset, count: int, by: Ranking) -> None:
        self.engine, self.model, self.data, self.count, self.by = engine, model, data, count, by
        self.losses = self.total = torch.zeros(len(data), dtype=torch.float64)
        self.rows = torch.empty(0, count, dtype=torch.int64)

    def look(self, epochs: int) -> None:
        """Rank the samples after so many epochs; before the first there is nothing to rank."""
        if not epochs:
            return
        self.losses = self.engine.margins(self.model, self.data)
        if self.by == "mean":
            # in double precision no loss is exactly 0, so that sure samples do not tie
            self.total = self.total + F.softplus(self.losses.double())
            self.losses = self.total / epochs
        self.rows = torch.cat([self.rows, torch.nonzero(lowest(self.losses, self.count)).T])

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and what would have been isolated."""
        return {"total": self.total, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.total, self.rows = state_dict["total"], state_dict["rows"]


class _Descent:
    """Batches of the samples that were not isolated, addressed by step."""

    def __init__(self, rest: Tensor, task: Task) -> None:
        self.rest, self.labels = rest, task.train.labels
        self.feed = task.engine.feed(task.train)
        self.operations = parse_augment(task.recipe.augment)
        self.seed = task.engine.seed

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) in [0, 1] and labels (B,)."""
        rng = generator(self.seed, "unlearn", "descent", step)
        rows = self.rest[torch.randint(len(self.rest), (size,), generator=rng)]
        return self.feed.batch(rows, self.operations, rng), sent(self.labels[rows], self.feed.device)
