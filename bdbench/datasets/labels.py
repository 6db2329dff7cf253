"""Labels from a file, checked before they name a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bdbench.errors import DataError

MAX_CLASSES = 100_000
"""Above it a label is taken for damage, not for a class."""


def check_labels(labels: np.ndarray, where: str, class_names: Sequence[str] | None) -> Tensor:
    """Return integer labels as (N,) int64.

    Args:
        labels: (N,) or (N, 1), any integer type.
        where: the file, for messages.
        class_names: K names, or None where the source names no classes.

    Raises:
        DataError: a label is no integer, negative, or not below K.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels must be (N,) integers, one class per image, got {labels.shape} {labels.dtype}"
        )
    limit = MAX_CLASSES if class_names is None else len(class_names)
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
