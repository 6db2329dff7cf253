"""Runs networks over images: where, in which precision, from which memory; `loop` has the training loop itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import ArtifactError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import Module
from bdbench.progress import Progress, Silent
from bdbench.training import checkpoints
from bdbench.training.devices import memory_for_images, out_of_memory_advice
from bdbench.training.feeding import Feed
from bdbench.training.loop import CHECKPOINT_SECONDS, Batch, Phase, Stateful, Unit, eager
from bdbench.training.recipe import Recipe

SILENT = Silent()
PIXELS_AT_ONCE = {"cpu": 64 * 32 * 32}
"""Pixels in a batch of a pass over the images: on a CPU few, whose memory the allocator keeps for the next batch."""
MANY_PIXELS = 1024 * 32 * 32
"""The same on other devices."""


@dataclass
class Engine:
    """Runs networks over images.

    Attributes:
        device: where.
        bf16: compute in bfloat16 where autocast allows; weights stay float32.
        seed: every phase draws from its own streams of it.
        work: folder for checkpoints of unfinished work; None keeps none.
        progress: who is told how far it is.
        history: a row per finished epoch: phase, epoch, loss, lr, images_per_second, seconds; of a phase that is
            counted in steps also step, the steps taken by then.
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
    def trained_seconds(self) -> float:
        """Seconds of all epochs, those before an interruption too."""
        return round(sum(float(row["seconds"]) for row in self.history), 3)

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
        compiled: bool = True,
        lr_flag: str = "--lr",
        unit: Unit = "epoch",
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
            compiled: let the engine compile the network if it compiles; not for a loss that replaces parameters of the
                network, hooks it or differentiates twice.
            lr_flag: what sets the recipe's learning rate, for the message of an error.
            unit: what progress, messages and reports count the phase in; "step" where its dose is `max_steps`.

        Raises:
            TrainingError: the loss is not finite; the last good checkpoint, if there is one, is kept.
            DeviceError: out of memory.
            OptionError: the images have to be streamed, and `image_memory` cannot hold their batches.
            ArtifactError: the file of the images changed meanwhile.
        """
        advice = out_of_memory_advice("--batch-size (or the phase's own), or --image-memory")
        with advice, eager(self.compile):  # but for the steps of a phase that trains a network
            model.to(self.device).to(memory_format=torch.channels_last)
            run = Phase(
                self, model, data, rows, loss, recipe, phase, optimizer, frozen_norms, compiled,
                dict(companions or {}), lr_flag, unit,
            )  # fmt: skip
            run.limit(epoch_steps, max_steps)
            run.train(before_epoch, stop)
        return model.eval()

    def feed(self, data: ImageDataset) -> Feed:
        """Return the images of a dataset, ready to be taken in batches on the engine's device.

        Asked for the same dataset again, it is the same feed: the images lie on the device once.
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
            checkpoints.remove_unfinished(folder, key)
            point = checkpoints.load(folder, key, objects, self.progress.note)
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

    def logits(self, model: Classifier, images: Tensor, label: str = "") -> Tensor:
        """Return the logits (N, K) float32, on the CPU, of uint8 images (N, C, H, W), unaugmented.

        `label` names a bar of progress; without one nobody is told.
        """
        progress = self.progress if label else SILENT
        progress.start(label, len(images))
        found = self._map(model, model, images, progress)
        progress.finish()
        return found

    def embeddings(self, model: Classifier, images: Tensor) -> Tensor:
        """Return the embeddings (N, D) float32, on the CPU, of uint8 images (N, C, H, W); see `logits`."""
        return self._map(model, model.embed, images)

    def losses(self, model: Classifier, data: ImageDataset) -> Tensor:
        """Return the cross entropy of every sample, (N,) float32 on the CPU, unaugmented, in one batched pass.

        Raises:
            ArtifactError: the file of the images changed since it was opened.
        """
        return F.cross_entropy(self._checked_logits(model, data), data.labels, reduction="none")

    def margins(self, model: Classifier, data: ImageDataset) -> Tensor:
        """Return for every sample by how much the other classes exceed its label, (N,) float32 on the CPU.

        The log-sum-exp of the other classes' logits minus the label's. The cross entropy is its softplus, so both rank
        alike; but wherever a model is sure the cross entropy is exactly 0, and this still tells such samples apart.

        Raises:
            ArtifactError: see `losses`.
        """
        return others_over_own(self._checked_logits(model, data), data.labels)

    def _checked_logits(self, model: Classifier, data: ImageDataset) -> Tensor:
        if data.file is not None:
            data.file.check()
        return self.logits(model, data.images)

    def _map(
        self,
        model: Classifier,
        function: Callable[[Tensor], Tensor],
        images: Tensor,
        progress: Progress = SILENT,
    ) -> Tensor:
        pixels = PIXELS_AT_ONCE.get(self.device.type, MANY_PIXELS)
        size = max(1, pixels // (images.shape[2] * images.shape[3]))
        answers = torch.empty(0)
        with out_of_memory_advice("the load of the device, or use --device cpu"):
            model.to(self.device).to(memory_format=torch.channels_last).eval()
            # compiling for a pass over the images does not pay
            with torch.inference_mode(), eager(self.compile), self.autocast():
                for index, chunk in enumerate(images.split(size)):
                    found = function(chunk.to(self.device).to(torch.float32, copy=True).div_(255))
                    if not index:  # one piece of memory: small ones between a batch's large ones would scatter them
                        answers = found.new_empty((len(images), *found.shape[1:]))
                    answers[index * size :][: len(found)] = found
                    progress.advance(len(found))
        return answers.cpu()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the engine's precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            yield


def others_over_own(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-sum-exp of the other classes' logits minus the label's, (N,), of logits (N, K)."""
    own = labels[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)
