"""Spectral signatures: poisoned samples lie far out along the main direction of their class."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.detectors.base import DatasetDetector, Family, Scanned, Sight
from bdbench.detectors.parts.by_class import Across, classes_of, scaled
from bdbench.detectors.parts.evidence import stand_out


class Spectral(DatasetDetector):
    """Scores each sample by how far its features lie from the mean of its class along the class's main direction.

    The main direction is the first right singular vector of the centred features of a class, the score the squared
    projection on it, in units of the class's median. What speaks for a class is the ratio of its first two
    eigenvalues.

    Paper: Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018, https://arxiv.org/abs/1811.00636.

    Five published codes take the direction of centred features and then project the features as they are, so that
    the class mean is added to every projection and its two sides are folded together: `--no-centre`. They remove a
    fixed share of every class, of a clean one too; that is `--decide budget:SHARE` here, and never the default.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1811.00636"
    threat: ClassVar[str] = "the defender has the training set and a model that learned it"
    family: ClassVar[Family] = "representation"
    needs_suspect: ClassVar[bool] = True

    centre: bool = Field(True, description="Project centred features; off: the published codes' form.")
    dims: int = Field(1, ge=1, le=1000, description="Main directions whose squared projections are added.")
    across: Across = Field("scaled", description="Compare classes by scores in units of their median, or as they are.")

    def run(self, sight: Sight) -> Scanned:
        """Score the samples, class by class."""
        scores = torch.zeros(len(sight.data), dtype=torch.float64)
        ratios = torch.ones(sight.data.num_classes, dtype=torch.float64)
        for label, rows, own in classes_of(sight.features, sight.data.labels, sight.data.num_classes):
            mean = torch.zeros(own.shape[1], dtype=torch.float64)
            if not self.centre:
                raw = sight.features[rows].double()
                mean = raw.mean(0)[(raw - raw.mean(0)).abs().amax(0) > 1e-9]
            projected, spectrum = projections(own, self.dims, mean)
            scores[rows] = scaled(projected, self.across)
            if len(spectrum) > 1 and spectrum[1] > 0:
                ratios[label] = spectrum[0] / spectrum[1]
        return Scanned(scores.float(), classes=stand_out(ratios, positive=True))


def projections(centred: Tensor, dims: int, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared projections (n,) on the first main directions, and all eigenvalues, the largest first.

    Args:
        centred: (n, d) float64, minus their mean.
        dims: how many directions.
        mean: (d,), what is added before the projection: zero, or the class mean.
    """
    if not centred.shape[1]:
        return torch.zeros(len(centred), dtype=torch.float64), torch.zeros(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    main = vectors[:, -dims:]
    return ((centred + mean) @ main).square().sum(1), values.flip(0).clamp_min(0)
