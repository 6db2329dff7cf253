"""Trojan: the patch, its place, and the form that wraps round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import attack_of, flat, toy_lab, triggered

from bdbench.attacks.trojan import Trojan
from bdbench.errors import OptionError


def box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of a mask (1, H, W)."""
    rows, columns = torch.nonzero(mask[0].any(1)).flatten(), torch.nonzero(mask[0].any(0)).flatten()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def test_the_published_patch_replaces_rows_and_columns_25_to_27() -> None:
    changed = triggered(Trojan(), flat(100))[0]
    assert changed[:, 25, 25].tolist() == [207, 131, 181]
    assert changed[:, 25, 27].tolist() == [29, 232, 179]
    assert changed[:, 26, 26].tolist() == [137, 0, 32]
    assert changed[:, 27, 25].tolist() == [131, 40, 4]
    changed[:, 25:28, 25:28] = 100
    assert (changed == 100).all()


def test_a_gray_patch_is_the_luma() -> None:
    # 0.299 * 207 + 0.587 * 131 + 0.114 * 181 = 159.4
    assert triggered(Trojan(), flat(100, channels=1))[0, 0, 25, 25] == 159


@pytest.mark.parametrize(
    ("options", "height", "width", "expected"),
    [
        ({}, 32, 32, (25, 27, 25, 27)),
        ({}, 64, 64, (50, 55, 50, 55)),
        ({}, 224, 224, (175, 195, 175, 195)),
        ({}, 28, 28, (22, 24, 22, 24)),
        ({}, 8, 8, (5, 7, 5, 7)),
        ({}, 12, 20, (9, 11, 16, 18)),
        ({"patch": "random"}, 32, 32, (25, 27, 25, 27)),
        ({"patch": "square"}, 32, 32, (21, 28, 21, 28)),
        ({"patch": "square"}, 64, 64, (42, 57, 42, 57)),
        ({"patch": "square"}, 8, 8, (5, 7, 5, 7)),
    ],
)
def test_size_and_place_go_by_the_image(
    options: dict[str, Any], height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    clean = flat(0, side=max(height, width))
    clean = type(clean)(clean.images[:, :, :height, :width].contiguous(), clean.labels, clean.class_names)
    assert box(attack_of("trojan", **options).fit(clean, toy_lab())["mask"]) == expected


def test_larger_images_get_larger_dots_of_the_same_colours() -> None:
    changed = triggered(Trojan(), flat(100, side=64))[0]
    assert (changed[0, 50:52, 50:52] == 207).all()
    assert (changed[0, 54:56, 54:56] == 246).all()


@pytest.mark.parametrize("patch", ["random", "square"])
def test_drawn_colours_go_by_the_seed_and_cover_all_bytes(patch: str) -> None:
    attack = attack_of("trojan", patch=patch)
    one, same, other = (attack.fit(flat(0), toy_lab(seed))["pattern"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.max() > 200
    assert len(one.unique()) > 20


def test_wrap_adds_the_patch_modulo_256() -> None:
    changed = triggered(Trojan(wrap=True), flat(100))[0]
    # 100 + 207 - 256, 100 + 131, 100 + 181 - 256
    assert changed[:, 25, 25].tolist() == [51, 231, 25]
    assert changed[1, 26, 26] == 100
    changed[:, 25:28, 25:28] = 100
    assert (changed == 100).all()


def test_another_patch_is_refused() -> None:
    with pytest.raises(OptionError, match="patch 'apple'"):
        Trojan.parse({"patch": "apple"})
