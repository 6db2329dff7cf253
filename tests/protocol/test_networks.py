"""Networks by name, and how much work they are."""

from __future__ import annotations

import subprocess
import sys

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


def test_how_much_work_a_network_is_is_told_without_torchs_compiler() -> None:
    code = (
        "import sys\nfrom bdbench.protocol.networks import work_of\n"
        "print([work_of(name, (3, 32, 32)) // 1024 for name in ('wrn-16-1', 'preact-resnet-18')])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # weights without those of the head
    assert done.stdout.split("\n")[:2] == ["[174416, 11167040]", "False"]
