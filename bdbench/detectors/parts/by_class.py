"""Features of one class at a time, and scores of different classes made comparable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Across = Literal["scaled", "raw"]
"""How scores of different classes compare: in units of their class's median score, or as they are."""


def classes_of(features: Tensor, labels: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give label, rows (n,) and features (n, d) float64 minus their mean of each class that has two rows or more.

    Features that do not vary in the class are left out.

    Args:
        features: (N, D) float32.
        labels: (N,) int64 in [0, count).
        count: of classes.
    """
    for label in range(count):
        rows = torch.nonzero(labels == label).flatten()
        if len(rows) < 2:
            continue
        own = features[rows].double()
        own -= own.mean(0)
        yield label, rows, own[:, own.abs().amax(0) > 1e-9]


def scaled(values: Tensor, across: Across) -> Tensor:
    """Return scores (n,) of one class, not negative, so that they compare with those of others; see `Across`."""
    middle = values.median() if len(values) else torch.tensor(0.0)
    return values / middle if across == "scaled" and middle > 0 else values
