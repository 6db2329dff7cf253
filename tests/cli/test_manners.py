"""What the command line understands and how it answers: spellings, usual places, completion, help."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from bdbench.cli.app import PANELS, build
from bdbench.options import describe_options
from bdbench.registry import ATTACKS, DEFENSES
from bdbench.sweeps.grid import read_grid

# spellings


def test_both_spellings_are_understood_and_one_is_printed(here: Path, bdbench: Any) -> None:
    listed = bdbench("list", "defences")
    assert listed.out == bdbench("list", "defenses").out
    assert "defence" not in listed.out
    Path("a.toml").write_text("color = [1, 2, 3]\n")
    for words in (("--color", 1, 2, 3), ("--colour", 1, 2, 3), ("--config", "a.toml")):
        made = bdbench("poison", "--images", 100, *words, "--json").json
        assert made["path"] == "runs/digits-100-badnets-s0-colour-1-2-3"
    assert (
        bdbench("poison", "--images", 100, "--attack", "dfst-colour", "--json").json["path"].endswith("dfst-color-s0")
    )


def test_both_spellings_are_keys_of_a_grid(tmp_path: Path) -> None:
    names = []
    for word in ("defense", "defence"):
        path = tmp_path / f"{word}.toml"
        path.write_text(f'{word}s = ["none", "abl"]\n[{word}.abl]\ngamma = 1.0\n[[exclude]]\n{word} = "none"\n')
        grid = read_grid(path)
        names.append(([grid.name(cell) for cell in grid.cells], grid.settings(grid.cells[0])["options"]))
    assert names[0] == names[1] == (["digits-badnets-s0-abl"], {"gamma": 1.0})


# usual places


def test_status_gc_and_verify_take_the_usual_place(here: Path, bdbench: Any) -> None:
    assert "no sweep under runs/; start one with: bdbench sweep" in bdbench("status").err
    for number, name in enumerate(("older", "newer")):
        cells = here / "runs" / name / ".sweep" / "cells"
        cells.mkdir(parents=True)
        record = {"name": f"cell-of-{name}", "cell": {}, "asked": {}, "state": "interrupted", "seconds": 1.0}
        (cells / f"cell-of-{name}.json").write_text(json.dumps(record))
        for place in (cells, cells.parent):
            os.utime(place, (number, number))
    newest = bdbench("status")
    assert "cell-of-newer" in newest.out
    assert "sweep: runs/newer (the newest)" in newest.err
    Path("older.toml").write_text("")
    assert "cell-of-older" in bdbench("status", "older.toml").out
    assert bdbench("poison", "--images", 100).code == 0
    assert [item["artifact"] for item in bdbench("verify", "--json").json] == ["runs/digits-100-badnets-s0"]
    swept = bdbench("gc")
    assert "runs/digits-100-badnets-s0" in swept.out
    assert "1 folder, " in swept.err


def test_poison_says_which_dataset_train_alone_would_take(here: Path, bdbench: Any) -> None:
    first = ("poison", "--images", 100)
    assert "without a path" not in bdbench(*first).err
    assert "without a path" not in bdbench(*first).err
    said = " ".join(bdbench(*first, "--out", here / "away" / "d").err.split())
    assert "`bdbench train` and `defend` without a path take runs/digits-100-badnets-s0, the newest under runs/" in said
    assert "without a path" not in bdbench(*first, "--seed", 1).err
    said = " ".join(bdbench(*first).err.split())
    assert "`bdbench train` and `defend` without a path take runs/digits-100-badnets-s1, the newest under runs/" in said


def test_a_share_that_reserves_no_image_is_said(here: Path, bdbench: Any) -> None:
    said = " ".join(bdbench("poison", "--images", 100, "--trusted", 0.001).err.split())
    assert "no trusted images: 0.001 of 100 images is none; raise --trusted" in said
    assert "no trusted images" not in bdbench("poison", "--images", 100, "--trusted", 0).err


# help, completion and what the parser says


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "foo"), "Invalid value for 'kind': 'foo' is not one of 'attacks'"),
        (("poison", "--rate", "much"), "Invalid value for '--rate': must be a number. See: bdbench poison --help"),
        (("poison", "--seed", "-1"), "must be at least 0"),
        (("poison", "--rate", "2"), "rate 2.0 must be at most 1"),
        (("show",), "Missing argument"),
        (("train", "--milestones", "x"), "Option '--milestones' requires 2 arguments. See: bdbench train --help"),
        (("defend", "--method=abl", "--milestones", "1"), "See: bdbench defend --method abl --help"),
        (("--version=x",), "See: bdbench --help"),
    ],
)
def test_what_cannot_be_parsed_is_said_in_one_plain_line(bdbench: Any, words: tuple[str, ...], said: str) -> None:
    result = bdbench(*words)
    assert result.code == 2
    assert result.err.startswith("Error: ")
    assert said in result.err
    assert "Value error" not in result.err


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, bdbench: Any) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *words: bdbench(*words, "--help").out


def test_help_names_attacks_and_defenses_and_groups_the_commands(narrow: Any) -> None:
    words = " ".join(narrow("poison").replace("│", " ").split())
    assert all(f"{name}," in words for name in ATTACKS.names()[:-1])
    words = " ".join(narrow("defend").replace("│", " ").split())
    assert all(f"{name}," in words for name in DEFENSES.names()[:-1])
    headings = re.findall(r"╭─ ([A-Z][^─]*?) ─", narrow())
    assert headings == ["Options", *PANELS]


def test_a_switch_that_is_on_takes_one_column_of_help_and_can_be_turned_off(narrow: Any, bdbench: Any) -> None:
    lines = narrow("poison").splitlines()
    assert not any("--download" in line and "--no-download" in line for line in lines)
    assert "off: --no-download" in " ".join(" ".join(lines).replace("│", " ").split())
    assert "contradict each other" in bdbench("poison", "--download", "--no-download").err


@pytest.mark.parametrize("command", ["poison", "status", "defend", "verify"])
def test_examples_are_indented_in_every_command(narrow: Any, command: str) -> None:
    assert re.search(rf"(?m)^   bdbench {command} *$|^   bdbench {command} ", narrow(command))


def test_no_help_of_an_option_points_to_what_is_not_there() -> None:
    for registry in (ATTACKS, DEFENSES):
        for name in registry.names():
            described = [option.description for option in describe_options(registry.load(name))]
            assert not [text for text in described if "above" in text], name


@pytest.mark.parametrize(
    ("flag", "begun", "offered"),
    [("preset", "p", ["paper"]), ("device", "c", ["cpu", "cuda"]), ("precision", "f", ["fp32"])],
)
def test_words_of_a_flag_are_completed(flag: str, begun: str, offered: list[str]) -> None:
    command = typer.main.get_command(build(["defend"])[0])
    (parameter,) = [item for item in command.commands["defend"].params if item.name == flag]  # type: ignore[attr-defined]
    found = parameter.shell_complete(None, begun)
    assert [item.value for item in found] == offered


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "9" * 5000])
def test_image_memory_is_a_number_of_gigabytes(here: Path, bdbench: Any, value: str) -> None:
    ended = bdbench("train", "nothing", "--image-memory", value)
    assert (ended.code, "--image-memory" in ended.err) == (2, True)
    assert len(ended.err) < 1000
