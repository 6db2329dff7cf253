"""Trigger inversion: stamps, sizes, what is kept and when it ends, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdbench.defenses.parts.inversion import FORMS, MaskTriggers, PixelTriggers, Stamp, Triggers, anomaly, smallest_p
from bdbench.seeds import generator, scoped

SHAPE = (3, 8, 8)
every_form = pytest.mark.parametrize("form", sorted(FORMS))


def triggers_of(form: str, *classes: int, cost: float | None = None, keep: Any = "best", seed: int = 0) -> Triggers:
    with scoped(seed, "triggers"):
        return FORMS[form](torch.tensor(classes or (0,)), SHAPE, cost, keep)


def masks_of(*classes: int, keep: Any = "best", patience: int = 2) -> MaskTriggers:
    triggers = triggers_of("mask", *classes, keep=keep)
    assert isinstance(triggers, MaskTriggers)
    triggers.patience = patience
    return triggers


def pixels_of(*classes: int, cost: float | None = None, patience: int = 2) -> PixelTriggers:
    """Triggers that change nothing yet."""
    triggers = triggers_of("pixel", *classes, cost=cost)
    assert isinstance(triggers, PixelTriggers)
    triggers.patience = patience
    with torch.no_grad():
        triggers.plus.zero_()
        triggers.minus.zero_()
    return triggers


@torch.no_grad()
def set_mask(triggers: MaskTriggers, *values: float) -> None:
    """Make every pixel of the k masks this strong: sizes are 64 times the values."""
    triggers.mask.copy_(torch.tensor(values).view(-1, 1, 1, 1).expand_as(triggers.mask))


def epoch(triggers: Triggers, *successes: float) -> bool:
    """End an epoch of ten images with these success rates."""
    triggers.tries.fill_(10)
    triggers.hits.copy_(10 * torch.tensor(successes))
    return triggers.finish_epoch()


def images_of(count: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed, "images")).contiguous(memory_format=torch.channels_last)


# the anomaly


def test_the_anomaly_by_hand() -> None:
    # the median is 11, distances are 10, 1, 0, 1, 2, their median is 1
    found = anomaly(torch.tensor([1.0, 10.0, 11.0, 12.0, 13.0]))
    assert found.tolist() == pytest.approx([10 / 1.4826, 1 / 1.4826, 0, 0, 0])


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    # the median is 10, distances are 7, 1, 1, 3, their median is (1 + 3) / 2
    found = anomaly(torch.tensor([3.0, 9.0, 11.0, 13.0]))
    assert found.tolist() == pytest.approx([7 / (1.4826 * 2), 1 / (1.4826 * 2), 0, 0])


def test_sizes_above_the_median_are_no_anomaly_however_far() -> None:
    assert anomaly(torch.tensor([10.0, 11.0, 12.0, 13.0, 1000.0]))[2:].tolist() == [0, 0, 0]


def test_the_anomaly_does_not_depend_on_order_or_unit() -> None:
    sizes = torch.tensor([3.0, 11.0, 12.0, 15.0, 10.0])
    torch.testing.assert_close(anomaly(sizes.flip(0)), anomaly(sizes).flip(0))
    torch.testing.assert_close(anomaly(sizes * 7), anomaly(sizes))


def test_where_the_others_are_equal_a_smaller_size_is_infinitely_anomalous() -> None:
    assert anomaly(torch.tensor([64.0, 5.0, 64.0, 64.0, 64.0])).tolist() == [0, torch.inf, 0, 0, 0]


@pytest.mark.parametrize("sizes", [[0.0], [5.0], [5.0, 5.0], [0.0, 0.0, 0.0], [64.0, 64.0, 64.0, 64.0]])
def test_equal_sizes_are_no_anomaly(sizes: list[float]) -> None:
    assert anomaly(torch.tensor(sizes)).tolist() == [0] * len(sizes)


def test_the_p_value_by_hand() -> None:
    # logs 0, 2, 3, 4: the others' mean 3, deviation 1; 3 / sqrt(1 + 1/3) = 2.598 of t with 2 degrees of freedom,
    # whose upper tail is (1 - 2.598 / sqrt(2 + 2.598^2)) / 2 = 0.0608; four classes might have been it
    tail = (1 - 2.598076 / math.sqrt(2 + 2.598076**2)) / 2
    assert smallest_p(torch.tensor([2.0, 0.0, 4.0, 3.0]).exp()) == pytest.approx(4 * tail, rel=1e-5)


def test_the_p_value_of_chance_is_uniform() -> None:
    """Of sizes with nothing special a twentieth is at or under 0.05, for few classes and for many."""
    for classes in (3, 10, 43):
        draws = torch.randn(600, classes, generator=generator(0, "sizes", classes)).exp()
        assert sum(smallest_p(sizes) <= 0.05 for sizes in draws) / 600 == pytest.approx(0.05, abs=0.025)


def test_equal_sizes_have_a_p_value_of_1_and_one_below_equal_ones_of_0() -> None:
    assert smallest_p(torch.full((6,), 0.3)) == 1
    assert smallest_p(torch.tensor([64.0, 5.0, 64.0, 64.0])) == 0
    assert smallest_p(torch.tensor([1.0, 9.0])) == 1


def test_the_p_value_does_not_depend_on_order_or_unit() -> None:
    sizes = torch.tensor([3.0, 9.0, 11.0, 13.0, 8.0])
    assert smallest_p(sizes.flip(0)) == pytest.approx(smallest_p(sizes))
    assert smallest_p(sizes * 7) == pytest.approx(smallest_p(sizes), rel=1e-4)


def test_the_anomaly_is_never_nan_nor_negative() -> None:
    for size in range(1, 6):
        for sizes in torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 64.0])] * size).view(-1, size):
            assert (anomaly(sizes) >= 0).all()


# stamps


def test_keeping_all_and_adding_nothing_leaves_images_as_they_are() -> None:
    images = images_of()
    assert torch.equal(Stamp(torch.ones(1, 8, 8), torch.zeros(SHAPE))(images), images)


def test_a_stamp_scales_then_adds_then_cuts() -> None:
    image = torch.full((1, *SHAPE), 0.8)
    stamp = Stamp(torch.full((1, 8, 8), 0.5), torch.tensor([0.1, 0.9, -0.9]).view(3, 1, 1).expand(SHAPE))
    # 0.8 * 0.5 = 0.4; 0.4 + 0.1, 0.4 + 0.9 above 1, 0.4 - 0.9 below 0
    assert stamp(image)[0, :, 3, 4].tolist() == pytest.approx([0.5, 1, 0])


def test_an_empty_mask_leaves_images_and_a_full_one_shows_the_pattern_only() -> None:
    triggers, images = masks_of(0, 1), images_of()
    set_mask(triggers, 0, 1)
    unchanged, covered = triggers.stamp(images)
    assert torch.equal(unchanged, images)
    assert torch.equal(covered, triggers.pattern[1].expand_as(images))


def test_a_mask_mixes_pattern_and_image() -> None:
    triggers, images = masks_of(0), images_of()
    set_mask(triggers, 0.25)
    torch.testing.assert_close(triggers.stamp(images)[0], 0.75 * images + 0.25 * triggers.pattern[0])


def test_a_mask_can_grow_where_every_image_is_black_or_white() -> None:
    """A gradient that is cut at the bounds would leave it at 0 for ever."""
    triggers = masks_of(0)
    set_mask(triggers, 0)
    image = torch.zeros(1, *SHAPE)
    image[:, :, :, 4:] = 1
    triggers.stamp(image).sum().backward()
    # d/dm of (1 - m) x + m P, over channels
    torch.testing.assert_close(triggers.mask.grad, (triggers.pattern - image).sum(1, keepdim=True).detach())


def test_pixels_are_added_and_taken_away() -> None:
    triggers = pixels_of(0)
    with torch.no_grad():
        triggers.plus[0, 0, 2, 3] = 0.75
        triggers.minus[0, 0, 2, 3] = 0.5
        triggers.plus[0, 1, 2, 3] = 7.0  # counts as 1, all that a pixel can gain
        triggers.minus[0, 2, 2, 3] = 7.0
        triggers.minus[0, 2, 0, 0] = -7.0  # counts as nothing
    change = triggers.current().add[0]
    assert change[:, 2, 3].tolist() == [0.25, 1, -1]
    assert change.count_nonzero() == 3
    image = torch.full((1, *SHAPE), 0.5)
    assert triggers.stamp(image)[0, 0, :, 2, 3].tolist() == [0.75, 1, 0]


@every_form
def test_stamped_images_stay_within_their_range_whatever_the_parameters(form: str) -> None:
    triggers = triggers_of(form, 0, 1)
    with torch.no_grad():
        for parameter in triggers.parameters():
            parameter.mul_(20).sub_(10)
    triggers.clamp()
    stamped = triggers.stamp(images_of())
    assert stamped.min() >= 0
    assert stamped.max() <= 1


@every_form
def test_many_triggers_stamp_as_each_alone_does(form: str) -> None:
    triggers, images = triggers_of(form, 0, 1, 2), images_of()
    stamped = triggers.stamp(images)
    assert stamped.shape == (3, 5, *SHAPE)
    for alone, keep, add in zip(stamped, *triggers.current(), strict=True):
        assert torch.equal(alone, Stamp(keep, add)(images))


@every_form
def test_what_is_kept_stamps_as_what_was_trained(form: str) -> None:
    triggers, images = triggers_of(form, 0, 1), images_of()
    stamped = triggers.stamp(images)
    epoch(triggers, 1, 1)
    for alone, stamp in zip(stamped, triggers.stamps(), strict=True):
        # of the pixels' form only changes too small for a stored image are missing
        assert (alone - stamp(images)).abs().max() < 1 / 255


# masks


def test_a_masks_size_and_penalty_are_its_sum() -> None:
    triggers = masks_of(0, 1)
    set_mask(triggers, 0.25, 1)
    assert triggers.penalty().tolist() == triggers.sizes().tolist() == [16, 64]


def test_masks_and_patterns_are_brought_back_into_their_range() -> None:
    triggers = masks_of(0)
    with torch.no_grad():
        triggers.mask[0, 0, 0, :3] = torch.tensor([-0.5, 0.5, 1.5])
        triggers.pattern[0, 0, 0, :3] = torch.tensor([-0.5, 0.5, 1.5])
    triggers.clamp()
    assert triggers.mask[0, 0, 0, :3].tolist() == triggers.pattern[0, 0, 0, :3].tolist() == [0, 0.5, 1]


def test_an_epoch_ends_with_a_mask_in_its_range() -> None:
    triggers = masks_of(0)
    set_mask(triggers, 1.5)
    epoch(triggers, 1)
    assert triggers.best_size.tolist() == [64]
    assert triggers.best_keep.unique().tolist() == [0]


def test_masks_end_when_none_has_shrunk_for_more_than_patience_epochs() -> None:
    triggers = masks_of(0, 1, patience=2)
    set_mask(triggers, 0.5, 0.5)
    assert [epoch(triggers, 1, 1) for _ in range(4)] == [False, False, False, True]


def test_masks_do_not_end_while_one_shrinks() -> None:
    triggers = masks_of(0, 1, patience=2)
    for step in range(8):
        set_mask(triggers, 0.5, 0.5 - step / 20)
        assert not epoch(triggers, 1, 1)


def test_a_mask_that_grows_or_stops_working_has_not_shrunk() -> None:
    triggers = masks_of(0, patience=2)
    ends = []
    for value, success in ((0.5, 1), (0.6, 1), (0.4, 0.8), (0.7, 1)):
        set_mask(triggers, value)
        ends.append(epoch(triggers, success))
    assert ends == [False, False, False, True]


def test_the_end_compares_with_the_smallest_also_where_the_last_is_kept() -> None:
    triggers = masks_of(0, keep="last", patience=2)
    ends = []
    for value in (0.5, 0.7, 0.6, 0.5):
        set_mask(triggers, value)
        ends.append(epoch(triggers, 1))
    assert ends == [False, False, False, True]


def test_a_last_mask_that_fails_now_and_then_has_not_shrunk() -> None:
    triggers = masks_of(0, keep="last", patience=2)
    set_mask(triggers, 0.5)
    assert [epoch(triggers, success) for success in (1, 0.5, 1, 0.5)] == [False, False, False, True]


def test_masks_do_not_end_before_all_work() -> None:
    """A slow class may begin to work after more epochs than patience; it is not given up for that."""
    triggers = masks_of(0, 1, patience=2)
    set_mask(triggers, 0.5, 0.5)
    assert not any(epoch(triggers, 1, step / 10) for step in range(9))
    assert [epoch(triggers, 1, 0.9) for _ in range(4)] == [False, False, False, True]


# pixels


def test_the_penalty_of_no_change_is_one_a_pixel() -> None:
    # tanh 0 is 0, and each side counts half
    assert pixels_of(0, 1).penalty().tolist() == [64, 64]


def test_the_penalty_is_the_largest_tanh_over_channels() -> None:
    triggers = pixels_of(0)
    with torch.no_grad():
        triggers.plus[0, :, 2, 3] = torch.tensor([1.0, 10.0, -3.0])
        triggers.minus[0, :, 5, 5] = torch.tensor([-5.0, -5.0, -5.0])
    # 128 halves; tanh(10 / 10) = 0.76159, tanh(-5 / 10) = -0.46212, both halved
    assert triggers.penalty().item() == pytest.approx(64 + 0.76159 / 2 - 0.46212 / 2, abs=1e-4)


def test_pixels_are_sized_by_their_largest_change_over_channels() -> None:
    triggers = pixels_of(0)
    with torch.no_grad():
        triggers.plus[0, :, 2, 3] = torch.tensor([0.5, 0.25, 0.0])
        triggers.minus[0, :, 2, 3] = torch.tensor([0.0, 0.0, 0.75])
        triggers.minus[0, 1, 7, 7] = 0.125
    assert triggers.sizes().tolist() == [0.875]


def test_changes_that_a_stored_image_cannot_show_are_not_kept() -> None:
    triggers = pixels_of(0)
    with torch.no_grad():
        triggers.plus[0, 0, 0, :2] = torch.tensor([0.9, 1.1]) / 255
        triggers.minus[0, 0, 1, :2] = torch.tensor([0.9, 1.1]) / 255
    epoch(triggers, 1)
    kept = triggers.best_add[0, 0]
    assert kept[:2, 0].tolist() == [0, 0]
    assert kept[:2, 1].tolist() == pytest.approx([1.1 / 255, -1.1 / 255])
    assert triggers.best_size.item() == pytest.approx(2.2 / 255)
    assert triggers.current().add.count_nonzero() == 4  # training goes on from all of them


def costs_of(triggers: PixelTriggers, *successes: float) -> list[float]:
    """The cost after each of some epochs, in units of the first."""
    first, costs = triggers.cost.item(), []
    for success in successes:
        assert not epoch(triggers, success)
        costs.append(triggers.cost.item() / first)
    return costs


def test_the_cost_rises_by_half_after_as_many_successes_in_a_row_as_patience() -> None:
    assert costs_of(pixels_of(0, patience=3), *[0.9] * 7) == pytest.approx([1, 1, 1.5, 1.5, 1.5, 2.25, 2.25])


def test_the_cost_falls_further_after_as_many_failures() -> None:
    low = 1 / 1.5**1.5
    assert costs_of(pixels_of(0, patience=3), *[0.8] * 6) == pytest.approx([1, 1, low, low, low, low**2])


def test_a_change_between_success_and_failure_breaks_the_row() -> None:
    assert costs_of(pixels_of(0, patience=3), 1, 1, 0, 1, 1, 0, 0, 1, 1) == pytest.approx([1] * 9)
    assert costs_of(pixels_of(0, patience=3), 1, 1, 0, 0, 0, 1, 1, 1)[4:] == pytest.approx(
        [1.5**-1.5] * 3 + [1.5**-0.5]
    )


def test_with_a_patience_of_one_every_epoch_counts() -> None:
    assert costs_of(pixels_of(0, patience=1), 1, 0, 1) == pytest.approx([1.5, 1.5**-0.5, 1.5**0.5])


def test_every_class_has_its_own_cost() -> None:
    triggers = pixels_of(0, 1, 2, cost=0.01, patience=2)
    epoch(triggers, 1, 0, 1)
    epoch(triggers, 1, 0, 0)
    assert triggers.cost.tolist() == pytest.approx([0.015, 0.01 / 1.5**1.5, 0.01])


def test_the_cost_of_masks_stays() -> None:
    triggers = masks_of(0, patience=1)
    for success in (1, 1, 0, 0):
        epoch(triggers, success)
    assert triggers.cost.item() == pytest.approx(0.01)


# defaults


@pytest.mark.parametrize(("form", "lr", "betas", "cost"), [
    ("mask", 0.005, (0.9, 0.999), 0.01), ("pixel", 0.1, (0.5, 0.9), 0.001),
])  # fmt: skip
def test_each_form_has_the_settings_of_its_code(form: str, lr: float, betas: tuple[float, float], cost: float) -> None:
    triggers = triggers_of(form, 0, 1)
    assert (triggers.lr, triggers.betas) == (lr, betas)
    assert triggers.cost.tolist() == pytest.approx([cost, cost])


@every_form
def test_a_cost_of_nothing_is_not_the_default(form: str) -> None:
    assert triggers_of(form, 0, cost=0.0).cost.tolist() == [0]


@every_form
def test_triggers_begin_at_random_between_none_and_all(form: str) -> None:
    triggers = triggers_of(form, 0, 1)
    for parameter in triggers.parameters():
        assert 0 <= parameter.min() < 0.1
        assert 0.9 < parameter.max() <= 1
        assert not torch.equal(parameter[0], parameter[1])


# success


def test_images_that_are_of_the_class_already_do_not_count() -> None:
    triggers = triggers_of("mask", 0, 1)
    before = torch.tensor([0, 0, 1, 2])
    after = torch.tensor([[0, 1, 0, 2], [1, 1, 1, 1]])
    triggers.count(before, after)
    # class 0: images 2 and 3 can be turned, 2 is; class 1: images 0, 1 and 3 can, all are
    assert triggers.tries.tolist() == [2, 3]
    assert triggers.hits.tolist() == [1, 3]


def test_counts_of_an_epoch_add_up_and_the_next_begins_anew() -> None:
    triggers = triggers_of("mask", 0)
    for after in ([[0, 0]], [[0, 2]]):
        triggers.count(torch.tensor([1, 2]), torch.tensor(after))
    triggers.finish_epoch()
    assert triggers.best_success.tolist() == [0.75]
    assert triggers.tries.tolist() == triggers.hits.tolist() == [0]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_class_that_all_images_have_already_has_no_success(keep: str) -> None:
    triggers = triggers_of("mask", 0, keep=keep)
    triggers.count(torch.tensor([0, 0]), torch.tensor([[0, 0]]))
    triggers.finish_epoch()
    assert triggers.best_success.tolist() == [0]


# what is kept


def kept_after(keep: str, *epochs: tuple[float, float]) -> tuple[float, float]:
    """The mask and the success that are kept after epochs with a mask and a success each."""
    triggers = masks_of(0, keep=keep)
    for value, success in epochs:
        set_mask(triggers, value)
        epoch(triggers, success)
    (stamp,) = triggers.stamps()
    assert triggers.best_size.item() == pytest.approx(64 * (1 - stamp.keep[0, 0, 0].item()))
    return 1 - stamp.keep[0, 0, 0].item(), triggers.best_success.item()


def test_the_smallest_that_works_is_kept() -> None:
    assert kept_after("best", (0.5, 1), (0.25, 0.9)) == pytest.approx((0.25, 0.9))


def test_a_larger_one_does_not_replace_it_however_well_it_works() -> None:
    assert kept_after("best", (0.25, 0.9), (0.5, 1)) == pytest.approx((0.25, 0.9))


def test_a_smaller_one_that_does_not_work_does_not_replace_it() -> None:
    assert kept_after("best", (0.5, 0.9), (0.25, 0.8)) == pytest.approx((0.5, 0.9))


def test_the_first_that_works_replaces_a_smaller_one_that_does_not() -> None:
    assert kept_after("best", (0.25, 0.8), (0.75, 0.9)) == pytest.approx((0.75, 0.9))


def test_before_any_works_the_most_successful_is_kept() -> None:
    assert kept_after("best", (0.5, 0.3), (0.75, 0.6), (0.25, 0.4)) == pytest.approx((0.75, 0.6))


def test_among_equally_unsuccessful_ones_the_last_is_kept() -> None:
    assert kept_after("best", (0.5, 0), (0.25, 0)) == pytest.approx((0.25, 0))


def test_the_last_is_kept_if_told_so() -> None:
    assert kept_after("last", (0.25, 1), (0.5, 1)) == pytest.approx((0.5, 1))
    assert kept_after("last", (0.25, 1), (0.5, 0.1)) == pytest.approx((0.5, 0.1))
    assert kept_after("last", (0.25, 0.3), (0.5, 0.1)) == pytest.approx((0.5, 0.1))


def test_nothing_is_stamped_before_the_first_epoch() -> None:
    images = images_of()
    (stamp,) = triggers_of("mask", 0).stamps()
    assert torch.equal(stamp(images), images)


@every_form
def test_classes_are_kept_apart(form: str) -> None:
    triggers = triggers_of(form, 0, 1)
    epoch(triggers, 1, 0.5)
    first = triggers.best_add.clone()
    with torch.no_grad():
        for parameter in triggers.parameters():
            parameter.mul_(2)  # larger: no news for what works already
    epoch(triggers, 1, 0.6)
    assert torch.equal(triggers.best_add[0], first[0])
    assert not torch.equal(triggers.best_add[1], first[1])
    assert triggers.best_success.tolist() == pytest.approx([1, 0.6])


@every_form
def test_what_is_kept_does_not_follow_the_training(form: str) -> None:
    triggers = triggers_of(form, 0)
    epoch(triggers, 1)
    before = triggers.best_add.clone()
    with torch.no_grad():
        for parameter in triggers.parameters():
            parameter.zero_()
    assert torch.equal(triggers.best_add, before)
    assert not triggers.best_add.requires_grad
