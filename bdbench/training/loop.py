"""The one training loop: a phase with its optimizer, its place in the schedule, its checkpoint."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.errors import TrainingError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import Module, norms_of
from bdbench.seeds import generator, scoped
from bdbench.training import checkpoints
from bdbench.training.augment import augmented, parse_augment
from bdbench.training.recipe import Recipe

if TYPE_CHECKING:
    from bdbench.training.engine import Engine

CHECKPOINT_SECONDS = 10.0

Unit = Literal["epoch", "step"]
"""What a phase is counted in: passes over its images, or steps where its dose is a number of steps."""


class Batch(NamedTuple):
    """What a loss sees: images (B, C, H, W) float in [0, 1], labels (B,), rows (B,) in the data, steps taken before."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    step: int


LossFunction = Callable[[Classifier, Batch], Tensor]
"""From the model in training mode and a batch to the scalar that is minimised."""


def mean_cross_entropy(model: Classifier, batch: Batch) -> Tensor:
    """Return the loss of plain training."""
    return F.cross_entropy(model(batch.images), batch.labels)


def steps_of_pass(images: int, batch_size: int) -> int:
    """Return the steps of a pass over so many images: a last batch of one is left out."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 1)


class Stateful(Protocol):
    """Anything a phase trains beside its model, such as a critic or its optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take a state back."""


class Phase(Generic[Module]):
    """One call of `Engine.fit`: its optimiser, its place in the schedule, its checkpoint."""

    def __init__(
        self,
        engine: Engine,
        model: Module,
        data: ImageDataset,
        rows: Tensor | None,
        loss: Callable[[Module, Batch], Tensor],
        recipe: Recipe,
        name: str,
        optimizer: torch.optim.Optimizer | None,
        frozen_norms: bool,
        compiled: bool,
        companions: dict[str, Stateful],
        lr_flag: str,
        unit: Unit,
    ) -> None:
        self.engine, self.model, self.loss, self.recipe, self.name = engine, model, loss, recipe, name
        self.feed = engine.feed(data)
        self.labels = data.labels.to(engine.device)
        self.rows_seen = torch.arange(len(data)) if rows is None else rows
        self.operations = parse_augment(recipe.augment)
        self.frozen_norms = frozen_norms
        self.lr_flag, self.unit = lr_flag, unit
        self.optimizer = optimizer or recipe.optimizer(model)
        self.state: dict[str, Stateful] = {"model": model, "optimizer": self.optimizer, **companions}
        networks = [part for part in model.modules() if isinstance(part, Classifier)]
        self.compiles = engine.may_compile and compiled and bool(networks)
        self.proven = False
        if self.compiles:
            for network in networks:
                network.features.compile(dynamic=False)  # else an interrupted run might end with other bits
        self.step = 0
        self.stopped = False
        self.is_saved = False
        self.rows: list[dict[str, float | int | str]] = []
        self.saved_at = time.monotonic()

    def limit(self, epoch_steps: int | None, max_steps: int | None) -> None:
        """Settle how many steps an epoch and the phase have."""
        self.steps_per_epoch = epoch_steps or steps_of_pass(len(self.rows_seen), self.recipe.batch_size)
        if len(self.rows_seen) < 2:
            raise TrainingError(f"phase '{self.name}' has {len(self.rows_seen)} images; training needs at least 2")
        self.total_steps = min(self.recipe.epochs * self.steps_per_epoch, max_steps or sys.maxsize)
        self.epoch_images = self.steps_per_epoch * self.recipe.batch_size
        if epoch_steps is None:
            self.epoch_images = min(self.epoch_images, len(self.rows_seen))

    def images(self, steps: int) -> int:
        """Return how many images so many steps see."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.epoch_images + rest * self.recipe.batch_size

    def train(self, before_epoch: Callable[[int], Tensor | None] | None, stop: Callable[[Module], bool] | None) -> None:
        """Take all steps that are left, and save the phase as it goes."""
        self._resume()
        progress = self.engine.progress
        if not self._is_finished():
            progress.start(self.name, self.images(self.total_steps))
            progress.advance(self.images(self.step))
            while not self._is_finished():
                epoch = self.step // self.steps_per_epoch
                self._epoch(epoch, before_epoch(epoch) if before_epoch else None)
                self.stopped = stop is not None and stop(self.model.eval())
                self._save()
            progress.finish()
        self.engine.history.extend(self.rows)

    def _is_finished(self) -> bool:
        return self.stopped or self.step >= self.total_steps

    def _epoch(self, epoch: int, order: Tensor | None) -> None:
        engine, size = self.engine, self.recipe.batch_size
        steps = min(self.steps_per_epoch, self.total_steps - self.step)
        self._training_mode()
        rng = generator(engine.seed, self.name, "epoch", epoch)
        if order is None:
            order = self.rows_seen[torch.randperm(len(self.rows_seen), generator=rng)]
        order = order[: steps * size].to(engine.device)
        total = torch.zeros((), device=engine.device)
        lr, begun = self.recipe.lr_at(epoch), time.perf_counter()
        with scoped(engine.seed, self.name, "global", epoch):
            for index, taken in enumerate(self.feed.batches(order, size)):
                rows = order[index * size : (index + 1) * size]
                images = augmented(taken, self.operations, rng)
                lr = self.recipe.lr_at(epoch + index / self.steps_per_epoch)
                total += self._update(Batch(images, self.labels[rows], rows, self.step + index), lr)
                engine.progress.advance(len(rows))
        self.step += steps
        place = self.step if self.unit == "step" else epoch + 1
        mean = float(total) / steps
        seconds = time.perf_counter() - begun
        if not math.isfinite(mean) or not self._has_finite_weights():
            wrong = f"the loss of phase '{self.name}' is {mean}"
            if math.isfinite(mean):
                wrong = f"weights of phase '{self.name}' are not finite"
            kept = "; the last good checkpoint is kept" if self.is_saved else ""
            raise TrainingError(f"{wrong} in {self.unit} {place}; lower {self.lr_flag} (now {self.recipe.lr}){kept}")
        seen = min(steps * size, len(order))
        self.rows.append({
            "phase": self.name, "epoch": epoch + 1, "loss": mean, "lr": lr,
            "images_per_second": seen / seconds, "seconds": seconds,
            **({"step": self.step} if self.unit == "step" else {}),
        })  # fmt: skip
        engine.progress.advance(0, f"{self.unit} {place} loss {mean:.3f}")

    def _update(self, batch: Batch, lr: float) -> Tensor:
        """Take one step and return its loss, detached, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        whole = len(batch.rows) == self.recipe.batch_size  # compiling for the last batch too would not pay
        loss = self._descend_compiled(batch) if self.compiles and whole else self._descend(batch)
        self.optimizer.step()
        return loss

    def _descend(self, batch: Batch) -> Tensor:
        """Compute the gradients and return the loss, detached."""
        with self.engine.autocast():
            loss = self.loss(self.model, batch)
        loss.backward()
        return loss.detach().float()

    def _descend_compiled(self, batch: Batch) -> Tensor:
        """Do the same with compiled networks; where torch cannot, say why and do as if it had not been tried."""
        before = None if self.proven else _Moment(self.model)
        try:
            with torch.compiler.set_stance("default"):
                loss = self._descend(batch)
        except RuntimeError as error:
            if before is None or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            self.engine.progress.note(f"not compiled: {str(error).strip().splitlines()[0]}")
            self.compiles, self.engine.cannot_compile = False, True
            before.restore()
            self.optimizer.zero_grad(set_to_none=True)
            return self._descend(batch)
        self.proven = self.engine.compiled = True
        return loss

    def _has_finite_weights(self) -> bool:
        """Say whether the last step of an epoch left numbers: its loss was taken before it."""
        return all(bool(weight.isfinite().all()) for weight in self.model.parameters())

    def _training_mode(self) -> None:
        self.model.train()
        if self.frozen_norms:
            for module in norms_of(self.model):
                module.eval()

    def _resume(self) -> None:
        if self.engine.work is None:
            return
        saved = checkpoints.load(self.engine.work, self.name, self.state, self.engine.progress.note)
        if saved is not None:
            self.step, self.stopped, self.rows = saved.step, saved.stopped, saved.rows
            self.is_saved = True

    def _save(self) -> None:
        due = self._is_finished() or time.monotonic() - self.saved_at >= self.engine.checkpoint_seconds
        if self.engine.work is not None and due:
            point = checkpoints.Point(self.step, self.stopped, self.rows)
            checkpoints.save(self.engine.work, self.name, point, self.state)
            self.saved_at = time.monotonic()
            self.is_saved = True


class _Moment:
    """What a step changes before it takes its gradients: global randomness and a module's buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self.buffers = [buffer.clone() for buffer in model.buffers()]

    def restore(self) -> None:
        """Put it back."""
        torch.set_rng_state(self.random[0])
        torch.cuda.set_rng_state_all(self.random[1])
        for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)


def eager(wanted: bool) -> AbstractContextManager[object]:
    """Run what was compiled as it was written, if wanted."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
