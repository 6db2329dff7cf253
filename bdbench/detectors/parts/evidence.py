"""Which class stands out among all: the index of deviations, and how often chance makes one as large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bdbench.detectors.base import ClassEvidence

DRAWS = 20_000
"""Of classes without a backdoor, for the p-value."""
MIN_CLASSES = 5
"""Fewer have no spread to speak of."""


def stand_out(statistics: Tensor, *, positive: bool = False) -> list[ClassEvidence]:
    """Return what speaks for each class, of statistics (K,) of which larger ones are more suspect.

    The index is one-sided: a class that is unusually homogeneous is no target. It is no test by itself: among ten
    classes without a backdoor it is above 2 for a third of all normal draws. So its p-value is that of the largest
    index of K classes, by simulation.

    Args:
        statistics: finite.
        positive: they are positive, and compared by their logarithms.
    """
    values = statistics.double().clamp_min(1e-12).log() if positive else statistics.double()
    index = deviations(values)
    known = len(values) >= MIN_CLASSES
    return [
        ClassEvidence(label, float(statistics[label]), float(index[label]), chance(float(index[label]), len(values)))
        if known
        else ClassEvidence(label, float(statistics[label]), float(index[label]), None)
        for label in range(len(values))
    ]


def deviations(values: Tensor) -> Tensor:
    """Return how many median absolute deviations (times 1.4826) each value (K,) lies above the median, 0 below it.

    A value above a median from which half of the others do not differ at all has the index 10^6.
    """
    median = values.quantile(0.5)
    above = (values - median).clamp_min(0)
    spread = 1.4826 * (values - median).abs().quantile(0.5)
    return torch.where(above > 0, (above / spread.clamp_min(1e-300)).clamp_max(1e6), 0.0)


def chance(index: float, classes: int) -> float:
    """Return how often the largest index of `classes` normal values without a backdoor is at least `index`.

    By simulation, so never below 1 / 20,001.
    """
    beyond = int(np.searchsorted(_largest_indices(classes), index, side="left"))
    return (1 + DRAWS - beyond) / (1 + DRAWS)


@cache
def _largest_indices(classes: int) -> np.ndarray:
    """Return the largest one-sided indices of 20,000 draws of normal values, sorted."""
    drawn = np.random.default_rng(classes).standard_normal((DRAWS, classes))
    median = np.median(drawn, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(drawn - median), axis=1)
    return np.sort((drawn.max(axis=1) - median[:, 0]) / spread)


def flagged(classes: Sequence[ClassEvidence], significance: float) -> list[int]:
    """Return the classes whose p-value is below the significance."""
    return [
        one.label for one in classes if one.p is not None and one.p < significance and math.isfinite(one.deviations)
    ]
