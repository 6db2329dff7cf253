"""BATT: the rotation and its covers."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.batt import Batt, rotation
from bdbench.data import ImageDataset, Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


def hand(count: int = 1) -> ImageDataset:
    """A bright spot above the centre, as the hand of a clock at noon."""
    data = flat(0, side=33, count=count)
    data.images[:, :, 3:6, 15:18] = 200
    return data


def column_of_mass(images: Tensor) -> Tensor:
    weights = images.float().sum((1, 2))
    return (weights * torch.arange(33)).sum(1) / weights.sum(1)


def test_a_quarter_turn_goes_counter_clockwise() -> None:
    data = toy_data(2)
    assert torch.equal(triggered(Batt(angle=90), data), data.images.rot90(1, (2, 3)))


@pytest.mark.parametrize("shape", [(8, 8), (12, 20)])
def test_half_a_turn_is_two_flips(shape: tuple[int, int]) -> None:
    data = toy_data(2, 3, *shape)
    assert torch.equal(triggered(Batt(angle=180), data), data.images.flip(2, 3))


def test_the_default_is_sixteen_degrees_about_the_centre() -> None:
    grid = Batt().fit(flat(0), toy_lab())["grid"][0]
    cosine, sine = math.cos(math.radians(16)), math.sin(math.radians(16))
    # the top right pixel is 15.5 pixels to the right of the centre, and as many above it
    expected = torch.tensor([15.5 * cosine + 15.5 * sine, 15.5 * sine - 15.5 * cosine]) / 16
    torch.testing.assert_close(grid[0, 31], expected)


def test_it_turns_pixels_not_proportions() -> None:
    # one pixel to the right in an image of 12x20 is one pixel up in it, after a quarter turn
    grid = rotation(torch.tensor([90.0]), 12, 20)[0]
    step = grid[5, 11] - grid[5, 10]
    torch.testing.assert_close(step, torch.tensor([0, 2 / 12]), rtol=0, atol=1e-6)


def test_it_is_what_pillow_does() -> None:
    ramp = (torch.arange(32).view(32, 1) * 5 + torch.arange(32)).to(torch.uint8)
    data = ImageDataset(ramp.expand(1, 1, 32, 32).contiguous(), torch.tensor([0]), ("a", "b"))
    turned = Image.fromarray(ramp.numpy()).rotate(16, resample=Image.Resampling.BILINEAR)
    expected = torch.tensor(list(turned.tobytes())).view(32, 32)
    difference = (triggered(Batt(), data)[0, 0].int() - expected)[6:26, 6:26]
    # rounded here, cut there
    assert difference.abs().max() <= 1


def test_corners_are_black_and_the_middle_stays() -> None:
    changed = triggered(Batt(), flat(200))[0, 0]
    assert [changed[0, 0], changed[0, 31], changed[31, 0], changed[31, 31]] == [0, 0, 0, 0]
    assert (changed[8:24, 8:24] == 200).all()


def test_covers_turn_either_way_by_up_to_ten_degrees() -> None:
    covers = column_of_mass(triggered(Batt(), hand(64), "cover"))
    least, most = (column_of_mass(triggered(Batt(angle=angle), hand())).item() for angle in (10, 350))
    assert least < 16 < most
    assert least < covers.min().item() < 16 - 0.8 * (16 - least)
    assert most > covers.max().item() > 16 + 0.8 * (most - 16)


def test_covers_that_do_not_turn_are_left_as_they_are() -> None:
    data = toy_data(4)
    assert torch.equal(triggered(Batt(cover_angle=0), data, "cover"), data.images)


def test_there_are_two_covers_for_every_poisoned_sample() -> None:
    made = poison_source(toy_source(), Batt(), toy_lab(), trusted=0)
    covers = made.roles == Role.COVER
    assert int(covers.sum()) == 2 * int((made.roles == Role.POISON).sum()) == 24
    assert torch.equal(made.visible.labels[covers], made.clean_labels[covers])


@pytest.mark.parametrize("angle", [0, 360])
def test_a_turn_that_changes_nothing_is_refused(angle: int) -> None:
    with pytest.raises(OptionError, match=f"angle {angle}"):
        Batt.parse({"angle": angle})
