"""What a method found, for people: a line for each finding, and the settings that it chose from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from bdbench.wording import counted, listed

CHOICE = ("sweep", "chosen", "held_out", "accuracy_before", "accuracy_floor")
"""What `bdbench.defenses.parts.holding.strongest` tells of a choice."""


class Tried(NamedTuple):
    """A setting with the accuracy that it leaves on the held-out images, and what is to be said of it."""

    setting: str
    accuracy: str
    remark: str


class Sweep(NamedTuple):
    """The settings that a method chose from, from the weakest repair to the strongest, and what they were held to."""

    tried: tuple[Tried, ...]
    held_to: str


def lines(findings: Mapping[str, Any], class_names: Sequence[str] = ()) -> dict[str, str]:
    """Return heading -> text of every finding but a choice (see `sweep`), what the method said first.

    Args:
        findings: of a model, any JSON values: plugins have their own.
        class_names: those of its dataset.
    """
    left = dict(findings)
    found = {"result": str(left.pop("said"))} if "said" in left else {}
    for name in CHOICE if sweep(findings) else ():
        left.pop(name)
    if _are_counts(left.get("pruned")):
        found["pruned"] = _pruned(left.pop("pruned"))
    if _are_labels(left.get("missing_classes"), len(class_names)):
        names = [class_names[label] for label in left.pop("missing_classes")]
        found["no trusted images"] = f"of {counted(len(names), 'class')}: {listed(names)}"
    return found | {name.replace("_", " "): _text(value) for name, value in left.items()}


def sweep(findings: Mapping[str, Any]) -> Sweep | None:
    """Return the settings that a method tried; None where it chose nothing, or tells it in another form."""
    tried, chosen = findings.get("sweep"), findings.get("chosen")
    numbers = [value for value in map(findings.get, CHOICE[2:]) if _is_number(value)]
    if not isinstance(tried, list) or not tried or len(numbers) < len(CHOICE[2:]):
        return None
    if not all(isinstance(one, dict) and _is_number(one.get("accuracy")) and "setting" in one for one in tried):
        return None
    held, before, floor = numbers
    settings = []
    for one in tried:
        remark = "chosen" if one["setting"] == chosen else "below the floor" if one["accuracy"] < floor else ""
        settings.append(Tried(_text(one["setting"]), f"{one['accuracy']:.3f}", remark))
    held_to = f"with the accuracy on {held:,} held-out images: the suspect {before:.3f}, the floor {floor:.3f}"
    return Sweep(tuple(settings), held_to + ("" if chosen is not None else "; none was chosen"))


def _pruned(counts: Mapping[str, int]) -> str:
    where = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{counted(sum(counts.values()), 'channel')}{': ' if where else ''}{where}"


def _text(value: object) -> str:
    """Return a JSON value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items()) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(count, int) for count in value.values())


def _are_labels(value: object, classes: int) -> bool:
    return isinstance(value, list) and all(isinstance(label, int) and 0 <= label < classes for label in value)
