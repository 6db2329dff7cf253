"""Records of a sweep that somebody else wrote: of another form, they count as none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bdbench.cli.app import run
from bdbench.sweeps.records import read_record, read_records, read_waiting

WHOLE: dict[str, Any] = {
    "name": "x", "cell": {}, "asked": {}, "state": "interrupted", "seconds": 1.5, "phase": "train", "done": 3,
    "total": 5,
}  # fmt: skip


def write(folder: Path, record: object, name: str = "x") -> Path:
    cells = folder / ".sweep" / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    (cells / f"{name}.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder


def test_a_whole_record_is_read(tmp_path: Path) -> None:
    assert read_record(write(tmp_path, WHOLE), "x") == WHOLE


@pytest.mark.parametrize(
    "news",
    [
        {"state": "weird"}, {"state": None}, {"state": ["done"]}, {"state": "done"}, {"state": "failed"},
        {"state": "failed", "reason": 5}, {"state": "done", "evaluation": "../../x"},
        {"state": "done", "evaluation": ""},
        {"state": "done", "evaluation": "/etc"}, {"state": "done", "evaluation": ["x"]},
        {"state": "running", "pid": "a"},
        {"name": 5}, {"name": "../x"}, {"name": "y"}, {"seconds": "a"}, {"seconds": None}, {"seconds": float("nan")},
        {"seconds": float("inf")}, {"seconds": -1}, {"total": "x"}, {"done": None}, {"done": []}, {"phase": 5},
        {"cell": []},
        {"asked": 5}, {"started": "now"}, {"full": 7}, {"status": {}}, {"total": 10**400},
        {"done": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_another_form_is_none(tmp_path: Path, news: dict[str, Any]) -> None:
    write(tmp_path, WHOLE | news)
    assert read_record(tmp_path, "x") == {}
    assert read_records(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{}", '"x"', "[" * 100_000, "9" * 5000, "\x00"])
def test_what_is_no_record_is_none(tmp_path: Path, text: str) -> None:
    assert read_records(write(tmp_path, text)) == {}


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('["a", "b"]', ["a", "b"]), ("5", []), ("null", []), ('{"a": 1}', []), ('[{"a": 1}]', []), ('"abc"', []),
        ("[[1]]", []),
        ('["../x"]', []), ('["a", 5]', []),
    ],
)  # fmt: skip
def test_names_of_another_form_are_none(tmp_path: Path, text: str, known: list[str]) -> None:
    (tmp_path / ".sweep" / "grid").mkdir(parents=True)
    (tmp_path / ".sweep" / "grid" / "names.json").write_text(text)
    assert read_waiting(tmp_path, []) == known


def test_status_prints_names_and_phases_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, WHOLE | {"name": "[b]", "phase": "[/x]\x1b[31m"}, "[b]")
    with pytest.raises(SystemExit):
        run(["status", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "[b]" in shown
    assert "[/x]\\x1b[31m" in shown


def test_a_record_that_is_no_file_is_none(tmp_path: Path) -> None:
    cells = write(tmp_path, WHOLE) / ".sweep" / "cells"
    (cells / "pipe.json").symlink_to("/dev/null")
    assert list(read_records(tmp_path)) == ["x"]
    (cells / "x.json").unlink()
    (cells / "pipe.json").unlink()
    os.mkfifo(cells / "x.json")
    assert read_records(tmp_path) == {}
