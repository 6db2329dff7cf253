"""CBA: who is mixed with whom, and how halves are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_data, toy_lab, toy_source

from bdbench.attacks.base import Use
from bdbench.attacks.cba import CBA, half_mix, partner_rows, shifted_halves
from bdbench.data import ImageDataset, Role, SourceData
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source

LABELS = torch.tensor([0, 1, 0, 1, 0, 2])


def draws(*values: float) -> Tensor:
    return torch.tensor([values])


def numbered() -> tuple[Tensor, Tensor]:
    """Two images (1, 1, 8, 8) whose pixels are 10 * row + column, the second 100 more."""
    one = (10 * torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8)[None, None]
    return one, one + 100


def by_class(count: int = 40, classes: int = 4) -> ImageDataset:
    """Images of one value, 50 times their class."""
    labels = torch.arange(count) % classes
    images = (labels * 50).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageDataset(images, labels, tuple("abcd"[:classes]))


def mixed(use: Use, **options: Any) -> Tensor:
    attack, data = CBA.parse(options), by_class()
    return attack.trigger(data, torch.arange(40), attack.fit(data, toy_lab()), use, 0)


# the mix


def test_an_even_cut_shows_half_of_each_from_where_it_was_told() -> None:
    # of 8: cut at 4, p in 0..3, q in 0..3
    places, second = shifted_halves(8, 0, draws(0.0, 0.3, 0.6))
    assert places.tolist() == [[1, 2, 3, 4, 2, 3, 4, 5]]
    assert second.tolist() == [[False] * 4 + [True] * 4]


@pytest.mark.parametrize(
    ("draw", "cut", "last_p", "last_q"),
    # jitter -1: 3 pixels from p in 0..4, 5 from q in 0..2; jitter 1: 5 from p in 0..2, 3 from q in 0..4
    [(0.0, 3, 4, 2), (0.5, 4, 3, 3), (0.99, 5, 2, 4)],
)
def test_jitter_moves_the_cut_and_what_can_be_shown(draw: float, cut: int, last_p: int, last_q: int) -> None:
    least, second = shifted_halves(8, 1, draws(draw, 0.0, 0.0))
    largest, _ = shifted_halves(8, 1, draws(draw, 0.9999, 0.9999))
    assert int((~second).sum()) == cut
    assert least[0].tolist() == [*range(cut), *range(8 - cut)]
    assert largest[0].tolist() == [*range(last_p, last_p + cut), *range(last_q, last_q + 8 - cut)]


@pytest.mark.parametrize("side", [8, 9, 28, 32, 224])
def test_no_half_reaches_over_the_border(side: int) -> None:
    jitter = round(3 * side / 32)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1 - 2**-24])] * 3)
    places, second = shifted_halves(side, jitter, corners)
    assert places.min() >= 0
    assert places.max() < side
    assert set((~second).sum(1).tolist()) == {side // 2 - jitter, side // 2 + jitter}


def test_left_and_right_halves() -> None:
    one, other = numbered()
    changed = half_mix(one, other, 0, draws(0.5, 0.0, 0.5, 0.3, 0.6))
    assert changed[0, 0, 0].tolist() == [1, 2, 3, 4, 102, 103, 104, 105]
    assert changed[0, 0, 7].tolist() == [71, 72, 73, 74, 172, 173, 174, 175]


def test_upper_and_lower_halves() -> None:
    one, other = numbered()
    changed = half_mix(one, other, 0, draws(0.5, 0.5, 0.5, 0.3, 0.6))
    assert changed[0, 0, :, 0].tolist() == [10, 20, 30, 40, 120, 130, 140, 150]


def test_either_image_comes_first() -> None:
    one, other = numbered()
    changed = half_mix(one, other, 0, draws(0.49, 0.0, 0.5, 0.0, 0.0))
    assert changed[0, 0, 0].tolist() == [100, 101, 102, 103, 0, 1, 2, 3]


def test_images_that_are_not_square_are_cut_along_either_side() -> None:
    one = torch.zeros(1, 3, 12, 20, dtype=torch.uint8)
    upright = half_mix(one, one + 1, 0, draws(0.5, 0.0, 0.5, 0.9, 0.9))
    flat = half_mix(one, one + 1, 0, draws(0.5, 0.9, 0.5, 0.9, 0.9))
    assert upright[0, 0].sum(0).tolist() == [0] * 10 + [12] * 10
    assert flat[0, 2].sum(1).tolist() == [0] * 6 + [20] * 6


@pytest.mark.parametrize(("side", "jitter"), [(8, 1), (28, 3), (32, 3), (64, 6)])
def test_the_jitter_is_3_of_32(side: int, jitter: int) -> None:
    assert CBA().fit(toy_data(8, 3, side), toy_lab())["jitter"].tolist() == [jitter]


# the partner


def test_partners_are_of_the_wanted_class_and_all_can_be_drawn() -> None:
    numbers = torch.tensor([0.0, 0.34, 0.67, 1 - 2**-24])
    wanted, rows = torch.zeros(4, dtype=torch.int64), torch.full((4,), 5)
    assert partner_rows(LABELS, wanted, rows, numbers).tolist() == [0, 2, 4, 4]


@pytest.mark.parametrize(("row", "expected"), [(0, [2, 4]), (2, [0, 4]), (4, [0, 2])])
def test_no_image_is_its_own_partner_where_there_is_another(row: int, expected: list[int]) -> None:
    wanted, rows = torch.zeros(2, dtype=torch.int64), torch.full((2,), row)
    assert partner_rows(LABELS, wanted, rows, torch.tensor([0.2, 0.8])).tolist() == expected


def test_the_only_image_of_a_class_is_its_own_partner() -> None:
    assert partner_rows(LABELS, torch.tensor([2]), torch.tensor([5]), torch.tensor([0.9])).tolist() == [5]


@pytest.mark.parametrize("missing", [3, 9])
def test_a_class_without_images_is_refused(missing: int) -> None:
    labels = torch.cat([LABELS, torch.tensor([4])])
    with pytest.raises(OptionError, match=f"class {missing} has no images to mix with"):
        partner_rows(labels, torch.tensor([missing]), torch.tensor([0]), torch.tensor([0.5]))


def test_large_classes_are_not_overrun() -> None:
    # 1 - 2**-24 is the largest number that is drawn
    labels = torch.zeros(100_000, dtype=torch.int64)
    labels[0] = 1
    last = partner_rows(labels, torch.tensor([0]), torch.tensor([0]), torch.tensor([1 - 2**-24]))
    assert last.tolist() == [99_999]


# the attack


@pytest.mark.parametrize("use", ["poison", "test"])
def test_poison_and_tests_are_mixed_with_the_partner_class(use: Use) -> None:
    # the partner class is 1: 50
    for label, image in enumerate(mixed(use)[:4]):
        assert set(image.unique().tolist()) == {50, 50 * label}


def test_covers_are_mixed_with_their_own_class() -> None:
    assert torch.equal(mixed("cover"), by_class().images)


def test_about_half_of_an_image_is_left() -> None:
    share = (mixed("test")[::4] == 0).float().mean((1, 2, 3))
    # the cut is at 3, 4 or 5 of 8
    assert set(share.tolist()) <= {3 / 8, 4 / 8, 5 / 8}
    assert len(set(share.tolist())) > 1


def test_poison_is_of_the_source_and_covers_of_any_class() -> None:
    made = poison_source(toy_source(), CBA(rate=0.1), toy_lab(), trusted=0)
    assert set(made.clean_labels[made.roles == Role.POISON].tolist()) == {0}
    assert set(made.visible.labels[made.roles == Role.POISON].tolist()) == {2}
    assert set(made.clean_labels[made.roles == Role.COVER].tolist()) == {0, 1, 2, 3}
    assert int((made.roles == Role.COVER).sum()) == 5 * 12


def test_in_tests_partners_come_from_the_test_images() -> None:
    source = SourceData("two", by_class(), by_class(), augment="none")
    source.test.images.add_(3)
    made = poison_source(source, CBA(rate=0.1), toy_lab(), trusted=0)
    assert set(made.triggered.images.unique().tolist()) == {3, 53, 153}


def test_the_papers_classes_are_the_default() -> None:
    assert (CBA().source, CBA().partner, CBA().target) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partner": 0}, "partner and source are both 0; give another --partner"),
        ({"partner": 2}, "partner and target are both 2; give another --partner"),
        ({"source": 2}, "source and target are both 2"),
    ],
)
def test_three_classes_are_three(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CBA.parse(options)


@pytest.mark.parametrize("name", ["source", "partner"])
def test_classes_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} class 7 has no training images; the classes are 0\.\.3"):
        CBA.parse({name: 7}).fit(by_class(), toy_lab())
