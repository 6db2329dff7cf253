"""Would a defense have found a trigger? A known patch is planted in a copy of its dataset, and looked for in its ranks.

The copy keeps whatever the dataset held before: samples that nobody planted may be poisoned too.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.attacks.badnets import BadNets
from bdbench.data import SourceData
from bdbench.errors import OptionError
from bdbench.protocol import metrics
from bdbench.registry import DEFENSES
from bdbench.seeds import generator

RATE = 0.05
"""Share of the images that get the patch, unless another is asked for."""

FOUND = 0.5
"""Precision among as many of the most suspect as were planted, from which the planted samples count as found."""

RANKED_HIGH = 0.9
"""AUROC from which they are ranked high, whatever is ranked before them."""


class SelfTest(NamedTuple):
    """Where planted samples are ranked.

    Attributes:
        planted, images: how many of how many images have the patch.
        target: the class that they are labelled as.
        precision: share of planted samples among the `planted` most suspect; planted / images is chance.
        auroc: how well the scores tell planted samples from the others.
        others, others_class, others_count: of the samples that were not planted, so many (`others`) most suspect were
            looked at; the class that most of these are labelled as, and how many of them.
    """

    planted: int
    images: int
    target: str
    precision: float
    auroc: float
    others: int
    others_class: str
    others_count: int

    @property
    def verdict(self) -> str:
        """found, ranked high, or not found."""
        if self.precision >= FOUND:
            return "found"
        return "ranked high" if self.auroc >= RANKED_HIGH else "not found"


def planted_patch(data: DatasetArtifact, rate: float, seed: int) -> BadNets:
    """Return the attack that plants: a checkered patch at the top left, on images of other classes than its target.

    Raises:
        OptionError: the rate is not a share.
    """
    if not 0 < rate < 1:
        raise OptionError(f"self-test rate {rate} must be more than 0 and less than 1")
    there = data.train.labels.unique()
    target = int(there[torch.randint(len(there), (1,), generator=generator(seed, "self-test", "target"))])
    options = {"patch": "checker", "corner": "top-left", "margin": 1, "exclude_target": True}
    return BadNets.parse({**options, "rate": rate, "target": target})


def as_source(data: DatasetArtifact) -> SourceData:
    """Return the images and labels of a dataset artifact, as a defender sees them, as if they were a clean source."""
    return SourceData(data.manifest.facts["name"], data.train, data.test, augment=data.manifest.facts["augment"])


def check_method(method: str) -> None:
    """Refuse a method that cannot be run on a copy by itself.

    Raises:
        OptionError: it needs more than the training images.
    """
    cls = DEFENSES.load(method)
    if cls.needs_trusted or cls.needs_suspect or cls.needs_truth:
        raise OptionError(
            f"'{method}' needs more than the training images; the self-test takes a method that does not, such as abl"
        )


def judge(ranked: pd.DataFrame, is_planted: Tensor, target: str, count: int) -> SelfTest:
    """Return where the planted samples are ranked.

    Args:
        ranked: of the copy, from `bdbench.protocol.suspects.rank`.
        is_planted: (N,) bool, by row of the copy; at least one of each.
        target: name of the class that the planted samples are labelled as.
        count: how many of the most suspect of the other samples are looked at; at least 1.
    """
    planted = is_planted[torch.from_numpy(ranked["row"].to_numpy(copy=True))]
    total = int(planted.sum())
    scores = torch.from_numpy(ranked["score"].to_numpy(copy=True))
    others = ranked[(~planted).numpy()].head(count)
    classes = others["class"].value_counts()
    return SelfTest(
        planted=total,
        images=len(ranked),
        target=target,
        precision=int(planted[:total].sum()) / total,
        auroc=metrics.score_metrics(scores, planted)["auroc"],
        others=len(others),
        others_class=str(classes.index[0]),
        others_count=int(classes.iloc[0]),
    )
