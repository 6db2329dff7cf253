"""Adap-k-way: one pixel in training, four in tests."""

from __future__ import annotations

import pytest
import torch
from toys import flat, toy_lab, triggered

from bdbench.attacks.adap_kway import AdapKWay

PUBLISHED = {(16, 11): [92, 0, 24], (27, 5): [88, 112, 110], (7, 30): [0, 32, 46], (22, 22): [11, 49, 95]}


def test_tests_get_the_four_published_pixels() -> None:
    changed = triggered(AdapKWay(), flat(200))[0]
    found = {(row, column): changed[:, row, column].tolist() for row, column in PUBLISHED}
    assert found == PUBLISHED
    assert int((changed != 200).any(0).sum()) == 4


@pytest.mark.parametrize("use", ["poison", "cover"])
def test_each_training_image_gets_one_of_them_about_a_quarter_each(use: str) -> None:
    changed = triggered(AdapKWay(), flat(200, count=400), use)  # type: ignore[arg-type]
    assert ((changed != 200).any(1).flatten(1).sum(1) == 1).all()
    counts = torch.tensor([int((changed[:, 2, row, column] != 200).sum()) for row, column in PUBLISHED])
    assert int(counts.sum()) == 400
    # 100 each, sd 8.7
    assert (counts - 100).abs().max() < 40


def test_a_training_pixel_has_its_colour() -> None:
    changed = triggered(AdapKWay(), flat(200, count=20), "poison")
    for image in changed:
        (place,) = torch.nonzero((image != 200).any(0)).tolist()
        assert image[:, place[0], place[1]].tolist() == PUBLISHED[place[0], place[1]]


@pytest.mark.parametrize(
    ("side", "place", "size"),
    # 16 and 11 of 32; a pixel of 32 becomes ceil(side / 32)
    [(64, (32, 22), 2), (48, (24, 16), 2), (28, (14, 9), 1), (224, (112, 77), 7)],
)
def test_places_and_sizes_go_with_the_image(side: int, place: tuple[int, int], size: int) -> None:
    mask = AdapKWay().fit(flat(0, side=side), toy_lab())["masks"][0, 0]
    assert int(mask.sum()) == size**2
    assert mask[place[0] : place[0] + size, place[1] : place[1] + size].all()


@pytest.mark.parametrize("side", [8, 9, 31, 33, 40, 63])
def test_pixels_stay_inside_and_apart_at_any_size(side: int) -> None:
    masks = AdapKWay().fit(flat(0, side=side), toy_lab())["masks"]
    assert masks.flatten(1).sum(1).tolist() == [(side + 31) // 32 * ((side + 31) // 32)] * 4
    assert (masks.sum(0) <= 1).all()


def test_gray_images_get_the_luma() -> None:
    # 0.299 * 92 + 0.114 * 24 = 30.2
    assert triggered(AdapKWay(), flat(200, channels=1))[0, 0, 16, 11] == 30


def test_the_published_rates_are_the_default() -> None:
    assert (AdapKWay().rate, AdapKWay().cover_ratio) == (0.003, 1.0)
