"""How long a training will take: every phase of the real method on the real images, but a few steps of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.models.structure import Module
from bdbench.progress import Progress
from bdbench.training import checkpoints
from bdbench.training.engine import SILENT, Engine
from bdbench.training.loop import Batch, Phase, Stateful, Unit
from bdbench.training.recipe import Recipe

FEW = 32
"""Images of a step that is timed on a CPU, where more are not faster by the image; elsewhere they are the recipe's."""

TIMED_SECONDS = 0.15
"""Of the steps of a phase that are timed together; a longer step is timed alone, without another before it."""

PASSED = 64
"""Images of a pass that is timed."""


@dataclass
class Rehearsal(Engine):
    """An engine that takes a few steps of every phase, times them, and says how long all of them will take.

    What it trains and answers is worth nothing: a method that goes other ways by what it sees may leave out a phase.

    Attributes:
        seconds: expected of each phase so far; passes over images outside of phases are `passes`.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _added: float = field(default=0.0, init=False, repr=False)
    """Seconds that passes would take beyond those that they took here."""

    def fit(
        self,
        model: Module,
        data: ImageDataset,
        loss: Callable[[Module, Batch], Tensor],
        recipe: Recipe,
        *,
        phase: str,
        rows: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        epoch_steps: int | None = None,
        max_steps: int | None = None,
        before_epoch: Callable[[int], Tensor | None] | None = None,
        stop: Callable[[Module], bool] | None = None,  # noqa: ARG002 - what it would say is not known yet
        companions: Mapping[str, Stateful] | None = None,
        frozen_norms: bool = False,
        compiled: bool = True,
        lr_flag: str = "--lr",
        unit: Unit = "epoch",
    ) -> Module:
        """Do as `Engine.fit`, for a few steps."""
        whole = Phase(
            self, model, data, rows, loss, recipe, phase, optimizer, frozen_norms, compiled, {}, lr_flag, unit
        )
        whole.limit(epoch_steps, max_steps)
        passes, added, begun = self.seconds.get("passes", 0.0), self._added, time.perf_counter()
        visited = before_epoch(0) if before_epoch else None
        if before_epoch and whole.total_steps > whole.steps_per_epoch:  # before the first there may be less to do
            added, begun = self._added, time.perf_counter()
            before_epoch(1)
        between = time.perf_counter() - begun + self._added - added
        if before_epoch:
            self.seconds["passes"] = passes
        visited = whole.rows_seen if visited is None else visited
        size = min(recipe.batch_size, FEW, len(visited)) if self.device.type == "cpu" else recipe.batch_size
        short = recipe.model_copy(update={"epochs": 1, "batch_size": max(2, size)})
        step, steps = 0.0, 1
        for _ in range(3):  # the first one warms up, the second says how many fit into the time, these count
            begun = time.perf_counter()
            super().fit(
                model, data, loss, short, phase=phase, rows=visited[: steps * short.batch_size], optimizer=optimizer,
                epoch_steps=steps, max_steps=steps, companions=companions, frozen_norms=frozen_norms, compiled=compiled,
                lr_flag=lr_flag, unit=unit,
            )  # fmt: skip
            step = (time.perf_counter() - begun) / steps
            if step > TIMED_SECONDS:
                break
            steps = max(1, min(int(TIMED_SECONDS / max(step, 1e-6)), len(visited) // short.batch_size))
        images = whole.images(whole.total_steps)
        epochs = whole.total_steps / whole.steps_per_epoch
        self.seconds[phase] = step * images / min(short.batch_size, len(visited)) + between * epochs
        return model.eval()

    def reuse_or_train(
        self,
        folder: Path | None,
        key: str,
        objects: Mapping[str, Stateful],
        what: str,  # noqa: ARG002
        train: Callable[[], object],
    ) -> None:
        """Do as `Engine.reuse_or_train`, but keep nothing and wait for nobody."""
        if folder is None or checkpoints.load(folder, key, objects, lambda _: None) is None:
            train()

    def _map(
        self,
        model: Classifier,
        function: Callable[[Tensor], Tensor],
        images: Tensor,
        progress: Progress = SILENT,
    ) -> Tensor:
        """Answer for a few images, and say the same of all others."""
        few, begun = images[:PASSED], time.perf_counter()
        answers = super()._map(model, function, few, progress)
        spent = time.perf_counter() - begun
        seconds = spent * len(images) / max(1, len(few))
        self.seconds["passes"] = self.seconds.get("passes", 0.0) + seconds
        self._added += seconds - spent
        return answers[torch.arange(len(images)) % max(1, len(few))] if len(images) else answers
