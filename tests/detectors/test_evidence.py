"""Which class stands out: the index by hand, and its p-value against known thresholds."""

from __future__ import annotations

import pytest
import torch

from bdbench.detectors.parts.evidence import chance, deviations, flagged, stand_out


def test_deviations_count_from_the_median_in_scaled_absolute_deviations_and_one_side_only() -> None:
    found = deviations(torch.tensor([1.0, 2.0, 3.0, 4.0, 13.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0, 0, 0, 1 / 1.4826, 10 / 1.4826])


def test_where_all_but_one_are_equal_that_one_has_the_largest_index_and_equal_ones_have_none() -> None:
    assert deviations(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])).tolist() == [0, 0, 0, 0, 1e6]
    assert deviations(torch.ones(6)).tolist() == [0] * 6


@pytest.mark.parametrize(("classes", "index"), [(10, 3.88), (20, 3.56), (43, 3.48), (100, 3.51)])
def test_thresholds_of_five_percent_are_the_known_ones(classes: int, index: float) -> None:
    assert chance(index, classes) == pytest.approx(0.05, abs=0.006)


def test_an_index_of_two_is_no_test_it_is_passed_by_a_third_of_ten_clean_classes() -> None:
    assert chance(2.0, 10) == pytest.approx(0.34, abs=0.02)


def test_of_four_classes_none_is_judged() -> None:
    assert [one.p for one in stand_out(torch.tensor([1.0, 1.0, 1.1, 9.0]))] == [None] * 4


def test_a_class_that_is_unusually_low_does_not_stand_out() -> None:
    classes = stand_out(torch.tensor([5.0, 5.1, 4.9, 5.2, 4.8, 5.05, 0.01]))
    assert flagged(classes, 0.05) == []
    high = stand_out(torch.tensor([5.0, 5.1, 4.9, 5.2, 4.8, 5.05, 90.0]))
    assert flagged(high, 0.05) == [6]


def test_positive_statistics_are_compared_by_their_logarithms() -> None:
    plain = stand_out(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), positive=True)
    logs = stand_out(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).log2())
    assert [one.deviations for one in plain] == pytest.approx([one.deviations for one in logs])
