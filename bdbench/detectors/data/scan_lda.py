"""SCAn: a class with poison is better explained by two means than by one, within the variation of clean classes."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bdbench.detectors.base import DatasetDetector, Family, Scanned, Sight
from bdbench.detectors.parts.evidence import stand_out

ROUNDS, CLOSE = 100, 1e-5


class ScanLda(DatasetDetector):
    """Tests for each class whether two means explain its features better than one, by an untangled variation model.

    A feature is the mean of its class plus a variation that all classes share; both covariances are estimated on
    trusted images by expectation-maximisation. Each class is split in two with the metric of the variation; the gain
    in likelihood over one mean speaks for a class. The group with fewer trusted images for its size is the suspect one:
    not the smaller one, since a tenth of a set that is poisoned is half of its target class. A sample's score is its
    own gain on that side, weighed by how far its class stands out: any class can be split in two somehow.

    Paper: Tang et al., Demon in the Variant, USENIX Security 2021, https://arxiv.org/abs/1908.00686.

    All published codes compute the one mean with the covariances exchanged, so that the null model does not fit a
    clean class either: `--null-mean published`. They flag a class that is unusually homogeneous too; here only one
    that is unusually divided. Their clean images are chosen by the truth, or are test images; here they are trusted
    ones.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1908.00686"
    threat: ClassVar[str] = "the defender has the training set, a model that learned it, and a few trusted clean images"
    family: ClassVar[Family] = "representation"
    needs_suspect: ClassVar[bool] = True
    needs_trusted: ClassVar[bool] = True

    dims: int = Field(64, ge=1, le=1000, description="Main dimensions of the features that are kept, at most.")
    null_mean: Literal["right", "published"] = Field("right", description="How the one mean of a class is computed.")
    weight: Literal["evidence", "none"] = Field(
        "evidence", description="Weigh a sample's gain by how far its class stands out, or not at all."
    )

    def run(self, sight: Sight) -> Scanned:
        """Fit the variation on trusted images, then test each class."""
        clean = sight.known_reference
        known = sight.reference_features.double()
        seen = sight.features.double()
        kept = min(self.dims, seen.shape[1], max(1, len(known) // 4))
        centre = seen.mean(0)
        main = torch.linalg.eigh((seen - centre).T @ (seen - centre)).eigenvectors[:, -kept:]
        known, seen = (known - centre) @ main, (seen - centre) @ main
        spread = variation(known - known.mean(0), clean.labels)
        scores = torch.zeros(len(seen), dtype=torch.float64)
        gains = torch.zeros(clean.num_classes, dtype=torch.float64)
        for label in range(clean.num_classes):
            rows = torch.nonzero(sight.data.labels == label).flatten()
            if len(rows) < 4:
                continue
            own = seen[rows] - known.mean(0)
            null = one_mean(own, spread, published=self.null_mean == "published")
            groups = two_means(own, spread.within)
            nearer = _nearer(own, groups, spread.within)
            gains[label] = (squared(own - null, spread.within) - nearer.amin(1)).mean()
            trusted = _nearer(known[clean.labels == label] - known.mean(0), groups, spread.within)
            suspect = less_trusted(nearer.argmin(1), trusted.argmin(1))
            scores[rows] = nearer[:, 1 - suspect] - nearer[:, suspect]
        classes = stand_out(gains.clamp_min(0), positive=True)
        if self.weight == "evidence":
            scores *= torch.tensor([one.deviations for one in classes], dtype=torch.float64)[sight.data.labels]
        return Scanned(scores.float(), classes=classes)


class Variation(NamedTuple):
    """Covariances (d, d) of class means, and within classes."""

    between: Tensor
    within: Tensor


def variation(features: Tensor, labels: Tensor) -> Variation:
    """Return the covariances of a mean per class plus a shared variation, by expectation-maximisation.

    Args:
        features: (m, d) float64, minus their mean.
        labels: (m,).
    """
    present = labels.unique()
    means = torch.stack([features[labels == label].mean(0) for label in present])
    counts = torch.stack([(labels == label).sum() for label in present])
    place = torch.searchsorted(present, labels)
    mu = means
    found = Variation(covariance(mu[place]), covariance(features - mu[place]))
    for _ in range(ROUNDS):
        mu = torch.stack([_posterior(found, total, int(n)) for total, n in zip(means, counts, strict=True)])
        new = Variation(covariance(mu[place]), covariance(features - mu[place]))
        moved = (new.between - found.between).norm() + (new.within - found.within).norm()
        found = new
        if moved < CLOSE * (1 + found.within.norm()):
            break
    return found


def one_mean(own: Tensor, spread: Variation, *, published: bool) -> Tensor:
    """Return the mean (d,) of a class under the model: S_u (n S_u + S_e)^-1 times the sum of its features.

    Args:
        own: (n, d).
        spread: the covariances.
        published: with S_e in the place of the first S_u, as the published codes have it.
    """
    if not published:
        return _posterior(spread, own.mean(0), len(own))
    mean: Tensor = spread.within @ torch.linalg.solve(len(own) * spread.between + spread.within, own.sum(0))
    return mean


def two_means(own: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (d,) of two groups of a class's features (n, d), split by the metric of the variation.

    It begins with what lies far out along the main direction, and the rest.
    """
    white = own @ torch.linalg.cholesky(torch.linalg.inv(within))
    main = torch.linalg.eigh((white - white.mean(0)).T @ (white - white.mean(0))).eigenvectors[:, -1]
    along = (white - white.mean(0)) @ main
    cut = along.abs().max() / 2 * (1.0 if along.max() >= -along.min() else -1.0)
    side = along > cut if cut > 0 else along < cut
    for _ in range(ROUNDS):
        if not bool(side.any()) or bool(side.all()):
            return own.mean(0), own.mean(0)
        first, second = white[side].mean(0), white[~side].mean(0)
        new = (white - first).square().sum(1) < (white - second).square().sum(1)
        if bool((new == side).all()):
            break
        side = new
    if not bool(side.any()) or bool(side.all()):
        return own.mean(0), own.mean(0)
    return own[side].mean(0), own[~side].mean(0)


def less_trusted(groups: Tensor, trusted: Tensor) -> int:
    """Return which of two groups, 0 or 1, has fewer trusted samples for its size; without any, the smaller one.

    Args:
        groups: (n,) of 0 and 1, the group of each sample of a class.
        trusted: (m,), that of each trusted one.
    """
    sizes = torch.bincount(groups, minlength=2).double()
    if not len(trusted):
        return int(sizes.argmin())
    return int((torch.bincount(trusted, minlength=2) / sizes.clamp_min(1)).argmin())


def _nearer(own: Tensor, groups: tuple[Tensor, Tensor], within: Tensor) -> Tensor:
    """Return the squared distances (n, 2) of features (n, d) from two means."""
    return torch.stack([squared(own - mean, within) for mean in groups], 1)


def squared(differences: Tensor, within: Tensor) -> Tensor:
    """Return the squared lengths (n,) of differences (n, d) in the metric of the variation."""
    lengths: Tensor = (differences * torch.linalg.solve(within, differences.T).T).sum(1)
    return lengths


def covariance(values: Tensor) -> Tensor:
    """Return the second moment (d, d) of values (n, d) without a mean, shrunk a little towards a sphere."""
    moment = values.T @ values / len(values)
    size = moment.diagonal().mean().clamp_min(1e-12)
    return moment * 0.999 + 0.001 * size * torch.eye(len(moment), dtype=moment.dtype)


def _posterior(spread: Variation, mean: Tensor, count: int) -> Tensor:
    found: Tensor = spread.between @ torch.linalg.solve(count * spread.between + spread.within, count * mean)
    return found
