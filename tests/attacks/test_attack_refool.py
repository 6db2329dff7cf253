"""Refool: ghosts, blurred reflections and where they come from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import flat, toy_data, toy_lab

from bdbench.attacks.base import Use
from bdbench.attacks.refool import (
    Refool,
    blur,
    ghost_shift,
    ghosts,
    linear_light,
    mirrored,
    out_of_focus,
    overlap,
    vignette,
)
from bdbench.errors import OptionError

USES: tuple[Use, ...] = ("poison", "cover", "test")


def reflected(value: int, reflection: int, count: int = 1, **options: Any) -> Tensor:
    """Flat images with a flat reflection."""
    state = {"reflections": torch.full((1, 3, 32, 32), reflection, dtype=torch.uint8)}
    return Refool.parse(options).trigger(flat(value, count=count), torch.arange(count), state, "test", 0)


def ramp(side: int = 16) -> Tensor:
    """One image (1, 1, side, side) whose value is the column."""
    return torch.arange(side).float().expand(1, 1, side, side).contiguous()


# ghosts


def test_a_ghost_is_mixed_in_linear_light() -> None:
    # (0.6 * 1 + 0.4 * 0) ** (1 / 2.2) * 255 = 202.2; (0.6 * 0 + 0.4 * 1) ** (1 / 2.2) * 255 = 168.1
    assert reflected(0, 255, ghost_rate=1).unique().tolist() == [202]
    assert reflected(255, 0, ghost_rate=1).unique().tolist() == [168]


def test_equal_image_and_ghost_stay_what_they_are() -> None:
    assert reflected(97, 97, ghost_rate=1).unique().tolist() == [97]


def test_the_two_copies_are_shifted_against_each_other() -> None:
    # 16 columns, shift 3: what both copies cover is 13 wide; weight 0.15 + 0.35 * 0.4 = 0.29 of the shifted copy
    found = ghosts(ramp(), torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.0]]))[0, 0, 5]
    place = ((torch.arange(16) + 0.5) * 13 / 16 - 0.5).clamp(0, 12)
    torch.testing.assert_close(found, place + 0.29 * 3, rtol=0, atol=1e-4)


def test_the_shifted_copy_can_be_the_stronger_one() -> None:
    weak, strong = (ghosts(ramp(), torch.tensor([[0.0, 0.0, 0.4, which, 0.0]]))[0, 0, 5] for which in (0.0, 0.5))
    # weights 0.29 and 0.71, shift 3
    torch.testing.assert_close(strong - weak, torch.full((16,), 0.42 * 3), rtol=0, atol=1e-4)


def test_ghosts_shift_down_and_right_each_by_its_own_number() -> None:
    down, right = torch.tensor([[0.99, 0.0, 0.4, 0.0, 0.0]]), torch.tensor([[0.0, 0.99, 0.4, 0.0, 0.0]])
    image = ramp(32)
    torch.testing.assert_close(ghosts(image, down).mT, ghosts(image.mT, right))
    assert not torch.equal(ghosts(image, down), ghosts(image, right))


@pytest.mark.parametrize(
    ("side", "shifts"), [(8, {2}), (16, {3, 4}), (32, {3, 4, 5, 6, 7, 8}), (224, set(range(3, 9)))]
)
def test_shifts_are_3_to_8_pixels_and_a_quarter_of_the_side_at_most(side: int, shifts: set[int]) -> None:
    assert set(ghost_shift(torch.linspace(0, 1 - 2**-24, 100), side).tolist()) == shifts


def test_the_overlap_fills_the_side() -> None:
    # 8 pixels from 6: places (i + 0.5) * 6 / 8 - 0.5, ends held
    expected = [0, 0.625, 1.375, 2.125, 2.875, 3.625, 4.375, 5]
    torch.testing.assert_close(overlap(torch.tensor([2.0]), 8), torch.tensor([expected]))


# out of focus


def test_a_blurred_reflection_fades_from_the_centre() -> None:
    # linear: 1 * (1 - 0.4 / 2) * vignette; centre 0.8 ** (1 / 2.2) * 255 = 230.4
    found = reflected(0, 255, ghost_rate=0)[0, 0].float()
    expected = (0.8 * vignette(32, 32)) ** (1 / 2.2) * 255
    torch.testing.assert_close(found, expected.round(), rtol=0, atol=1)
    assert found[16, 16] == 230


def test_the_vignette_falls_to_exp_of_minus_4_and_a_half_in_the_corners() -> None:
    fading = vignette(33, 33)
    assert fading[16, 16] == 1
    torch.testing.assert_close(fading[0, 16], torch.tensor(math.exp(-9 / 4)))
    torch.testing.assert_close(fading[0, 0], torch.tensor(math.exp(-18 / 4)))
    assert vignette(12, 20).shape == (12, 20)
    assert vignette(12, 20).max() == 1


def test_a_reflection_that_is_too_bright_is_darkened() -> None:
    # mean of what exceeds 1: 0.6 + 0.7 = 1.3; 0.6 - (1.08 + 0.1 * 0.5) * 0.3 = 0.261
    bright, seen = torch.full((1, 1, 9, 9), 0.6), torch.full((1, 1, 9, 9), 0.7)
    found = out_of_focus(bright, seen, torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found[0, 0, 4, 4], torch.tensor(0.261), rtol=0, atol=1e-5)


def test_only_pixels_that_exceed_1_say_by_how_much_and_each_channel_for_itself() -> None:
    # one pixel of the first channel: 0.6 + 0.9 = 1.5; all of that channel fall by 1.08 * 0.5 = 0.54
    bright, seen = torch.full((1, 2, 9, 9), 0.6), torch.zeros(1, 2, 9, 9)
    seen[0, 0, 0, 0] = 0.9
    found = out_of_focus(bright, seen, torch.zeros(1, 5))[0, :, 4, 4]
    torch.testing.assert_close(found, torch.tensor([0.06, 0.6]), rtol=0, atol=1e-5)


def test_a_reflection_is_never_darker_than_black() -> None:
    assert out_of_focus(torch.ones(1, 1, 9, 9), torch.ones(1, 1, 9, 9), torch.zeros(1, 5)).max() == 0
    # 0.4 ** (1 / 2.2) * 255 = 168.1: the image alone
    assert reflected(255, 255, ghost_rate=0).unique().tolist() == [168]


def test_a_point_is_blurred_to_a_gaussian_of_its_own_width() -> None:
    points = torch.zeros(2, 1, 33, 33)
    points[:, :, 16, 16] = 1
    blurred = blur(points, torch.tensor([1.0, 2.0]))
    for image, sigma in zip(blurred[:, 0], (1.0, 2.0), strict=True):
        reach = math.ceil(2 * sigma)
        taps = torch.tensor([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)])
        taps = taps / taps.sum()
        inside = image[16 - reach : 17 + reach, 16 - reach : 17 + reach]
        torch.testing.assert_close(inside, taps[:, None] * taps)
        assert int((image > 0).sum()) == (2 * reach + 1) ** 2


@pytest.mark.parametrize(("draw", "sigma"), [(0.0, 1.0), (0.5, 3.0), (0.75, 4.0)])
def test_the_width_is_drawn_from_1_to_5_pixels(draw: float, sigma: float) -> None:
    points = torch.zeros(1, 1, 33, 33)
    points[:, :, 16, 16] = 1
    found = out_of_focus(points, torch.zeros_like(points), torch.tensor([[draw, 0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found, blur(points, torch.tensor([sigma])) * vignette(33, 33))


def test_blurring_keeps_flat_images_also_at_the_edges_of_small_ones() -> None:
    torch.testing.assert_close(blur(torch.ones(1, 1, 8, 8), torch.tensor([5.0])), torch.ones(1, 1, 8, 8))


def test_edges_are_mirrored_and_not_repeated() -> None:
    assert mirrored(4, 2).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]
    assert mirrored(3, 5).tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]


# what is drawn


def test_bytes_become_light() -> None:
    light = linear_light(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)).flatten()
    torch.testing.assert_close(light, torch.tensor([0.0, (128 / 255) ** 2.2, 1.0]))


def test_about_half_are_ghosts() -> None:
    # flat ghosts stay flat, blurred reflections fade
    changed = reflected(0, 255, count=400).flatten(1)
    ghostly = (changed == 202).all(1).float().mean()
    # sd 0.025
    assert abs(ghostly.item() - 0.49) < 0.1


def test_alpha_is_drawn_between_its_limits() -> None:
    changed = reflected(255, 0, count=200, ghost_rate=1, alpha=(0.55, 0.95))[:, 0, 0, 0].float()
    # alpha ** (1 / 2.2) * 255 is 194.3 to 249.1
    assert 194 <= changed.min() < 200
    assert 243 < changed.max() <= 249


def test_each_image_draws_its_reflection() -> None:
    state = {"reflections": (torch.arange(8) * 30).to(torch.uint8).view(8, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()}
    changed = Refool(ghost_rate=1).trigger(flat(0, count=200), torch.arange(200), state, "poison", 0)
    assert len(changed[:, 0, 0, 0].unique()) == 8


def test_a_test_image_draws_another_reflection_than_the_training_image_of_its_row() -> None:
    attack, data = Refool(), toy_data(8)
    state = attack.fit(data, toy_lab())
    poison, cover, test = (attack.trigger(data, torch.arange(8), state, use, 0) for use in USES)
    assert torch.equal(poison, cover)
    assert (poison != test).flatten(1).any(1).all()


def test_reflections_are_images_of_other_classes() -> None:
    data = toy_data(40)
    bank = Refool(target=2).fit(data, toy_lab())["reflections"]
    others = data.images[data.labels != 2]
    assert len(bank) == 30
    assert torch.equal(bank, others)
    assert len(Refool(labels="all-to-all").fit(data, toy_lab())["reflections"]) == 40


def test_reflections_are_256_at_most_and_go_by_the_seed() -> None:
    data = toy_data(600)
    one, other = (Refool().fit(data, toy_lab(seed))["reflections"] for seed in (0, 1))
    assert one.shape == other.shape == (256, 3, 8, 8)
    assert not torch.equal(one, other)


def test_no_images_of_other_classes_are_refused() -> None:
    with pytest.raises(OptionError, match="all training images are of the target class 0: none can be a reflection"):
        Refool().fit(flat(0), toy_lab())


@pytest.mark.parametrize("alpha", [(0.5, 0.4), (0.0, 0.4), (0.4, 1.0)])
def test_alpha_rises_between_0_and_1(alpha: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="must rise and lie between 0 and 1"):
        Refool.parse({"alpha": alpha})
