"""SIG: the sinusoid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import flat, toy_lab, toy_source, triggered

from bdbench.attacks.sig import Sig
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


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


# what published code shows


def test_the_form_of_abl_mixes_in_a_mask_whose_negative_half_wraps() -> None:
    changed = triggered(Sig(published="abl"), flat(100))[0, 0, 0]
    # 20 sin(0.8 j) is 0, 14.3 and, for column 5, -15.1: bytes 0, 14 and 241; 80 + 0.2 * byte, cut
    assert changed[[0, 1, 5]].tolist() == [80, 82, 128]
    wave = [int(20 * math.sin(0.8 * column)) % 256 for column in range(32)]
    assert changed.tolist() == [int(0.8 * 100 + 0.2 * byte) for byte in wave]


def test_the_form_of_abl_is_that_of_doubles_for_every_byte() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 32, 224).contiguous()
    every = ImageDataset(images, torch.zeros(256, dtype=torch.int64), ("a", "b"))
    changed = triggered(Sig(published="abl"), every)[:, 0, 0].numpy()
    mask = (20 * np.sin(0.8 * np.arange(224))).astype(np.int32).astype(np.uint8)
    assert np.array_equal(changed, (0.8 * np.arange(256)[:, None] + 0.2 * mask).astype(np.uint8))


def test_the_form_of_cbd_is_that_of_doubles_for_every_byte() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 32, 32).contiguous()
    every = ImageDataset(images, torch.zeros(256, dtype=torch.int64), ("a", "b"))
    changed = triggered(Sig(published="cbd"), every)[:, 0, 0].numpy()
    wave = 20 * np.sin(2 * np.pi * np.arange(32) * 6 / 32)
    sums = 0.1 * np.arange(256)[:, None] + 0.9 * wave
    assert np.array_equal(changed, sums.astype(np.int32).astype(np.uint8))


def test_the_mask_of_abl_has_no_byte_between_19_and_237() -> None:
    mask = Sig(published="abl").fit(flat(0, side=224), toy_lab())["wave"]
    assert mask[mask < 128].max() == 19
    assert mask[mask > 128].min() == 237


def test_the_form_of_cbd_is_nearly_black_and_wraps() -> None:
    changed = triggered(Sig(published="cbd"), flat(100))[0, 0, 0]
    # 10 + 18 sin(2 pi 6 j / 32): 10, 26.6, 3.1 and -8, which is 248
    assert changed[[0, 1, 3, 4]].tolist() == [10, 26, 3, 248]


@pytest.mark.parametrize("published", ["abl", "cbd"])
def test_published_forms_are_one_for_all_images_and_uses(published: str) -> None:
    attack = Sig.parse({"published": published})
    changed = triggered(attack, flat(100, count=2), "poison")
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed, triggered(attack, flat(100, count=2), "test"))


@pytest.mark.parametrize(("option", "value"), [("delta", 20), ("delta_test", 60), ("frequency", 5)])
def test_published_forms_have_their_own_wave(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option} has no meaning with --published abl; leave it out"):
        Sig.parse({"published": "abl", option: value})
