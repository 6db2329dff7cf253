"""Two models on the same test images: by how much their rates differ, and on which images they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.manifests import AGAIN
from bdbench.errors import ArtifactError
from bdbench.protocol.judging import counts_for_asr
from bdbench.protocol.metrics import Rate

IMAGE = ["split", "row", "label", "clean_label"]
"""Columns of predictions that say which image it is, and what it should be."""


class Paired(NamedTuple):
    """How often two models score a hit on the same images: both, A alone, B alone, neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(self)

    @property
    def a(self) -> Rate:
        """The rate of A."""
        return Rate(self.both + self.only_a, self.images)

    @property
    def b(self) -> Rate:
        """The rate of B."""
        return Rate(self.both + self.only_b, self.images)

    @property
    def difference(self) -> float:
        """B - A; nan without images."""
        return (self.only_b - self.only_a) / self.images if self.images else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference over images; (nan, nan) without any.

        Paper: Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
        data, Statistics in Medicine 17 (1998), method 10: Wilson's intervals of both rates, put together with their
        correlation.
        """
        if not self.images:
            return math.nan, math.nan
        (low_a, high_a), (low_b, high_b) = self.a.interval, self.b.interval
        below, above = (self.b.value - low_b, high_a - self.a.value), (high_b - self.b.value, self.a.value - low_a)
        phi = self.correlation
        down, up = (math.sqrt(max(0.0, x**2 - 2 * phi * x * y + y**2)) for x, y in (below, above))
        return self.difference - down, self.difference + up

    @property
    def correlation(self) -> float:
        """Newcombe's phi: the correlation of the hits, one that is positive corrected for continuity; else 0."""
        margins = math.prod((self.a.numerator, self.images - self.a.numerator))
        margins *= math.prod((self.b.numerator, self.images - self.b.numerator))
        if not margins:
            return 0.0
        cross = self.both * self.neither - self.only_a * self.only_b
        corrected = max(cross - self.images / 2, 0.0) if cross > 0 else cross
        return corrected / math.sqrt(margins)


def pair(a: np.ndarray, b: np.ndarray) -> Paired:
    """Count the hits (N,) bool of two models on the same images."""
    return Paired(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def paired_rates(a: pd.DataFrame, b: pd.DataFrame, attack: Mapping[str, Any]) -> dict[str, Paired]:
    """Return ba and, where there is a trigger, asr, image by image.

    Args:
        a, b: predictions of two evaluations of one dataset (`bdbench.protocol.judging.predict`).
        attack: options of its attack.

    Raises:
        ArtifactError: the predictions are not of the same images.
    """
    if not a[IMAGE].equals(b[IMAGE]):
        raise ArtifactError("the two evaluations do not have the same test images; make both again with --force")
    test = (a["split"] == "test").to_numpy()
    rates = {"ba": pair(*((it["prediction"] == it["clean_label"]).to_numpy()[test] for it in (a, b)))}
    if not test.all():
        counts = counts_for_asr(a["clean_label"].to_numpy(), attack) & ~test
        rates["asr"] = pair(*((it["prediction"] == it["label"]).to_numpy()[counts] for it in (a, b)))
    return rates


def check_fits(found: pd.DataFrame, data: DatasetArtifact) -> None:
    """Refuse predictions that are not of a dataset's images and classes.

    Raises:
        ArtifactError: there are more or fewer, or of classes that do not exist.
    """
    counts = {split: int((found["split"] == split).sum()) for split in ("test", "triggered")}
    wanted = {split: data.manifest.facts["counts"][split] for split in counts}
    labels = found[["label", "clean_label", "prediction"]].to_numpy()
    classes = len(data.class_names)
    if counts != wanted or len(found) != sum(counts.values()) or labels.min() < 0 or labels.max() >= classes:
        raise ArtifactError(f"the predictions do not fit {data.path}: it has {wanted} images, they {counts}; {AGAIN}")


def disagreements(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return the images to which two models give different classes, clean ones first.

    Returns:
        split (test, triggered), place (of the image in its split), row (of the test split), true, wanted (what the
        attacker wants of a triggered image; of a clean one its true label), a, b (predictions), a_confidence,
        b_confidence.
    """
    differ = (a["prediction"] != b["prediction"]).to_numpy()
    place = a.groupby("split", sort=False).cumcount()
    columns = {
        "split": a["split"], "place": place, "row": a["row"], "true": a["clean_label"], "wanted": a["label"],
        "a": a["prediction"], "b": b["prediction"], "a_confidence": a["confidence"], "b_confidence": b["confidence"],
    }  # fmt: skip
    return pd.DataFrame(columns)[differ].reset_index(drop=True)
