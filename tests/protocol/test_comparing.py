"""Two models on the same images: differences with their intervals, held against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.errors import ArtifactError
from bdbench.protocol.comparing import Paired, check_fits, disagreements, pair, paired_rates
from bdbench.protocol.metrics import Z95

ALL_TO_ONE = {"labels": "all-to-one", "target": 0, "source": 0}


def predictions(test: str, triggered: str, confidence: float = 0.75) -> pd.DataFrame:
    """Predictions, a digit an image: four clean images of classes 0, 1, 2, 2, and the last three triggered to 0."""
    clean, rows = [0, 1, 2, 2], [1, 2, 3]
    return pd.DataFrame({
        "split": ["test"] * 4 + ["triggered"] * 3,
        "row": [*range(4), *rows],
        "label": [*clean, 0, 0, 0],
        "clean_label": [*clean, *(clean[row] for row in rows)],
        "prediction": [int(digit) for digit in test + triggered],
        "confidence": [confidence] * 7,
    })  # fmt: skip


def test_hits_are_counted_image_by_image() -> None:
    a, b = np.array([True, True, True, False, False]), np.array([True, False, False, True, False])
    paired = pair(a, b)
    assert paired == (1, 2, 1, 1)
    assert (paired.a.value, paired.b.value) == (0.6, 0.4)
    assert paired.difference == pytest.approx(-0.2)


def test_the_interval_is_newcombes_tenth() -> None:
    """Counts 14, 5, 0, 22 of 41: phi is (14 * 22 - 20.5) / sqrt(19 * 22 * 14 * 27), of Wilson's limits of 19 and 14."""
    paired = Paired(14, 5, 0, 22)
    phi = 287.5 / math.sqrt(19 * 22 * 14 * 27)
    assert paired.correlation == pytest.approx(phi)
    low_a, high_a, low_b, high_b = 0.3206, 0.6125, 0.2156, 0.4945  # Wilson: 19 of 41, 14 of 41
    a, b = 19 / 41, 14 / 41
    down = math.sqrt((b - low_b) ** 2 - 2 * phi * (b - low_b) * (high_a - a) + (high_a - a) ** 2)
    up = math.sqrt((high_b - b) ** 2 - 2 * phi * (high_b - b) * (a - low_a) + (a - low_a) ** 2)
    assert paired.interval == pytest.approx((b - a - down, b - a + up), abs=2e-4)
    assert paired.interval[1] < 0 < 0.05 < -paired.interval[0]


def test_swapped_models_have_the_mirrored_interval() -> None:
    low, high = Paired(70, 12, 5, 13).interval
    assert Paired(70, 5, 12, 13).interval == pytest.approx((-high, -low))


def test_an_attack_that_works_on_one_model_always_and_on_the_other_never() -> None:
    """Wilson's limits are n / (n + z^2) and z^2 / (n + z^2), and nothing is known of a correlation."""
    paired = Paired(0, 100, 0, 0)
    width = Z95**2 / (100 + Z95**2)
    assert paired.correlation == 0
    assert paired.interval == pytest.approx((-1, -1 + math.sqrt(2) * width))


def test_models_that_agree_everywhere_differ_by_nothing_within_a_small_interval() -> None:
    low, high = Paired(90, 0, 0, 10).interval
    assert Paired(90, 0, 0, 10).difference == 0
    assert low == pytest.approx(-high)
    assert 0 < high < 0.04


def test_without_images_there_is_no_difference() -> None:
    assert math.isnan(Paired(0, 0, 0, 0).difference)
    assert all(map(math.isnan, Paired(0, 0, 0, 0).interval))


def test_ba_is_paired_over_clean_and_asr_over_triggered_images() -> None:
    rates = paired_rates(predictions("0122", "000"), predictions("0102", "022"), ALL_TO_ONE)
    assert rates == {"ba": Paired(3, 1, 0, 0), "asr": Paired(1, 2, 0, 0)}


def test_asr_of_a_source_specific_attack_is_over_its_source_class() -> None:
    attack = {"labels": "source-specific", "target": 0, "source": 2}
    rates = paired_rates(predictions("0122", "000"), predictions("0122", "010"), attack)
    assert rates["asr"] == Paired(1, 1, 0, 0)  # the first triggered image is of class 1


def test_a_dataset_without_a_trigger_has_ba_only() -> None:
    found = [predictions(test, "000").head(4) for test in ("0122", "0120")]
    assert paired_rates(*found, {}) == {"ba": Paired(3, 1, 0, 0)}


def test_predictions_of_other_images_are_refused() -> None:
    with pytest.raises(ArtifactError, match="do not have the same test images"):
        paired_rates(predictions("0122", "000"), predictions("0122", "000").iloc[::-1], ALL_TO_ONE)


def test_images_with_different_classes_are_listed_with_their_place() -> None:
    found = disagreements(predictions("0122", "000"), predictions("0112", "002"))
    columns = ["split", "place", "row", "true", "wanted", "a", "b"]
    assert found[columns].to_numpy().tolist() == [["test", 2, 2, 2, 2, 2, 1], ["triggered", 2, 3, 2, 0, 0, 2]]


def test_predictions_that_do_not_fit_the_dataset_are_refused(toys: DatasetArtifact) -> None:
    counts = toys.manifest.facts["counts"]
    fitting = pd.DataFrame({
        "split": ["test"] * counts["test"] + ["triggered"] * counts["triggered"],
        "label": 0, "clean_label": 0, "prediction": 3,
    })  # fmt: skip
    check_fits(fitting, toys)
    for wrong in (fitting.head(3), fitting.assign(prediction=4), fitting.assign(label=-1)):
        with pytest.raises(ArtifactError, match="the predictions do not fit"):
            check_fits(wrong, toys)
