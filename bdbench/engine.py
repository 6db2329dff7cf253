"""The one training loop: device, precision, memory layout, schedule, resume and progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from pydantic import Field
from torch import Tensor, nn

from bdbench import checkpoints
from bdbench.augment import augmented, parse_augment
from bdbench.data import ImageDataset
from bdbench.devices import memory_for_images, out_of_memory_advice
from bdbench.errors import ArtifactError, TrainingError
from bdbench.feeding import Feed
from bdbench.models.classifier import Classifier
from bdbench.options import Options
from bdbench.progress import Progress, Silent
from bdbench.seeds import generator, scoped

PIXELS_AT_ONCE = {"cpu": 64 * 32 * 32}
"""Pixels in a batch of a pass over the images: on a CPU few, whose memory the allocator keeps for the next batch."""
MANY_PIXELS = 1024 * 32 * 32
"""The same on other devices."""
CHECKPOINT_SECONDS = 10.0


class Recipe(Options):
    """How a network is trained: stochastic gradient descent with momentum, a schedule and an augmentation."""

    epochs: int = Field(12, ge=1, description="Passes over the training set.")
    batch_size: int = Field(128, ge=2, description="Images in a step.")
    lr: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    nesterov: bool = Field(True, description="Nesterov's form of momentum.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay on all weights.")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="How the learning rate falls.")
    milestones: tuple[float, float] = Field((0.2, 0.7), description="Where `step` divides by 10: shares of the epochs.")
    warmup: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    augment: str = Field(
        "auto", description="crop or crop-reflect, flip, cutout, affine (commas), none, or auto: the data set's."
    )

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a point of the schedule.

        Args:
            epoch: 0 at the start, `epochs` at the end; `step` changes between whole epochs only.
        """
        if self.warmup and epoch < self.warmup:
            return self.lr * max(epoch, 1e-3) / self.warmup
        if self.schedule == "cosine":
            done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.schedule == "step":
            # However few epochs there are, the first one has the whole rate.
            drops = [max(1, round(part * self.epochs)) for part in self.milestones]
            return self.lr * 0.1 ** sum(math.floor(epoch) >= drop for drop in drops)
        return self.lr

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimiser for a module."""
        return torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )  # fmt: skip


class Batch(NamedTuple):
    """What a loss sees: images (B, C, H, W) float in [0, 1], labels (B,), rows (B,) in the data, steps taken before."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    step: int


Module = TypeVar("Module", bound=nn.Module)

LossFunction = Callable[[Classifier, Batch], Tensor]
"""From the model in training mode and a batch to the scalar that is minimised."""


def mean_cross_entropy(model: Classifier, batch: Batch) -> Tensor:
    """Return the loss of plain training."""
    return F.cross_entropy(model(batch.images), batch.labels)


class Stateful(Protocol):
    """Anything a phase trains beside its model, such as a critic or its optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take a state back."""


@dataclass
class Engine:
    """Runs networks over images.

    Attributes:
        device: where.
        bf16: compute in bfloat16 where autocast allows; weights stay float32.
        seed: every phase draws from its own streams of it.
        work: folder for checkpoints of unfinished work; None keeps none.
        progress: who is told how far it is.
        history: a row per finished epoch: phase, epoch, loss, lr, images_per_second, seconds.
        checkpoint_seconds: the least time between two checkpoints of one phase.
        image_memory: bytes of training images that may lie on the device, more are streamed; None for what is there.
        compile: let torch compile the networks that are trained; where it cannot, say why and go on without.
        compiled: it did.
        cannot_compile: it could not.
    """

    device: torch.device
    bf16: bool
    seed: int
    work: Path | None = None
    progress: Progress = field(default_factory=Silent)
    history: list[dict[str, float | int | str]] = field(default_factory=list)
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    image_memory: int | None = None
    compile: bool = False
    compiled: bool = field(default=False, init=False)
    cannot_compile: bool = field(default=False, init=False)
    _fed: Feed | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.compile:  # torch compiles for a few sizes of batches only: those of earlier runs shall not count
            torch.compiler.reset()

    @property
    def may_compile(self) -> bool:
        """Networks that are trained are compiled, as far as is known."""
        return self.compile and not self.cannot_compile

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
        stop: Callable[[Module], bool] | None = None,
        companions: Mapping[str, Stateful] | None = None,
        frozen_norms: bool = False,
        lr_flag: str = "--lr",
    ) -> Module:
        """Train a module in place and return it, in evaluation mode.

        The result depends on the arguments and the engine's seed only: an interrupted phase goes on from its last
        checkpoint and, on a CPU, ends bit-equal to an uninterrupted one.

        Args:
            model: a classifier, or whatever else has parameters; moved to the engine's device.
            data: N images; a last batch of one image is left out (batch norm needs two).
            loss: called once a step; see `LossFunction`.
            recipe: with `augment` other than "auto".
            phase: names the streams, the checkpoint and the rows of the history; once per engine.
            rows: (M,) int64, what to train on; default: all of the data.
            optimizer: takes the steps, at the recipe's learning rate, and goes on from the state it is in; default: the
                recipe's own, fresh.
            epoch_steps: steps in an epoch; default: a pass over the data.
            max_steps: end after this many steps, even inside an epoch.
            before_epoch: called with the number of each epoch, from 0; may return the rows (epoch_steps * batch_size,)
                to visit, in order. Default: every one of `rows` once, shuffled.
            stop: asked after every epoch, with the model in evaluation mode; True ends the phase.
            companions: objects whose state belongs to the phase.
            frozen_norms: keep batch-norm statistics as they are and use them instead of the batch's own.
            lr_flag: what sets the recipe's learning rate, for the message of an error.

        Raises:
            TrainingError: the loss is not finite; the last good checkpoint, if there is one, is kept.
            DeviceError: out of memory.
            OptionError: the images have to be streamed, and `image_memory` cannot hold their batches.
            ArtifactError: the file of the images changed meanwhile.
        """
        advice = out_of_memory_advice("--batch-size (or the phase's own), or --image-memory")
        with advice, _eager(self.compile):  # but for the steps of a phase that trains a network
            model.to(self.device).to(memory_format=torch.channels_last)
            run = _Phase(
                self, model, data, rows, loss, recipe, phase, optimizer, frozen_norms, dict(companions or {}), lr_flag
            )
            run.limit(epoch_steps, max_steps)
            run.train(before_epoch, stop)
        return model.eval()

    def feed(self, data: ImageDataset) -> Feed:
        """Return the images of a data set, ready to be taken in batches on the engine's device.

        Asked for the same data set again, it is the same feed: the images lie on the device once.
        """
        if self._fed is None or self._fed.data is not data:
            limit = memory_for_images(self.device) if self.image_memory is None else self.image_memory
            self._fed = Feed(data, self.device, limit)
        return self._fed

    def reuse_or_train(
        self, folder: Path | None, key: str, objects: Mapping[str, Stateful], what: str, train: Callable[[], object]
    ) -> None:
        """Fill objects with the state that a cache keeps of them under `key`; else train them and keep it.

        Args:
            folder: of the cache; None keeps nothing.
            key: a hash of all that determines the result.
            objects: what is filled or trained.
            what: what to call it in notes, such as "features".
            train: changes the objects; its rows of the history are kept with them.
        """
        if folder is None:
            train()
            return
        with self._alone(folder / f"{key}.lock", what):
            point = checkpoints.load(folder, key, objects)
            if point is not None:
                self.progress.note(f"{what}: from the cache ({key[:16]})")
                self.history.extend(point.rows)
                return
            before, compiles = len(self.history), self.may_compile
            train()
            if self.may_compile != compiles:
                self.progress.note(f"{what}: not kept for other runs (not compiled)")
                return
            try:
                done = checkpoints.Point(0, stopped=True, rows=self.history[before:])
                checkpoints.save(folder, key, done, objects)
            except ArtifactError as error:
                self.progress.note(f"{what}: not kept for other runs ({error})")

    @contextmanager
    def _alone(self, file: Path, what: str) -> Iterator[None]:
        """Hold the lock of what is cached, so that two runs do not train it at once; go without where there is none."""
        lock = FileLock(file)
        with suppress(OSError, NotImplementedError):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.progress.note(f"{what}: another run trains the same; waiting for it")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def logits(self, model: Classifier, images: Tensor) -> Tensor:
        """Return the logits (N, K) float32, on the CPU, of uint8 images (N, C, H, W), unaugmented."""
        return self._map(model, model, images)

    def embeddings(self, model: Classifier, images: Tensor) -> Tensor:
        """Return the embeddings (N, D) float32, on the CPU, of uint8 images (N, C, H, W); see `logits`."""
        return self._map(model, model.embed, images)

    def losses(self, model: Classifier, data: ImageDataset) -> Tensor:
        """Return the cross entropy of every sample, (N,) float32 on the CPU, unaugmented, in one batched pass.

        Raises:
            ArtifactError: the file of the images changed since it was opened.
        """
        if data.file is not None:
            data.file.check()
        return F.cross_entropy(self.logits(model, data.images), data.labels, reduction="none")

    def _map(self, model: Classifier, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        pixels = PIXELS_AT_ONCE.get(self.device.type, MANY_PIXELS)
        size = max(1, pixels // (images.shape[2] * images.shape[3]))
        answers = torch.empty(0)
        with out_of_memory_advice("the load of the device, or use --device cpu"):
            model.to(self.device).to(memory_format=torch.channels_last).eval()
            # compiling for a pass over the images does not pay
            with torch.inference_mode(), _eager(self.compile), self.autocast():
                for index, chunk in enumerate(images.split(size)):
                    found = function(chunk.to(self.device).to(torch.float32, copy=True).div_(255))
                    if not index:  # one piece of memory: small ones between a batch's large ones would scatter them
                        answers = found.new_empty((len(images), *found.shape[1:]))
                    answers[index * size :][: len(found)] = found
        return answers.cpu()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the engine's precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield


class _Phase(Generic[Module]):
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
        companions: dict[str, Stateful],
        lr_flag: str,
    ) -> None:
        self.engine, self.model, self.loss, self.recipe, self.name = engine, model, loss, recipe, name
        self.feed = engine.feed(data)
        self.labels = data.labels.to(engine.device)
        self.rows_seen = torch.arange(len(data)) if rows is None else rows
        self.operations = parse_augment(recipe.augment)
        self.frozen_norms = frozen_norms
        self.lr_flag = lr_flag
        self.optimizer = optimizer or recipe.optimizer(model)
        self.state: dict[str, Stateful] = {"model": model, "optimizer": self.optimizer, **companions}
        networks = [part for part in model.modules() if isinstance(part, Classifier)]
        self.compiles = engine.may_compile and bool(networks)
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
        whole, rest = divmod(len(self.rows_seen), self.recipe.batch_size)
        self.steps_per_epoch = epoch_steps or whole + (rest > 1)
        if len(self.rows_seen) < 2:
            raise TrainingError(f"phase '{self.name}' has {len(self.rows_seen)} images; training needs at least 2")
        self.total_steps = min(self.recipe.epochs * self.steps_per_epoch, max_steps or sys.maxsize)
        self.epoch_images = self.steps_per_epoch * self.recipe.batch_size
        if epoch_steps is None:
            self.epoch_images = min(self.epoch_images, len(self.rows_seen))

    def _images(self, steps: int) -> int:
        """Return how many images so many steps see."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.epoch_images + rest * self.recipe.batch_size

    def train(self, before_epoch: Callable[[int], Tensor | None] | None, stop: Callable[[Module], bool] | None) -> None:
        self._resume()
        progress = self.engine.progress
        if not self._is_finished():
            progress.start(self.name, self._images(self.total_steps))
            progress.advance(self._images(self.step))
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
        mean = float(total) / steps
        seconds = time.perf_counter() - begun
        if not math.isfinite(mean) or not self._has_finite_weights():
            wrong = f"the loss of phase '{self.name}' is {mean}"
            if math.isfinite(mean):
                wrong = f"weights of phase '{self.name}' are not finite"
            kept = "; the last good checkpoint is kept" if self.is_saved else ""
            raise TrainingError(f"{wrong} in epoch {epoch + 1}; lower {self.lr_flag} (now {self.recipe.lr}){kept}")
        seen = min(steps * size, len(order))
        self.rows.append({
            "phase": self.name, "epoch": epoch + 1, "loss": mean, "lr": lr,
            "images_per_second": seen / seconds, "seconds": seconds,
        })  # fmt: skip
        engine.progress.advance(0, f"epoch {epoch + 1} loss {mean:.3f}")

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
        saved = checkpoints.load(self.engine.work, self.name, self.state)
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


def _eager(wanted: bool) -> AbstractContextManager[object]:
    """Run what was compiled as it was written, if wanted."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()


BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms of a module."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def frozen(module: Module) -> Module:
    """Return the module in evaluation mode, its parameters without gradients."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
