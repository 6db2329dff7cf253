"""Every metric against numbers that can be checked in the head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bdbench.protocol.metrics import (
    Rate,
    classification_rates,
    defense_effectiveness,
    image_distances,
    mean_interval,
    rate,
    score_metrics,
    set_aside_rates,
)

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
PREDICTED = torch.tensor([0, 0, 1, 0, 2, 0])
TRIGGERED_ROWS = torch.tensor([2, 3, 4, 5])
"""Test images of the classes 1 and 2; the target is 0."""
TRIGGERED_PREDICTED = torch.tensor([0, 0, 2, 0])


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def rates() -> dict[str, Rate]:
    wanted = torch.zeros(4, dtype=torch.int64)
    return classification_rates(PREDICTED, LABELS, TRIGGERED_PREDICTED, wanted, TRIGGERED_ROWS, target=0)


def test_a_rate_keeps_its_counts() -> None:
    found = rate(mask(1, 0, 1, 1))
    assert (found.numerator, found.denominator, found.value) == (3, 4, 0.75)


def test_a_rate_of_nothing_is_undefined() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert all(math.isnan(end) for end in Rate(0, 0).interval)


def test_wilson_interval_of_five_in_ten() -> None:
    # centre 1/2, half-width z / (1 + z^2/10) * sqrt(1/40 + z^2/400) with z = 1.96: 0.2634
    assert Rate(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_wilson_interval_of_none_in_ten_reaches_above_zero() -> None:
    # (0, z^2 / (n + z^2)) = (0, 3.8415 / 13.8415)
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_wilson_interval_stays_within_zero_and_one() -> None:
    assert Rate(10, 10).interval == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)
    assert Rate(10, 10).interval[1] <= 1


def test_ba_counts_all_clean_images_of_all_classes() -> None:
    assert rates()["ba"] == Rate(4, 6)


def test_asr_counts_triggered_images_called_the_target() -> None:
    assert rates()["asr"] == Rate(3, 4)


def test_floor_counts_the_same_images_without_trigger() -> None:
    # the test rows 2, 3, 4, 5 are predicted 1, 0, 2, 0: two of four are called 0 anyway
    assert rates()["floor"] == Rate(2, 4)


def test_ra_counts_triggered_images_given_their_true_label() -> None:
    # true 1, 1, 2, 2 against predicted 0, 0, 2, 0
    assert rates()["ra"] == Rate(1, 4)


def test_ba_without_target_and_target_recall_split_ba() -> None:
    found = rates()
    assert found["ba_non_target"] == Rate(2, 4)
    assert found["target_recall"] == Rate(2, 2)


def test_without_a_single_target_there_is_no_target_recall() -> None:
    wanted = (LABELS + 1) % 3
    found = classification_rates(PREDICTED, LABELS, wanted, wanted, torch.arange(6), target=None)
    assert set(found) == {"ba", "asr", "floor", "ra"}
    assert found["asr"] == Rate(6, 6)
    # clean predictions 0 0 1 0 2 0 against the wanted 1 1 2 2 0 0
    assert found["floor"] == Rate(1, 6)


def test_triggered_rows_may_come_in_any_order() -> None:
    order = torch.tensor([3, 1, 0, 2])
    wanted = torch.zeros(4, dtype=torch.int64)
    found = classification_rates(PREDICTED, LABELS, TRIGGERED_PREDICTED[order], wanted, TRIGGERED_ROWS[order], target=0)
    assert found == rates()


def test_precision_and_recall_of_what_was_set_aside() -> None:
    found = set_aside_rates(mask(1, 1, 1, 0, 0), mask(1, 1, 0, 1, 1))
    assert found["detection_precision"] == Rate(2, 3)
    assert found["detection_recall"] == Rate(2, 4)


def test_nothing_set_aside_leaves_precision_undefined_and_recall_zero() -> None:
    found = set_aside_rates(mask(0, 0, 0), mask(1, 1, 0))
    assert math.isnan(found["detection_precision"].value)
    assert found["detection_recall"] == Rate(0, 2)


def test_no_poison_leaves_recall_undefined_and_precision_zero() -> None:
    found = set_aside_rates(mask(1, 0, 0), mask(0, 0, 0))
    assert found["detection_precision"] == Rate(0, 1)
    assert math.isnan(found["detection_recall"].value)


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    # poison 4, 2 against clean 3, 1: the pairs 4>3, 4>1, 2<3, 2>1 are right three times of four
    scores = torch.tensor([4.0, 2.0, 3.0, 1.0])
    assert score_metrics(scores, mask(1, 1, 0, 0))["auroc"] == 0.75


def test_equal_scores_count_half() -> None:
    assert score_metrics(torch.zeros(4), mask(1, 1, 0, 0))["auroc"] == 0.5


def test_true_positive_rate_at_a_false_positive_rate() -> None:
    # 100 clean samples score 0..99. Poison at 99.5, 98.5, 95.5, 50: beaten by 0, 1, 4 and 49 clean samples
    scores = torch.cat([torch.arange(100.0), torch.tensor([99.5, 98.5, 95.5, 50.5])])
    is_poison = torch.arange(104) >= 100
    found = score_metrics(scores, is_poison)
    assert found["tpr_at_1_fpr"] == 0.5
    assert found["tpr_at_5_fpr"] == 0.75


@pytest.mark.parametrize("is_poison", [mask(0, 0, 0), mask(1, 1, 1)])
def test_scores_of_one_kind_only_are_undefined(is_poison: Tensor) -> None:
    assert all(math.isnan(value) for value in score_metrics(torch.tensor([1.0, 2.0, 3.0]), is_poison).values())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            (0.93, 1.0),
            (0.50, 0.0),
            0.785,
        ),  # BackdoorBench's own formula adds the loss of accuracy and gives 1.215
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.9, 1.0), 0.5),
        ((0.9, 0.2), (0.95, 0.9), 0.5),
        ((0.9, 0.5), (0.1, 0.5), 0.1),
    ],
)
def test_der_rewards_lost_attacks_and_charges_lost_accuracy(
    before: tuple[float, float], after: tuple[float, float], expected: float
) -> None:
    assert defense_effectiveness(*before, *after) == pytest.approx(expected)


def test_t_interval_over_three_seeds() -> None:
    # mean 2, deviation 1, t(0.975; 2) = 4.3027, half-width 4.3027 / sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0, 2.4841), abs=1e-4)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    mean, spread, half = mean_interval([0.25])
    assert mean == 0.25
    assert math.isnan(spread)
    assert math.isnan(half)


def test_undefined_values_are_left_out_of_a_mean() -> None:
    assert mean_interval([1.0, math.nan, 3.0])[0] == 2.0
    assert math.isnan(mean_interval([])[0])


# distances of images


def test_one_changed_pixel_by_hand() -> None:
    before = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    after = before.clone()
    after[0, 0, 3, 3] = 180
    found = image_distances(before, after)
    # 80^2 / 64 pixels = 100; 10 log10(255^2 / 100) = 28.13; the second image does not change and has no PSNR
    assert found["psnr"] == pytest.approx(28.13, abs=0.005)
    assert found["max_change"] == 80
    assert found["changed"] == pytest.approx(1 / 128)
    assert 0 < found["ssim"] < 1


def test_equal_images_have_no_distance() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert image_distances(images, images) == {"psnr": math.inf, "ssim": 1.0, "max_change": 0, "changed": 0}


def test_a_change_of_one_channel_is_a_changed_pixel() -> None:
    before = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    after = before.clone()
    after[0, 1, :, :4] = 1
    assert image_distances(before, after)["changed"] == 0.5
