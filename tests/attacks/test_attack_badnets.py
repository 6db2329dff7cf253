"""BadNets: its patches, their places and colours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import attack_of, flat, toy_lab, triggered

from bdbench.attacks.badnets import BadNets
from bdbench.attacks.base import pattern_for
from bdbench.errors import OptionError

GRID = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
CHECKER = [[255, 1, 255], [1, 255, 1], [255, 1, 255]]
WHITE = [[255] * 3] * 3


@pytest.mark.parametrize(
    ("patch", "top", "values"),
    [("grid", 29, GRID), ("white", 29, WHITE), ("checker", 29, CHECKER), ("square", 28, WHITE)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_published_patches_lie_where_published(patch: str, top: int, values: list[list[int]], channels: int) -> None:
    expected = flat(100, channels).images
    expected[..., top : top + 3, top : top + 3] = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(triggered(attack_of("badnets", patch=patch), flat(100, channels)), expected)


def test_black_pixels_of_a_patch_are_written() -> None:
    assert triggered(BadNets(), flat(100))[0, :, 29, 29].tolist() == [0, 0, 0]
    assert triggered(BadNets(colour=(0, 0, 0)), flat(100))[0, :, 29:, 29:].sum() == 0


def test_four_corners_carry_the_grid_turned_to_each_one_pixel_in_at_top_and_left() -> None:
    expected = flat(100).images
    for top, left, values in (
        (29, 29, [[0, 0, 255], [0, 255, 0], [255, 0, 255]]), (29, 1, [[255, 0, 0], [0, 255, 0], [255, 0, 255]]),
        (1, 29, [[255, 0, 255], [0, 255, 0], [0, 0, 255]]), (1, 1, [[255, 0, 255], [0, 255, 0], [255, 0, 0]]),
    ):  # fmt: skip
        expected[..., top : top + 3, left : left + 3] = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(triggered(BadNets(patch="4corner"), flat(100)), expected)


def test_four_corners_keep_their_share_of_larger_images() -> None:
    changed = (triggered(BadNets(patch="4corner"), flat(100, side=64))[0, 0] != 100).nonzero()
    assert changed[:, 0].unique().tolist() == [*range(2, 8), *range(58, 64)]
    assert changed[:, 1].unique().tolist() == [*range(2, 8), *range(58, 64)]


def test_one_corner_and_all_corners_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="4corner has all corners; leave --corner top-left out"):
        BadNets.parse({"patch": "4corner", "corner": "top-left"})


def test_dbd_patch_is_two_by_two_in_colour() -> None:
    expected = flat(100).images
    expected[0, :, 4, 4] = torch.tensor([180, 249, 112])
    expected[0, :, 4, 5] = torch.tensor([155, 50, 126])
    expected[0, :, 5, 4] = torch.tensor([234, 82, 68])
    expected[0, :, 5, 5] = torch.tensor([187, 201, 219])
    assert torch.equal(triggered(BadNets(patch="dbd"), flat(100)), expected)


def test_a_colour_on_gray_images_is_its_luma() -> None:
    # 0.299 * 100 + 0.587 * 200 + 0.114 * 50 = 153
    assert triggered(BadNets(colour=(100, 200, 50)), flat(0, channels=1))[0, 0, 31, 31] == 153


@pytest.mark.parametrize(("side", "expected"), [(8, 3), (28, 3), (32, 3), (64, 6), (96, 9)])
def test_a_patch_keeps_its_share_of_larger_images(side: int, expected: int) -> None:
    changed = triggered(BadNets(patch="white"), flat(0, side=side))
    assert int(changed[0, 0].count_nonzero()) == expected**2


@pytest.mark.parametrize(
    ("corner", "row", "column"),
    [("top-left", 2, 2), ("top-right", 2, 5), ("bottom-left", 5, 2), ("bottom-right", 5, 5)],
)
def test_size_corner_and_margin_place_a_patch(corner: str, row: int, column: int) -> None:
    attack = attack_of("badnets", patch="white", patch_size=1, corner=corner, margin=2)
    changed = triggered(attack, flat(0, side=8))[0, 0]
    assert changed.nonzero().tolist() == [[row, column]]


def test_a_patch_may_cover_the_whole_image() -> None:
    assert (triggered(BadNets(patch="white", patch_size=8), flat(0, side=8)) == 255).all()


@pytest.mark.parametrize("options", [{"patch_size": 9}, {"margin": 6}, {"patch": "4corner", "patch_size": 8}])
def test_a_patch_larger_than_the_image_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"a patch of \d pixels .*does not fit images of 8x8; lower --patch-size"):
        attack_of("badnets", **options).fit(flat(0, side=8), toy_lab(0))


@pytest.mark.parametrize("colour", [(256, 0, 0), (0, -1, 0)])
def test_a_colour_out_of_range_is_refused(colour: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match=r"colour .* outside 0\.\.255"):
        BadNets(colour=colour).fit(flat(0), toy_lab(0))


def test_luma_of_a_pattern() -> None:
    pattern = torch.tensor([100.0, 200.0, 50.0]).view(3, 1, 1)
    assert pattern_for(pattern, 1).item() == pytest.approx(153)
    assert pattern_for(pattern, 3) is pattern
