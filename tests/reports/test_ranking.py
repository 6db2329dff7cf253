"""Ranks of defenses over attacks, against numbers of the textbook."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bdbench.reports.ranking import rank


def row(attack: str, defense: str, der: float | None, marks: str = "", **other: Any) -> dict[str, Any]:
    full = {
        "dataset": "digits", "model": "convnet", "attack": attack, "attack_options": {}, "defense": defense,
        "preset": "fast", "der": der, "ba": 0.9, "ba_change": 0.0, "asr": None if der is None else 1 - der,
        "marks": marks,
    }  # fmt: skip
    return full | other


def test_ranks_are_averaged_over_attacks_and_the_best_comes_first() -> None:
    values = {"a": (0.9, 0.8, 0.7), "b": (0.9, 0.6, 0.7), "c": (0.5, 0.6, 0.4)}
    rows = [row(attack, name, der) for attack, ders in values.items() for name, der in zip("xyz", ders, strict=True)]
    found = rank(rows)
    assert [(own.defense, own.preset) for own in found.defenses] == [("x", "fast"), ("y", "fast"), ("z", "fast")]
    assert [own.rank for own in found.defenses] == pytest.approx([4 / 3, 2, 8 / 3])
    assert [own.mean for own in found.defenses] == pytest.approx([2.3 / 3, 2 / 3, 0.6])
    assert found.blocks == 3
    # Friedman: 12 N / (k (k + 1)) * (sum R^2 - k (k + 1)^2 / 4) = 3 * (16/9 + 4 + 64/9 - 12)
    assert found.statistic == pytest.approx(3 * (16 / 9 + 4 + 64 / 9 - 12))
    assert 0 < found.p < 1


def test_less_asr_is_better() -> None:
    rows = [row(attack, name, der) for attack in "ab" for name, der in (("x", 0.9), ("y", 0.5))]
    assert [own.defense for own in rank(rows, "asr").defenses] == ["x", "y"]


def test_the_critical_difference_is_the_textbooks() -> None:
    # Demšar 2006, table 5: q of 5 % for 4 classifiers is 2.569; his example has 14 datasets and CD = 1.25.
    rows = [
        row(str(block), name, (block * 7 + place * 3) % 11 / 11)
        for block in range(14)
        for place, name in enumerate("wxyz")
    ]
    assert rank(rows).critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)


def test_equal_values_share_a_rank() -> None:
    rows = [row(attack, name, der) for attack in "ab" for name, der in (("x", 0.5), ("y", 0.5), ("z", 0.1))]
    assert [own.rank for own in rank(rows).defenses] == pytest.approx([1.5, 1.5, 3])


def test_failed_attacks_and_settings_that_lack_a_defense_are_left_out_and_named() -> None:
    rows = [row("good", name, der) for name, der in (("x", 0.9), ("y", 0.8), ("z", 0.7))]
    rows += [row("weak", name, der, "w") for name, der in (("x", 0.1), ("y", 0.8), ("z", 0.7))]
    rows += [row("part", "x", 0.3)]
    found = rank(rows)
    assert (found.blocks, found.failed, found.incomplete) == (
        1, ("digits, convnet, weak",), ("digits, convnet, part",)
    )  # fmt: skip
    assert [own.rank for own in found.defenses] == [1, 2, 3]
    assert math.isnan(found.p)


def test_undefended_and_reference_rows_are_not_ranked() -> None:
    rows = [row("a", "none", None), row("a", "oracle", None, "r"), row("a", "x", 0.5)]
    assert [own.defense for own in rank(rows).defenses] == ["x"]


def test_nothing_to_rank_has_no_defense() -> None:
    assert rank([row("a", "none", None)]).defenses == ()


def test_who_loses_the_classes_shares_the_last_rank_and_is_named() -> None:
    # Undefended BA 0.9: 0.81 is kept by y, not by x and z, whatever their DER.
    kept = {"x": 0.80, "y": 0.82, "z": 0.1}
    rows = [
        row(attack, name, der, ba=kept[name], ba_change=kept[name] - 0.9)
        for attack in "ab"
        for name, der in (("x", 0.99), ("y", 0.6), ("z", 0.5))
    ]
    found = rank(rows)
    assert [(own.defense, own.rank, own.lost) for own in found.defenses] == [("y", 1, 0), ("x", 2.5, 2), ("z", 2.5, 2)]
    assert [own.mean for own in found.defenses] == pytest.approx([0.6, 0.99, 0.5])
    assert found.lost == tuple((name, f"digits, convnet, {attack}") for name in "xz" for attack in "ab")
    assert [own.defense for own in rank(rows, "asr").defenses] == ["y", "x", "z"]
    assert [own.defense for own in rank(rows, min_ba=0.0).defenses] == ["x", "y", "z"]
    assert rank(rows, min_ba=0.0).lost == ()


def test_ranks_by_accuracy_have_no_bound() -> None:
    rows = [
        row(attack, name, 0.5, ba=ba, ba_change=ba - 0.9) for attack in "ab" for name, ba in (("x", 0.2), ("y", 0.1))
    ]
    found = rank(rows, "ba")
    assert [(own.defense, own.rank) for own in found.defenses] == [("x", 1), ("y", 2)]
    assert (found.lost, found.min_ba) == ((), 0.0)
