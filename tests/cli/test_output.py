"""What the command line writes: nothing from outside commands a terminal, and the system's errors are messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from bdbench.cli import app, console

HOSTILE = "\x1b[31mred\x07 [/b] \u202e"
OBEYED = ("\x1b[31mred", "\x07", "\u202e")


def test_nothing_from_outside_reaches_a_terminal_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("class")
    table.add_row(Text(HOSTILE))
    table.add_row("[/bold] :bug:")
    for write in (console.show, console.show_wrapped, console.say_plainly, console.say_error, console.say_warning):
        write(HOSTILE)
    console.show(table)
    console.say_wrote(HOSTILE)
    console.say_next(HOSTILE)
    console.show_json({"name": HOSTILE, "half": "\udc80"})
    shown = "".join(capsys.readouterr())
    assert not any(part in shown for part in OBEYED)
    assert shown.count(r"\x1b[31mred") == 8
    assert "[/bold] :bug:" in shown


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        app.run(arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["table", "x" * 300],
        ["verify", "x" * 300],
        ["evaluate", "x" * 300],
        ["inspect", "a/" * 3000],
        ["poison", "--dataset", "x" * 300 + "/y"],
        ["poison", "--out", "x" * 300],
        ["status", "x" * 300],
        ["gc", "x" * 300],
        ["sweep", "x" * 300],
        ["report", "--out", "x" * 300 + ".html"],
        ["take", "~nobody-of-this-name/x"],
        ["poison", "--data-root", "~nobody-of-this-name/x", "--dataset", "cifar10"],
    ],
)
def test_an_error_of_the_system_is_a_message_without_a_traceback(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert "Error: " in said
    assert "Traceback" not in said
    assert "Errno" not in said


def bdbench(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bdbench", *arguments]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **settings)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = bdbench("list", "models", stdout=full)
    assert done.returncode == 1
    assert "the output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_who_has_seen_enough_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = bdbench("list", stdout=writing)
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_without_standard_error_a_command_works_and_its_files_get_no_stray_text() -> None:
    words = "import os, sys; os.close(2); os.close(0); sys.argv[1:] = ['list', 'models']"
    code = f"{words}; from bdbench.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "convnet" in done.stdout
