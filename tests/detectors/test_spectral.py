"""Spectral signatures: invariants, and why features are centred before they are projected."""

from __future__ import annotations

import torch
from features import noise, sight_of
from torch import Tensor

from bdbench.detectors.data.spectral import Spectral, projections
from bdbench.protocol.metrics import score_metrics


def scores(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    return Spectral.parse(options).run(sight_of(features, labels)).scores


def poisoned(seed: int) -> tuple[Tensor, Tensor]:
    """One class of 500 in 64 dimensions that are positive on average, a tenth shifted along one direction."""
    features = 3 + noise(500, 64, seed=seed)
    direction = noise(64, seed=1000 + seed)
    is_poison = torch.arange(500) < 50
    features[is_poison] += 5 * direction / direction.norm()
    return features, is_poison


def test_centred_features_find_a_shift_that_uncentred_ones_may_rank_last() -> None:
    labels, centred, raw = torch.zeros(500, dtype=torch.int64), [], []
    for seed in range(12):
        features, is_poison = poisoned(seed)
        centred.append(score_metrics(scores(features, labels), is_poison)["auroc"])
        raw.append(score_metrics(scores(features, labels, centre=False), is_poison)["auroc"])
    assert min(centred) > 0.9
    assert min(raw) < 0.5


def test_rotation_and_translation_of_features_change_nothing() -> None:
    features, _ = poisoned(0)
    labels = torch.arange(500) % 2
    turned = torch.linalg.qr(noise(64, 64, seed=5)).Q
    before = scores(features, labels)
    assert torch.allclose(scores(features @ turned + 3, labels), before, rtol=1e-3, atol=1e-4)


def test_one_sample_far_out_in_a_round_class_ranks_first() -> None:
    features = noise(200, 8)
    features[17] = 0
    features[17, 3] = 30
    assert int(scores(features, torch.zeros(200, dtype=torch.int64)).argmax()) == 17


def test_rows_in_another_order_have_the_same_scores() -> None:
    features, _ = poisoned(1)
    labels, order = torch.arange(500) % 3, torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scores(features[order], labels[order]), scores(features, labels)[order], rtol=1e-4)


def test_classes_of_one_sample_or_without_variation_score_nothing() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2, 2])
    features = torch.cat([noise(1, 4), torch.ones(3, 4), noise(2, 4, seed=2)])
    found = scores(features, labels)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert bool(torch.isfinite(found).all())


def test_squared_projections_on_all_directions_are_squared_lengths() -> None:
    centred = noise(50, 6)
    centred -= centred.mean(0)
    found, spectrum = projections(centred, 6, torch.zeros(6))
    assert torch.allclose(found, centred.square().sum(1))
    assert torch.allclose(spectrum.sum(), centred.square().sum())


def test_the_class_with_a_second_population_stands_out() -> None:
    labels = torch.arange(2000) % 10
    features = noise(2000, 16)
    features[(labels == 4) & (torch.arange(2000) % 3 == 0), 2] += 12
    classes = Spectral().run(sight_of(features, labels)).classes
    assert [one.label for one in classes if one.p is not None and one.p < 0.05] == [4]
