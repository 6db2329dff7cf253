"""TaCT: the square, whom it poisons and who covers."""

from __future__ import annotations

import pytest
import torch
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.parts.patches import paste, scaled, seeded_patch
from bdbench.attacks.tact import TaCT
from bdbench.data import Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


@pytest.mark.parametrize(
    ("side", "first", "stop"),
    # 21 * 64 / 32 = 42 and 29 * 64 / 32 = 58; 21 * 28 / 32 = 18.4 and 29 * 28 / 32 = 25.4; 5.25 and 7.25
    [(32, 21, 29), (64, 42, 58), (28, 18, 25), (8, 5, 7)],
)
def test_the_square_lies_at_21_to_28_of_32(side: int, first: int, stop: int) -> None:
    mask = TaCT().fit(flat(0, side=side), toy_lab())["mask"][0]
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[first:stop, first:stop] = True
    assert torch.equal(mask, expected)


def test_the_square_replaces_what_was_there_and_nothing_else() -> None:
    state = TaCT().fit(flat(0), toy_lab())
    for value in (0, 255):
        changed = triggered(TaCT(), flat(value))[0]
        inside = changed[:, 21:29, 21:29]
        assert torch.equal(inside, state["pattern"][:, 21:29, 21:29])
        assert int((changed != value).any(0).sum()) <= 64
        assert inside.unique().numel() > 50


def test_colours_go_by_the_seed() -> None:
    one, same, other = (TaCT().fit(flat(0), toy_lab(seed))["pattern"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gray_images_get_the_luma() -> None:
    # luma of red 100, green 200, blue 50: 29.9 + 117.4 + 5.7 = 153
    colour, gray = (TaCT().fit(flat(0, channels), toy_lab())["pattern"] for channels in (3, 1))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert torch.equal(gray, (colour * weights).sum(0, keepdim=True).round().to(torch.uint8))


def test_poison_comes_from_the_source_and_covers_from_the_rest() -> None:
    made = poison_source(toy_source(), TaCT(rate=0.1, cover_ratio=2.0), toy_lab(), trusted=0)
    assert set(made.clean_labels[made.roles == Role.POISON].tolist()) == {1}
    assert set(made.visible.labels[made.roles == Role.POISON].tolist()) == {0}
    assert set(made.clean_labels[made.roles == Role.COVER].tolist()) == {2, 3}
    assert int((made.roles == Role.COVER).sum()) == 24


def test_cover_classes_can_be_named() -> None:
    covers = TaCT(cover_classes=(2, 4)).may_cover(torch.arange(10) % 5)
    assert covers.tolist() == [False, False, True, False, True] * 2


def test_all_classes_but_the_target_are_triggered_in_tests() -> None:
    made = poison_source(toy_source(), TaCT(rate=0.1), toy_lab(), trusted=0)
    assert set(made.test.labels[made.triggered_rows].tolist()) == {1, 2, 3}


def test_the_published_rates_are_the_default() -> None:
    assert (TaCT().rate, TaCT().cover_ratio, TaCT().source, TaCT().target) == (0.003, 1.0, 1, 0)


@pytest.mark.parametrize(("classes", "which"), [((1, 2), "source"), ((2, 0), "target")])
def test_source_and_target_cannot_cover(classes: tuple[int, int], which: str) -> None:
    with pytest.raises(OptionError, match=f"is the {which} class; give --cover-classes without it"):
        TaCT.parse({"cover_classes": classes})


def test_cover_classes_that_do_not_exist_are_refused() -> None:
    attack = TaCT(rate=0.1, cover_classes=(2, 7))
    with pytest.raises(OptionError, match="cover class 7 has no training images, the last class is 3"):
        poison_source(toy_source(), attack, toy_lab(), trusted=0)


# patches that it shares with others


@pytest.mark.parametrize(
    ("start", "length", "side", "expected"),
    # 27 * 8 / 32 = 6.75 and 32 * 8 / 32 = 8: one pixel, so two are taken and stay inside
    [(27, 5, 32, (27, 32)), (27, 5, 64, (54, 64)), (27, 5, 8, (6, 8)), (0, 3, 8, (0, 2)), (29, 3, 224, (203, 224))],
)
def test_places_scale_with_the_side(start: int, length: int, side: int, expected: tuple[int, int]) -> None:
    span = scaled(start, length, side)
    assert (span.start, span.stop) == expected


def test_pasting_keeps_what_lies_under_the_open_part_of_a_patch() -> None:
    patch = torch.full((4, 2, 2), 200.0)
    patch[3] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    canvas = torch.full((4, 32, 32), 7.0)
    canvas[3] = 1
    pasted = paste(canvas, patch, 4, 6)
    assert pasted[0, 4:6, 6:8].tolist() == [[200, 7], [7, 200]]
    assert int((pasted != canvas).any(0).sum()) == 2
    assert (pasted[3] == 1).all()
    assert (canvas[0] == 7).all()


def test_seeded_patches_go_by_seed_and_purpose() -> None:
    patch = seeded_patch(5, 0, "a")
    assert patch.shape == (4, 5, 5)
    assert (patch[3] == 1).all()
    assert not torch.equal(patch, seeded_patch(5, 1, "a"))
    assert not torch.equal(patch, seeded_patch(5, 0, "b"))


def test_images_that_are_not_square_are_scaled_along_each_side() -> None:
    mask = TaCT().fit(toy_data(4, 3, 12, 20), toy_lab())["mask"][0]
    # rows 21 * 12 / 32 = 7.9 to 29 * 12 / 32 = 10.9; columns 13.1 to 18.1
    assert torch.nonzero(mask.any(1)).flatten().tolist() == [8, 9, 10]
    assert torch.nonzero(mask.any(0)).flatten().tolist() == [13, 14, 15, 16, 17]
