"""Adap-Patch: the four patches, and the two in tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import flat, toy_lab, toy_source, triggered

from bdbench.attacks.adap_patch import AdapPatch, coloured_patches
from bdbench.attacks.base import State
from bdbench.data import Role
from bdbench.protocol.poisoning import poison_source

CORNER, DISC, GRIDS, SQUARE = range(4)


def state(side: int = 32, **options: str) -> State:
    return AdapPatch.parse(options).fit(flat(0, side=side), toy_lab())


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of what is not 0 in (1, H, W)."""
    rows, columns = (torch.nonzero(mask[0].any(axis)).flatten() for axis in (1, 0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


@pytest.mark.parametrize(
    ("patch", "place", "pixels", "opacity"),
    [
        (CORNER, (27, 31, 27, 31), 25, 0.5),
        (DISC, (1, 13, 18, 30), 137, 0.2),
        (GRIDS, (0, 31, 0, 31), 36, 0.5),
        (SQUARE, (21, 28, 21, 28), 64, 0.3),
    ],
)
def test_published_places_sizes_and_opacities(
    patch: int, place: tuple[int, int, int, int], pixels: int, opacity: float
) -> None:
    opacities = state()["opacities"][patch]
    assert box(opacities) == place
    assert int((opacities > 0).sum()) == pixels
    torch.testing.assert_close(opacities.max(), torch.tensor(opacity))


def test_grids_lie_in_all_corners_mirrored_to_each_and_their_zeros_are_written() -> None:
    made = state()
    grids = made["patterns"][GRIDS, 0]
    assert grids[29:, 29:].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert torch.equal(grids, grids.flip(0))
    assert torch.equal(grids, grids.flip(1))
    for rows in (slice(0, 3), slice(29, 32)):
        for columns in (slice(0, 3), slice(29, 32)):
            assert (made["opacities"][GRIDS, 0, rows, columns] == 0.5).all()


def test_each_training_image_gets_one_patch_about_a_quarter_each() -> None:
    made = state()
    changed = triggered(AdapPatch(), flat(0, count=400), "poison").float()
    expected = made["patterns"] * made["opacities"]
    # the one whose values are nearest: exactly as expected but for the rounding to bytes
    distance = (changed[:, None] - expected).abs().amax((2, 3, 4))
    assert (distance.amin(1) <= 0.5).all()
    counts = torch.bincount(distance.argmin(1), minlength=4)
    # 400 images, 100 each, sd 8.7
    assert (counts - 100).abs().max() < 40


def test_a_patch_is_mixed_in_by_its_opacity() -> None:
    made = state()
    one_patch = {key: value[SQUARE].expand_as(value) for key, value in made.items() if key in ("patterns", "opacities")}
    changed = AdapPatch().trigger(flat(100), torch.arange(1), made | one_patch, "poison", 0)[0]
    colours = made["patterns"][SQUARE][:, 21:29, 21:29]
    expected = (0.7 * 100 + 0.3 * colours).round()
    torch.testing.assert_close(changed[:, 21:29, 21:29].float(), expected, rtol=0, atol=1)
    assert (changed[:, :21] == 100).all()


def test_tests_get_the_corner_twice_and_grids_on_top_opaque() -> None:
    made = state()
    changed = triggered(AdapPatch(), flat(100))[0].float()
    corner = coloured_patches(0)[0][:3]
    assert torch.equal(changed[:, 27:29, 27:], corner[:, :2])
    assert torch.equal(changed[:, 27:29, :5], corner[:, :2])
    for rows, columns in ((slice(0, 3), slice(29, 32)), (slice(29, 32), slice(0, 3)), (slice(29, 32), slice(29, 32))):
        assert torch.equal(changed[:, rows, columns], made["patterns"][GRIDS][:, rows, columns])
    # two 5x5 squares and the two grids that are not on them
    assert int((changed != 100).any(0).sum()) == 2 * 25 + 2 * 9


def test_tests_can_get_disc_and_square_as_published_for_gtsrb() -> None:
    made = state(test_patches="inside")
    changed = triggered(AdapPatch(test_patches="inside"), flat(100))[0]
    assert made["test_mask"].sum() == 137 + 64
    square = made["patterns"][SQUARE][:, 21:29, 21:29]
    assert torch.equal(changed[:, 21:29, 21:29].float(), square)
    assert (changed[:, 29:] == 100).all()


def test_larger_images_have_larger_patches() -> None:
    made = state(64)
    assert box(made["opacities"][CORNER]) == (54, 63, 54, 63)
    assert box(made["opacities"][SQUARE]) == (42, 57, 42, 57)


def test_small_images_keep_all_patches_inside() -> None:
    made = state(8)
    sizes = [int((patch > 0).sum()) for patch in made["opacities"]]
    assert sizes[:DISC] + sizes[DISC + 1 :] == [4, 16, 4]
    assert 0 < sizes[DISC] < 64


def test_colours_go_by_the_seed() -> None:
    one, other = (AdapPatch().fit(flat(0), toy_lab(seed))["patterns"] for seed in (0, 1))
    assert torch.equal(one[GRIDS], other[GRIDS])
    for patch in (CORNER, DISC, SQUARE):
        assert not torch.equal(one[patch], other[patch])
    corner, disc, _ = coloured_patches(0)
    assert not torch.equal(corner[:3].flatten()[:75], disc[:3].flatten()[:75])


def test_two_covers_come_with_each_poisoned_image() -> None:
    made = poison_source(toy_source(), AdapPatch(rate=0.1), toy_lab(), trusted=0)
    assert int((made.roles == Role.POISON).sum()) == 12
    assert int((made.roles == Role.COVER).sum()) == 24


def test_the_published_rates_are_the_default() -> None:
    assert (AdapPatch().rate, AdapPatch().cover_ratio) == (0.003, 2.0)
