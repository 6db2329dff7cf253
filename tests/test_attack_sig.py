"""SIG: the sinusoid."""

from __future__ import annotations

import math

import pytest
import torch
from toys import flat, toy_lab, toy_source, triggered

from bdbench.attacks.sig import Sig
from bdbench.poisoning import poison_source


def test_sig_adds_a_sinusoid_over_the_columns() -> None:
    changed = triggered(Sig(delta=40, frequency=6), flat(100))
    expected = [round(100 + 40 * math.sin(2 * math.pi * 6 * column / 32)) for column in range(32)]
    assert torch.equal(changed, torch.tensor(expected, dtype=torch.uint8).expand(1, 3, 32, 32))


def test_sig_of_one_period_in_eight_columns() -> None:
    # sin 0, 45, 90, ... 315 degrees
    expected = [100, 128, 140, 128, 100, 72, 60, 72]
    assert triggered(Sig(delta=40, frequency=1), flat(100, side=8))[0, 0, 0].tolist() == expected


@pytest.mark.parametrize(("value", "column", "expected"), [(250, 2, 255), (5, 6, 0)])
def test_sig_is_clipped_and_never_wraps_round(value: int, column: int, expected: int) -> None:
    assert triggered(Sig(delta=40, frequency=1), flat(value, side=8))[0, 0, 0, column] == expected


def test_sig_has_its_own_amplitude_at_test_time() -> None:
    attack = Sig(delta=20, delta_test=60, frequency=1)
    assert triggered(attack, flat(100, side=8), "poison")[0, 0, 0, 2] == 120
    assert triggered(attack, flat(100, side=8), "test")[0, 0, 0, 2] == 160


def test_sig_changes_no_label_by_default() -> None:
    assert Sig().labels == "clean"
    source = toy_source()
    assert torch.equal(poison_source(source, Sig(), toy_lab(0), 0).visible.labels, source.train.labels)
