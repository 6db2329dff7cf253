"""A test split for sources that come without one: the same rows on every machine and for every seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import DataError
from bdbench.seeds import generator


class Splits(NamedTuple):
    """Both splits of a source, and what reading them left out, guessed or changed.

    Attributes:
        train, test: the splits.
        remarks: one line each, for the user.
        unreadable: where the images lie that were left out since they cannot be read.
    """

    train: ImageDataset
    test: ImageDataset
    remarks: Sequence[str] = ()
    unreadable: Sequence[str] = ()


def split_dataset(data: ImageDataset, test_fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """Return a training and a test split, stratified by class (see `stratified_split`).

    Raises:
        DataError: no class has the two images that a split needs.
    """
    train_rows, test_rows = stratified_split(data.labels, test_fraction)
    if len(test_rows) == 0:
        raise DataError(f"{len(data)} images cannot be split: no class has two; add images or a test split of its own")
    return data.take(train_rows), data.take(test_rows)


def stratified_split(labels: Tensor, test_fraction: float) -> tuple[Tensor, Tensor]:
    """Choose test rows class by class, by a fixed seed: the choice depends on nothing but the arguments.

    Every class with two samples or more has one in both splits; a single sample goes to training.

    Args:
        labels: (N,) int64.
        test_fraction: in (0, 1), of each class.

    Returns:
        Training rows and test rows, both ascending int64, together 0..N-1.
    """
    rng = generator(0, "datasets", "split")
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        rows = torch.nonzero(labels == label).flatten()
        count = min(max(round(len(rows) * test_fraction), 1), len(rows) - 1)
        is_test[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()
