"""The command line in this process, and a folder in which the walk on digits was typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from toys import FAST

from bdbench.cli.app import run


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, " ".join(err.split())

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def bdbench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command line in this process and return its exit code and what it wrote."""
    monkeypatch.delenv("COLUMNS", raising=False)  # set where tests run in parallel

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0, out, err)

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_walk(walked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(walked)
    return walked


@pytest.fixture(scope="session")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the four bare commands were typed, with one epoch each, under their names."""
    folder = tmp_path_factory.mktemp("walk")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in (
            ["poison"],
            ["train", *FAST, "--out", "runs/digits-badnets-s0-none"],
            ["defend", "--method", "cbd", "--twin-epochs", "1", *FAST, "--out", "runs/digits-badnets-s0-cbd"],
            [
                *("defend", "--method", "abl", "--isolation-epochs", "1", "--unlearn-steps", "2", *FAST),
                *("--unlearn-step-limit", "0", "--out", "runs/digits-badnets-s0-abl"),
            ],
            ["evaluate"],
        ):
            with pytest.raises(SystemExit) as ended:
                run(command)
            assert not ended.value.code, command
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copy_of_walk(walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A walk that a document may change."""
    shutil.copytree(walked, tmp_path / "walk")
    monkeypatch.chdir(tmp_path / "walk")
    return tmp_path / "walk"
