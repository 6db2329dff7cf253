"""Default folder names: the plain one for the defaults, else what differs, whatever order things were made in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from toys import FACTS, MADE, attack_of

from bdbench.artifacts import store
from bdbench.artifacts.manifests import Ask
from bdbench.progress import Silent
from bdbench.protocol import naming

ASK = Ask("dataset", "badnets", 1, {"rate": 0.1}, 0, {"source": "abc"})
OTHER = replace(ASK, config={"rate": 0.05})


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def seal(path: Path, ask: Ask) -> None:
    with store.create(path, ask) as draft:
        draft.facts |= FACTS[ask.kind]
        draft.made |= MADE


def place(folder: Path, ask: Ask, *parts: str, force: bool = False, notes: Notes | None = None) -> str:
    return naming.place(folder / "d", ask, parts, force=force, progress=notes or Notes()).name


@pytest.mark.parametrize("plain_first", [True, False])
def test_the_same_ask_has_the_same_name_whatever_order_things_were_made_in(tmp_path: Path, plain_first: bool) -> None:
    asked = [(ASK, ()), (OTHER, ("rate0.05",))]
    for ask, parts in asked if plain_first else reversed(asked):
        seal(tmp_path / place(tmp_path, ask, *parts), ask)
    assert [place(tmp_path, ask, *parts) for ask, parts in asked] == ["d", "d-rate0.05"]


def test_an_equal_artifact_with_the_plain_name_is_taken_as_0_1_left_it(tmp_path: Path) -> None:
    seal(tmp_path / "d", OTHER)
    assert place(tmp_path, OTHER, "rate0.05") == "d"


@pytest.mark.parametrize("force", [True, False])
def test_where_another_artifact_has_the_name_four_digits_of_the_id_are_added(tmp_path: Path, force: bool) -> None:
    seal(tmp_path / "d", ASK)
    newer, notes = replace(ASK, inputs={"source": "def"}), Notes()
    assert place(tmp_path, newer, force=force, notes=notes) == ("d" if force else f"d-{newer.id[:4]}")
    assert notes.lines == (
        []
        if force
        else [f"{tmp_path / 'd'} is another dataset (other images); this one is {tmp_path / 'd'}-{newer.id[:4]}"]
    )
    seal(tmp_path / f"d-{newer.id[:4]}", newer)
    store.shutil.rmtree(tmp_path / "d")
    assert place(tmp_path, newer) == f"d-{newer.id[:4]}"


def test_what_is_no_artifact_or_damaged_is_left_to_the_look_at_the_place(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert place(tmp_path, ASK) == "d"
    (tmp_path / "d" / "manifest.json").write_text("{")
    assert place(tmp_path, ASK) == "d"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"rate": 0.1, "target": 0}, []),
        ({"rate": 0.05, "target": 3}, ["rate0.05", "target3"]),
        ({"patch": "white", "clip": True, "flip": False}, ["patch-white", "clip", "no-flip"]),
        ({"colour": [255, 0, 9]}, ["colour-255-0-9"]),
        ({"rate": None, "class_rate": 0.5}, ["class-rate0.5"]),
    ],
)
def test_settings_that_differ_are_parts_of_a_name(values: dict[str, object], parts: list[str]) -> None:
    usual = {"rate": 0.1, "target": 0, "patch": "grid", "clip": False, "flip": True, "colour": [1, 2, 3]}
    assert naming.differing(values, usual) == parts


def test_many_or_unprintable_settings_are_four_digits_that_depend_on_each() -> None:
    many = {f"option{number}": number for number in range(9)}
    found = [naming.differing(values, {}) for values in (many, many | {"option1": 7}, {"picture": "/a/b.png"})]
    assert [len(parts[0]) for parts in found] == [4, 4, 4]
    assert len({parts[0] for parts in found}) == 3


def test_a_name_of_a_dataset_leaves_out_what_the_name_of_its_source_says() -> None:
    attack = attack_of("badnets", rate=0.2)
    assert naming.dataset_parts(attack, 0.05, {"images": 200, "image_size": 16}) == ["image-size16", "rate0.2"]
    assert naming.dataset_parts(attack_of("badnets"), 0.1, {}) == ["trusted0.1"]
