"""Activation clustering: clusters by hand, its own rule, and what it cannot tell."""

from __future__ import annotations

import pytest
import torch
from features import noise, sight_of
from torch import Tensor

from bdbench.detectors.data.ac import ActivationClustering, two_clusters


def blobs(share: float, count: int = 400, apart: float = 20.0) -> tuple[Tensor, Tensor]:
    """Ten classes; the last one has a second blob of a share of its samples."""
    labels = torch.arange(count * 10) % 10
    features = noise(len(labels), 12)
    in_class = torch.cumsum((labels == 9).int(), 0)
    second = (labels == 9) & (in_class <= share * count)
    features[second, 0] += apart
    return features, second


def test_a_small_tight_cluster_is_scored_above_all_others_and_set_aside_by_the_own_rule() -> None:
    features, second = blobs(0.1)
    found = ActivationClustering().run(sight_of(features, torch.arange(4000) % 10))
    assert found.native is not None
    assert float(found.scores[second].min()) > float(found.scores[~second].max())
    assert torch.equal(found.native, second)
    assert [one.label for one in found.classes if one.p is not None and one.p < 0.05] == [9]


def test_a_class_that_splits_in_halves_is_not_set_aside() -> None:
    features, second = blobs(0.5)
    found = ActivationClustering().run(sight_of(features, torch.arange(4000) % 10))
    assert found.native is not None
    assert not bool(found.native[second].any())


def test_adding_a_constant_changes_nothing_and_clean_classes_are_left_alone() -> None:
    features, labels = noise(1000, 8), torch.arange(1000) % 5
    plain = ActivationClustering().run(sight_of(features, labels))
    moved = ActivationClustering().run(sight_of(features + 5, labels))
    assert torch.allclose(plain.scores, moved.scores, atol=1e-3)
    assert plain.native is not None
    assert not bool(plain.native.any())


@pytest.mark.parametrize("reducer", ["pca", "ica"])
def test_tiny_and_constant_classes_score_nothing_and_break_nothing(reducer: str) -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    features = torch.cat([noise(2, 4), noise(1, 4), torch.ones(5, 4)])
    found = ActivationClustering.parse({"reducer": reducer}).run(sight_of(features, labels))
    assert found.scores.tolist() == [0.0] * 8


def test_two_clusters_place_samples_between_the_centres() -> None:
    points = torch.tensor([[0.0], [0.0], [0.0], [10.0]], dtype=torch.float64)
    split = two_clusters(points, 3, 0)
    assert split.sides.tolist() == pytest.approx([-1, -1, -1, 1])
    assert split.share == 0.25
    assert split.silhouette > 0.7
