"""Adap-Blend: its pieces, its two strengths and its covers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.adap_blend import AdapBlend, piece_masks
from bdbench.attacks.base import Use
from bdbench.attacks.blended import Blended
from bdbench.data import Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source

UNSET = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))


def stamped(value: int, use: Use, **options: float) -> Tensor:
    """One flat image, blended with a flat picture."""
    state = {"pattern": torch.full((3, 32, 32), 255.0)}
    return AdapBlend.parse(options).trigger(flat(value), torch.arange(1), state, use, 0)[0]


def test_pieces_with_the_smallest_numbers_are_kept() -> None:
    draws = torch.tensor([[0.9, 0.1, 0.2, 0.8]])
    assert piece_masks(draws, 2, 2, 2).tolist() == [[[[0, 1], [1, 0]]]]
    assert piece_masks(draws, 1, 4, 4)[0, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2


def test_half_of_the_area_is_kept() -> None:
    masks = piece_masks(UNSET, 8, 32, 32)
    assert masks.shape == (5, 1, 32, 32)
    assert masks.mean((1, 2, 3)).tolist() == [0.5] * 5


def test_pieces_differ_by_a_pixel_where_they_do_not_divide_the_side() -> None:
    # 10 rows in 4 pieces: 3, 2, 3, 2; each keeps the first piece of the columns
    column = (torch.arange(16.0) % 4 > 0).float()[None]
    assert piece_masks(column, 4, 10, 8)[0, 0].sum(1).tolist() == [2] * 10
    upper = piece_masks(torch.arange(16.0)[None], 4, 10, 8)[0, 0]
    assert upper.sum(1).tolist() == [8, 8, 8, 0, 0, 0, 0, 0, 0, 0]


def test_training_images_get_half_of_the_picture_at_0_15() -> None:
    # 0.85 * 100 + 0.15 * 255 = 123.25
    changed = stamped(100, "poison")
    assert changed.unique().tolist() == [100, 123]
    assert int((changed[0] == 123).sum()) == 512


def test_tests_get_all_of_the_picture_at_0_2() -> None:
    # 0.8 * 100 + 0.2 * 255 = 131
    assert stamped(100, "test").unique().tolist() == [131]


def test_both_shares_can_be_set() -> None:
    # 0.5 * 100 + 0.5 * 255 = 177.5, even; 0.6 * 100 + 0.4 * 255 = 162
    assert stamped(100, "poison", alpha=0.5).unique().tolist() == [100, 178]
    assert stamped(100, "test", alpha_test=0.4).unique().tolist() == [162]


def test_each_image_draws_its_pieces() -> None:
    changed = triggered(AdapBlend(), flat(0, count=20), "poison")
    assert len(changed.flatten(1).unique(dim=0)) > 15
    assert torch.equal(changed, triggered(AdapBlend(), flat(0, count=20), "cover"))


def test_a_users_picture_is_part_of_the_id() -> None:
    assert AdapBlend.parse({"picture": "here.png"}).files() == (Path("here.png"),)
    assert AdapBlend().files() == ()


def test_the_picture_is_that_of_blended() -> None:
    one, other = (attack.fit(flat(0), toy_lab())["pattern"] for attack in (AdapBlend(), Blended()))
    assert torch.equal(one, other)


def test_pieces_and_their_number_can_be_set() -> None:
    changed = stamped(100, "poison", pieces_per_side=2, kept=1)
    assert int((changed[0] == 123).sum()) == 256


def test_more_pieces_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(OptionError, match="kept 8 is more than the 4 pieces there are; lower it"):
        AdapBlend.parse({"pieces_per_side": 2})


def test_as_many_covers_as_poison_come_from_all_classes() -> None:
    made = poison_source(toy_source(), AdapBlend(rate=0.25), toy_lab(), trusted=0)
    covers = made.roles == Role.COVER
    assert int(covers.sum()) == int((made.roles == Role.POISON).sum()) == 30
    assert set(made.clean_labels[covers].tolist()) == {0, 1, 2, 3}


def test_the_published_rate_is_the_default() -> None:
    assert (AdapBlend().rate, AdapBlend().cover_ratio, AdapBlend().alpha) == (0.003, 1.0, 0.15)


def test_the_smallest_images_have_all_pieces() -> None:
    changed = triggered(AdapBlend(pieces_per_side=8, kept=1), toy_data(3), "poison")
    assert ((changed != toy_data(3).images).any(1).flatten(1).sum(1) <= 1).all()
