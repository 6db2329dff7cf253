"""SCAn: the mean of a class under the model, and which of two groups is suspect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from features import noise, sight_of
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.detectors.base import Scanned, Sight
from bdbench.detectors.data.scan_lda import ScanLda, Variation, less_trusted, one_mean, two_means, variation

CLASSES, DIMS = 10, 16


def toy(poison: float, seed: int = 0, each: int = 200, clean: int = 40) -> tuple[Sight, Tensor]:
    """Classes with means of their own; a share of class 3 comes from elsewhere. Reference images: clean ones."""
    means = 4 * noise(CLASSES, DIMS, seed=seed)
    labels = torch.arange(CLASSES * each) % CLASSES
    features = means[labels] + noise(len(labels), DIMS, seed=seed + 1)
    place = torch.cumsum((labels == 3).int(), 0)
    is_poison = (labels == 3) & (place <= poison * each)
    features[is_poison] = means[7] * 0.5 + 3 + noise(int(is_poison.sum()), DIMS, seed=seed + 2)
    trusted_labels = torch.arange(CLASSES * clean) % CLASSES
    trusted = means[trusted_labels] + noise(len(trusted_labels), DIMS, seed=seed + 3)
    images = torch.zeros(len(trusted_labels), 1, 8, 8, dtype=torch.uint8)
    names = tuple(str(label) for label in range(CLASSES))
    sight = sight_of(features, labels, ImageDataset(images, trusted_labels, names), trusted)
    return sight, is_poison


def run(sight: Sight, **options: Any) -> Scanned:
    return ScanLda.parse(options).run(sight)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.52, 0.8])
def test_poison_is_ranked_first_whether_it_is_the_smaller_group_or_the_larger(
    share: float,
) -> None:
    sight, is_poison = toy(share)
    found = run(sight)
    assert [one.label for one in found.classes if one.p is not None and one.p < 0.05] == [3]
    assert float(found.scores[is_poison].min()) > float(
        found.scores[sight.data.labels == 3][~is_poison[sight.data.labels == 3]].max()
    )


def test_the_published_null_mean_finds_less_of_a_little_poison() -> None:
    def found(null_mean: str) -> int:
        hits = 0
        for seed in range(8):
            classes = run(toy(0.03, seed=10 * seed)[0], null_mean=null_mean).classes
            hits += [one.label for one in classes if one.p is not None and one.p < 0.05] == [3]
        return hits

    assert found("right") > found("published")


def test_the_one_mean_is_the_class_mean_for_many_samples_and_not_so_as_published() -> None:
    own = 5 + noise(2000, 4)
    spread = Variation(4 * torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64) * 0.5)
    assert torch.allclose(one_mean(own, spread, published=False), own.mean(0), rtol=1e-3)
    assert not torch.allclose(one_mean(own, spread, published=True), own.mean(0), rtol=0.5)


def test_the_variation_is_that_of_which_the_features_were_drawn() -> None:
    labels = torch.arange(4000) % 40
    means = 3 * noise(40, 3)
    found = variation(means[labels] + 0.5 * noise(4000, 3, seed=1), labels)
    assert torch.allclose(found.within.diagonal(), torch.full((3,), 0.25, dtype=torch.float64), rtol=0.1)
    assert bool((found.between.diagonal() > 4).all())


def test_two_means_of_two_groups_are_theirs() -> None:
    own = torch.cat([noise(90, 3), 12 + noise(30, 3, seed=1)])
    groups = sorted(two_means(own, torch.eye(3, dtype=torch.float64)), key=lambda mean: float(mean.sum()))
    assert torch.allclose(groups[0], own[:90].mean(0))
    assert torch.allclose(groups[1], own[90:].mean(0))


def test_the_suspect_group_has_fewer_trusted_samples_for_its_size() -> None:
    groups = torch.tensor([0] * 60 + [1] * 40)
    assert less_trusted(groups, torch.tensor([1] * 9 + [0])) == 0
    assert less_trusted(groups, torch.tensor([0] * 6 + [1])) == 1
    assert less_trusted(groups, torch.tensor([], dtype=torch.int64)) == 1
