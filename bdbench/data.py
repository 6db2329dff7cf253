"""Images with labels, checked once: what sources give, attacks change and defenses see."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from bdbench.errors import ArtifactError, DataError

MIN_SIDE = 8


class MappedFile(NamedTuple):
    """A file that images are mapped from, as it was when it was opened."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at a file."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Look again.

        Raises:
            ArtifactError: it is gone, or not as it was.
        """
        try:
            same = MappedFile.of(self.path) == self
        except OSError:
            same = False
        if not same:
            raise ArtifactError(
                f"{self.path} changed or went while it was in use; put it back as it was, or make the artifact again, "
                "and run the same command again"
            )


class Role(IntEnum):
    """What a training sample really is, as `truth.parquet` says; no defense sees it, only reference rows do."""

    CLEAN = 0
    POISON = 1
    COVER = 2
    """Triggered, but truthfully labelled."""


@dataclass(frozen=True)
class ImageDataset:
    """Images and their labels.

    Attributes:
        images: (N, C, H, W) uint8 with C of 1 or 3 and H, W of at least 8.
        labels: (N,) int64 in [0, K).
        class_names: K names.
        file: what the images are mapped from, if they are.

    Raises:
        DataError: at construction, if a shape, a type or a label does not fit.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    file: MappedFile | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"images must be (N, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        if images.shape[1] not in (1, 3):
            raise DataError(f"images must have 1 or 3 channels, got {images.shape[1]}")
        if min(images.shape[2:]) < MIN_SIDE:
            raise DataError(
                f"images must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got {images.shape[2]}x{images.shape[3]}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"labels must be ({len(images)},) int64, got {tuple(labels.shape)} {labels.dtype}")
        if len(self.class_names) < 2:
            raise DataError(f"a classifier needs at least 2 classes, got {len(self.class_names)}")
        outside = labels[(labels < 0) | (labels >= len(self.class_names))]
        if len(outside):
            raise DataError(f"label {int(outside[0])} is outside 0..{len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, rows: Tensor) -> ImageDataset:
        """Return the samples at `rows`, an (M,) int64 index or an (N,) bool mask, as a new dataset."""
        rows = torch.nonzero(rows).flatten() if rows.dtype == torch.bool else rows
        return ImageDataset(self.images.index_select(0, rows), self.labels[rows], self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels, labels and class names: equal content, equal fingerprint."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        digest.update(np.ascontiguousarray(self.images.numpy()).data)
        digest.update(np.ascontiguousarray(self.labels.numpy()).data)
        return digest.hexdigest()


def joined(one: ImageDataset, other: ImageDataset) -> ImageDataset:
    """Return the samples of one dataset and, behind them, those of another one of the same classes and image shape."""
    return ImageDataset(torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels]), one.class_names)


@dataclass(frozen=True)
class SourceData:
    """A source as it comes, before any attack: both splits, and how its images may be augmented.

    Attributes:
        name: short name for tables and folder names.
        train, test: the splits; same classes and image shape.
        augment: what `--augment auto` means for these images, such as ``"crop,flip"`` (see `bdbench.training.augment`).
        remarks: what was left out, guessed or changed, one line each.
        unreadable: where the images lie that were left out since they cannot be read.
    """

    name: str
    train: ImageDataset
    test: ImageDataset
    augment: str
    remarks: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.class_names != self.test.class_names or self.train.image_shape != self.test.image_shape:
            raise DataError(f"{self.name}: training and test split differ in classes or image shape")
        present = torch.unique(self.train.labels)
        if len(present) < 2:
            raise DataError(f"{self.name}: the training split has one class only; a backdoor needs at least 2")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both splits; the name and the augmentation play no part."""
        return hashlib.sha256(f"{self.train.fingerprint}{self.test.fingerprint}".encode()).hexdigest()


@dataclass(frozen=True)
class PoisonedDataset:
    """A poisoned training split with its truth, and the test images that judge a model trained on it.

    Attributes:
        visible: N training samples as a defender sees them.
        clean_labels: (N,) int64, the labels before poisoning.
        roles: (N,) uint8 of `Role`.
        source_rows: (N,) int64, rows in the source's training split.
        originals: (P, C, H, W) uint8, the samples that are not of `Role.CLEAN` as they were, in their order.
        test: clean test images, all of them.
        triggered: M triggered test images of the attack's eligible classes, labelled with what the attacker wants.
        triggered_rows: (M,) int64, rows in `test`: their true labels and clean images are found there.
        trusted: clean images reserved from the training split, disjoint from `visible`; may be empty.
        trigger_state: tensors from which the attack can trigger new images.
        victim: the attacker's own classifier, of an attack that controls training; else None.
    """

    visible: ImageDataset
    clean_labels: Tensor
    roles: Tensor
    source_rows: Tensor
    originals: Tensor
    test: ImageDataset
    triggered: ImageDataset
    triggered_rows: Tensor
    trusted: ImageDataset
    trigger_state: dict[str, Tensor]
    victim: nn.Module | None = None
