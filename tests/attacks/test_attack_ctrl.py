"""CTRL: FTrojan's pattern in another colour space, stronger, on the target class."""

from __future__ import annotations

import pytest
import torch
from toys import flat, toy_lab, toy_source, triggered

from bdbench.attacks.ctrl import Ctrl
from bdbench.attacks.parts.frequency import window_pattern
from bdbench.protocol.poisoning import poison_source


def test_red_and_blue_rise_where_green_falls() -> None:
    changed = triggered(Ctrl(), flat(100))[0].float()
    p = 100 * window_pattern(32, 32, 32)
    for channel, share in enumerate((1.14, -0.977, 2.029)):
        torch.testing.assert_close(changed[channel], 100 + share * p, rtol=0, atol=0.501)


def test_it_is_as_large_as_published() -> None:
    largest = (100 * Ctrl().fit(flat(0), toy_lab())["pattern"]).abs().amax((1, 2))
    torch.testing.assert_close(largest, torch.tensor([12.1, 10.4, 21.6]), rtol=0, atol=0.06)


def test_gray_images_take_the_pattern_on_their_channel() -> None:
    changed = triggered(Ctrl(), flat(100, channels=1))[0, 0]
    assert torch.equal(changed, (100 + 100 * window_pattern(32, 32, 32)).round().to(torch.uint8))


def test_it_has_its_own_magnitude_at_test_time() -> None:
    attack, p = Ctrl(magnitude=50, magnitude_test=150), window_pattern(32, 32, 32)
    for use, magnitude in (("poison", 50), ("cover", 50), ("test", 150)):
        changed = triggered(attack, flat(100, channels=1), use)[0, 0].float()
        assert torch.equal(changed, (100 + magnitude * p).round())


def test_a_window_of_the_images_size_is_fainter() -> None:
    tiled, one = (Ctrl(window=window).fit(flat(0, side=64), toy_lab())["pattern"] for window in (32, 64))
    assert torch.equal(tiled[..., :32, :32], tiled[..., 32:, 32:])
    assert one.abs().max().item() == pytest.approx(tiled.abs().max().item() / 2, rel=0.01)


def test_no_label_changes_by_default() -> None:
    source = toy_source()
    assert Ctrl().labels == "clean"
    assert torch.equal(poison_source(source, Ctrl(), toy_lab(), 0).visible.labels, source.train.labels)
