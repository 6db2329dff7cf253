"""Pictures: names of any script and length, without a warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.reports import pictures


def test_suspects_with_names_of_any_script_are_drawn_without_a_warning(toys: DatasetArtifact, tmp_path: Path) -> None:
    places = ["犬/犬 51 (копия).jpg", "cat/🐱 $x_{$ [bold].png", "cat/" + "long " * 20 + ".png"]
    ranked = pd.DataFrame({
        "row": range(3), "place": places, "label": 0, "class": ["犬", "cat", "x" * 40], "score": [1.0, 0.5, 0.25],
    })  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.suspect_sheet(ranked, toys, tmp_path / "s.png", "写真, abl")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_a_character_that_no_font_has_is_a_question_mark() -> None:
    assert pictures.drawable("Café ± копия\n\U00010ffff") == "Café ± копия\n?f"


@pytest.mark.parametrize(
    ("name", "short"), [("sixteen-letters!", "sixteen-letters!"), ("IMG_2023-05-17_103255.jpg", "IMG_2023…255.jpg")]
)
def test_a_long_name_keeps_both_ends_around_an_ellipsis(name: str, short: str) -> None:
    assert pictures.shortened(name) == short
