"""What a method found is said in words, and the settings that it chose from stand in a table."""

from __future__ import annotations

from typing import Any

import pytest

from bdbench.defenses.parts.holding import strongest
from bdbench.reports import findings

CLASSES = ("cat", "dog", "fox")


def chosen(tolerance: float) -> dict[str, Any]:
    """Findings of a choice among three settings, of a suspect whose accuracy is 0.9."""
    kept = {0.1: 0.9, 0.2: 0.86, 0.3: 0.5}
    return strongest(sorted(kept), kept.__getitem__, 0.9, 200, tolerance).findings


def test_every_setting_of_a_choice_is_shown_with_its_accuracy() -> None:
    found = findings.sweep(chosen(0.05))
    assert found is not None
    assert found.tried == (("0.1", "0.900", ""), ("0.2", "0.860", "chosen"), ("0.3", "0.500", "below the floor"))
    assert found.held_to == "with the accuracy on 200 held-out images: the suspect 0.900, the floor 0.850"


def test_a_choice_that_nothing_meets_says_so() -> None:
    found = findings.sweep({**chosen(0.05), "chosen": None})
    assert found is not None
    assert [one.remark for one in found.tried] == ["", "", "below the floor"]
    assert found.held_to.endswith("the floor 0.850; none was chosen")


@pytest.mark.parametrize(
    "changed",
    [
        {"sweep": "0.1"}, {"sweep": []}, {"sweep": [0.1]}, {"sweep": [{"setting": 1}]}, {"accuracy_floor": None},
        {"held_out": "many"}, {"sweep": [{"setting": 1, "accuracy": "high"}]},
    ],
)  # fmt: skip
def test_what_a_plugin_tells_in_another_form_is_no_choice_and_still_shown(changed: dict[str, Any]) -> None:
    told = chosen(0.05) | changed
    assert findings.sweep(told) is None
    assert "accuracy floor" in findings.lines(told)


def test_findings_are_said_in_words() -> None:
    told = {
        "p": 4.4e-05, "pruned": {"norm1": 3, "norm2": 1}, "unchanged": False, "missing_classes": [0, 2],
        "said": "pruned 4 channels", "sizes": [1.0, 22.81666], "by_name": {"a": 1, "b": None},
    }  # fmt: skip
    assert findings.lines({**told, **chosen(0.05)}, CLASSES) == {
        "result": "pruned 4 channels", "pruned": "4 channels: norm1 3, norm2 1",
        "no trusted images": "of 2 classes: cat and fox", "p": "4.4e-05", "unchanged": "no", "sizes": "1, 22.82",
        "by name": "a 1, b none",
    }  # fmt: skip
    assert next(iter(findings.lines(told))) == "result"


def test_labels_of_classes_that_are_not_known_stay_numbers() -> None:
    assert findings.lines({"missing_classes": [0, 7]}, CLASSES) == {"missing classes": "0, 7"}
    assert findings.lines({"pruned": {}}) == {"pruned": "0 channels"}
