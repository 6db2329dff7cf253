"""Labels from a file, checked before they name a class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from bdbench.errors import DataError
from bdbench.limits import CLASSES
from bdbench.text import printable

YES_NO = ("false", "true")


def class_names_of(training: Sequence[np.ndarray]) -> tuple[str, ...] | None:
    """Return the names that labels themselves give: of text in order, by value where all are numbers; else None."""
    if training[0].dtype == np.bool_ and not _is_one_hot(training[0]):
        return YES_NO
    if training[0].dtype.kind not in "UO":
        return None
    names = {printable(str(name)) for labels in training for name in labels.ravel().tolist()}
    return tuple(sorted(names, key=lambda name: (int(name), name)) if _all_numbers(names) else sorted(names))


def _all_numbers(names: Iterable[str]) -> bool:
    return all(name.isdecimal() for name in names)


def integer_labels(labels: np.ndarray, where: str, class_names: Sequence[str] | None) -> Tensor:
    """Return labels as (N,) int64: integers, text or true/false of `class_names`, or one-hot rows.

    Args:
        labels: (N,) or (N, 1); one-hot (N, K) with a single 1 in each row.
        where: the file, for messages.
        class_names: from `class_names_of` or the source's own; None where classes have no names.

    Raises:
        DataError: see `check_labels`; a name that is not in `class_names`; a row with no 1 or several.
    """
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if _is_one_hot(labels):
        labels = _hottest(labels, where)
    elif labels.dtype == np.bool_:
        labels = labels.astype(np.int64)
    elif labels.dtype.kind in "UO" and class_names is not None:
        numbers = {name: number for number, name in enumerate(class_names)}
        found = [numbers.get(printable(str(name)), -1) for name in labels.tolist()]
        if -1 in found:
            row = found.index(-1)
            raise DataError(
                f"{where}, row {row}: the training split has no class '{labels[row]}'; add it or remove this"
            )
        labels = np.array(found, np.int64)
    return check_labels(labels, where, class_names)


def _is_one_hot(labels: np.ndarray) -> bool:
    return labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "iufb"


def _hottest(labels: np.ndarray, where: str) -> np.ndarray:
    """Return the column of the 1 in each row (N, K)."""
    wrong = np.flatnonzero(((labels != 0) & (labels != 1)).any(1) | ((labels == 1).sum(1) != 1))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {row}: a one-hot row has a single 1, this one has {int((labels[row] == 1).sum())}; "
            "one class per image is needed"
        )
    return np.asarray(labels.argmax(1))


def remark_on(labels: np.ndarray) -> tuple[str, ...]:
    """Say so where labels were not integers."""
    if _is_one_hot(labels):
        return (f"labels are one-hot, of {labels.shape[1]:,} classes",)
    if labels.dtype == np.bool_:
        return ("labels are false and true, taken as classes 0 and 1",)
    return ("labels are text, numbered in its order",) if labels.dtype.kind in "UO" else ()


def check_labels(labels: np.ndarray, where: str, class_names: Sequence[str] | None) -> Tensor:
    """Return integer labels as (N,) int64.

    Args:
        labels: (N,), any integer type.
        where: the file, for messages.
        class_names: K names, or None where the source names no classes.

    Raises:
        DataError: a label is no integer, negative, or not below K.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels must be (N,) integers, one class per image, got {labels.shape} {labels.dtype}"
        )
    limit = CLASSES if class_names is None else len(class_names)
    outside = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where}, row {row}: label {labels[row]} is outside 0..{limit - 1}; "
            "correct the labels or remove these rows"
        )
    return torch.from_numpy(labels.astype(np.int64))


def numbered_names(*labels: Tensor) -> tuple[str, ...]:
    """Name classes "0".."K-1" where a source has no names: K is the highest label of all splits plus 1."""
    highest = max((int(split.max()) for split in labels if len(split)), default=-1)
    return tuple(str(label) for label in range(highest + 1))
