"""The campaigns notice what they look for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import campaign_running
import pytest
from campaign_commands import line
from campaign_running import Room, damage, judged, run

from bdbench.cli import app


@pytest.mark.parametrize("text", ["a\x1b[31m", "a\rb", "\u202eb", "Traceback (most recent call last):\n", "\x7f"])
def test_output_that_commands_a_terminal_or_is_a_traceback_is_a_finding(text: str) -> None:
    assert judged(text)
    assert not judged("plain\ttext\n\N{SNOWMAN}")


def test_exceptions_long_work_and_odd_exit_codes_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> None:
        if words == ["code"]:
            raise SystemExit(7)
        while words == ["long"]:
            pass
        raise KeyError("x")

    monkeypatch.setattr(app, "run", broken)
    monkeypatch.setattr(campaign_running, "SECONDS", 1)
    assert run(["code"]).problem == "exit code 7"
    assert run(["long"]).problem == "more than 1 s"
    assert run([]).problem.startswith("KeyError at ")


def test_files_outside_and_programs_that_ran_are_findings(tmp_path: Path) -> None:
    for name in ("ran", "home", "case"):
        (tmp_path / name).mkdir()
    room = Room(tmp_path)
    assert room.disturbed() == ""
    (tmp_path / "ran" / "gs").touch()
    assert room.disturbed() == "a program ran: gs"
    (tmp_path / "home" / "evil").touch()
    assert room.disturbed() == f"a file was written outside: {tmp_path / 'home' / 'evil'}"
    assert room.disturbed() == ""


def test_a_case_is_the_same_in_every_run() -> None:
    def made() -> list[Any]:
        rng = random.Random("artifacts 5")
        return [damage(b"content of a file", rng), line(rng), line(rng)]

    assert made() == made()
