"""Files that commands write for people: whole, or as they were before."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from bdbench import files

ABL = "runs/digits-badnets-s0-abl"
COMMANDS = {
    "table": ("table", "runs", "--format", "csv", "--out"),
    "junit": ("table", "runs", "--assert", "ba>=0", "--junit"),
    "compare": ("compare", ABL, "runs/digits-badnets-s0-none", "--csv"),
    "suspects": ("suspects", ABL, "--csv"),
    "picture": ("suspects", ABL, "--image"),
    "curves": ("inspect", ABL, "--image"),
    "report": ("report", "runs", "--out"),
}


def full(file: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_finished_stays_as_it_was(
    command: str, in_walk: Path, bdbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("x.png" if command in ("picture", "curves") else "x")
    out.write_text("old")
    monkeypatch.setattr(files, "flush", full)
    ended = bdbench(*COMMANDS[command], out)
    assert (ended.code, out.read_text(), list(tmp_path.iterdir())) == (1, "old", [out])
    assert f"cannot write {out}" in ended.err


def test_a_link_stays_a_link_and_a_device_a_device(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert bdbench(*COMMANDS["table"], tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text().startswith("attack,")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # the table is shorter than a pipe is long
    assert bdbench(*COMMANDS["table"], tmp_path / "pipe").code == 0
    assert os.read(reader, 7) == b"attack,"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_name_too_long_for_a_file_is_a_usage_error(in_walk: Path, bdbench: Any) -> None:
    ended = bdbench("table", "--assert", "ba>=0", "--junit", "a" * 300)
    assert ended.code == 2
    assert "File name too long" in ended.err
