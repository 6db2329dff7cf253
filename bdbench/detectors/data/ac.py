"""Activation clustering: the features of a poisoned class fall into a large and a small cluster."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bdbench.detectors.base import DatasetDetector, Family, Scanned, Sight
from bdbench.detectors.parts.by_class import classes_of
from bdbench.detectors.parts.evidence import stand_out
from bdbench.seeds import generator

MEASURED = 2000
"""Samples of a class over which the silhouette is taken, which costs their square."""


class ActivationClustering(DatasetDetector):
    """Splits the features of each class into two clusters, and scores how far a sample lies on the smaller one's side.

    The features of a class are reduced to a few dimensions and split by 2-means. The score is the place between the two
    centres, from -1 to 1, times how clear the split is (its mean silhouette) and how unequal (1 - 2r, r the smaller
    one's share). What speaks for a class is the product of the last two. The method's own rule takes the smaller
    cluster of a class with r below `max_share` and a silhouette above `silhouette`.

    Paper: Chen et al., Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering, 2018,
    https://arxiv.org/abs/1811.03728.

    Published codes flag the smaller cluster of every class, or compare classes that each were projected by their own
    directions; not here. `--reducer ica` is the paper's.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1811.03728"
    threat: ClassVar[str] = "the defender has the training set and a model that learned it"
    family: ClassVar[Family] = "representation"
    needs_suspect: ClassVar[bool] = True

    reducer: Literal["pca", "ica"] = Field("pca", description="How features are reduced.")
    dims: int = Field(10, ge=1, le=1000, description="Dimensions that are kept.")
    restarts: int = Field(10, ge=1, le=1000, description="Starts of the clustering; the best is kept.")
    max_share: float = Field(0.35, gt=0, le=0.5, description="Own rule: largest share of a cluster that is poison.")
    silhouette: float = Field(0.1, ge=-1, le=1, description="Own rule: least mean silhouette of a class with poison.")

    def run(self, sight: Sight) -> Scanned:
        """Score the samples, class by class."""
        count = len(sight.data)
        scores = torch.zeros(count, dtype=torch.float64)
        native = torch.zeros(count, dtype=torch.bool)
        evidence = torch.zeros(sight.data.num_classes, dtype=torch.float64)
        shares, silhouettes = {}, {}
        for label, rows, own in classes_of(sight.features, sight.data.labels, sight.data.num_classes):
            seed = int(generator(sight.engine.seed, "ac", label).initial_seed() % 2**31)
            split = two_clusters(reduced(own, self.reducer, self.dims, seed), self.restarts, seed)
            evidence[label] = max(0.0, split.silhouette) * (1 - 2 * split.share)
            scores[rows] = evidence[label] * split.sides
            shares[label], silhouettes[label] = round(split.share, 4), round(split.silhouette, 4)
            if split.share < self.max_share and split.silhouette > self.silhouette:
                native[rows] = split.sides > 0
        findings = {"smaller_cluster_shares": list(shares.values()), "silhouettes": list(silhouettes.values())}
        return Scanned(scores.float(), native, stand_out(evidence), findings)


class Split(NamedTuple):
    """A class in two clusters: where each sample lies between the centres, from -1 (larger) to 1 (smaller), the smaller
    one's share, and the mean silhouette.
    """

    sides: Tensor
    share: float
    silhouette: float


def reduced(centred: Tensor, reducer: str, dims: int, seed: int) -> Tensor:
    """Return features (n, d), minus their mean, in at most `dims` dimensions, (n, k) float64."""
    kept = min(dims, centred.shape[1], len(centred) - 1)
    if not kept:
        return centred[:, :0]
    if reducer == "ica":
        from sklearn.decomposition import FastICA

        ica = FastICA(kept, whiten="unit-variance", max_iter=1000, tol=0.005, random_state=seed)
        found: Tensor = torch.from_numpy(ica.fit_transform(centred.numpy()))
        return found
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors
    main: Tensor = centred @ vectors[:, -kept:]
    return main


def two_clusters(points: Tensor, restarts: int, seed: int) -> Split:
    """Split points (n, k) by 2-means; without two different points nothing is split."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    nothing = Split(torch.zeros(len(points), dtype=torch.float64), 0.5, 0.0)
    if len(points) < 3 or not points.shape[1] or bool((points == points[0]).all()):
        return nothing
    found = KMeans(2, n_init=restarts, random_state=seed).fit(points.numpy())
    second = torch.from_numpy(found.labels_.astype(np.int64)) == 1
    if not bool(second.any()) or bool(second.all()):
        return nothing
    small, large = (1, 0) if int(second.sum()) * 2 <= len(points) else (0, 1)
    centres = torch.from_numpy(found.cluster_centers_).double()
    to_small, to_large = ((points - centres[which]).norm(dim=1) for which in (small, large))
    apart = (centres[small] - centres[large]).norm().clamp_min(1e-12)
    share = min(int(second.sum()), len(points) - int(second.sum())) / len(points)
    measured = min(MEASURED, len(points))
    try:
        clear = float(silhouette_score(points.numpy(), found.labels_, sample_size=measured, random_state=seed))
    except ValueError:  # all that were measured lie in one cluster
        clear = 0.0
    return Split(((to_large - to_small) / apart).clamp(-1, 1), share, clear)
