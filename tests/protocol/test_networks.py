"""Networks by name, and how much work they are."""

from __future__ import annotations

import pytest

from bdbench.protocol.networks import work_of
from bdbench.training.devices import SMALL_WORK


@pytest.mark.parametrize(
    ("name", "shape", "small"),
    [
        ("auto", (1, 8, 8), True),
        ("auto", (3, 16, 16), True),
        ("auto", (3, 32, 32), False),
        ("preact-resnet-18", (1, 8, 8), False),
    ],
)
def test_a_small_network_on_small_images_is_small_work(name: str, shape: tuple[int, int, int], small: bool) -> None:
    assert (work_of(name, shape) < SMALL_WORK) == small
