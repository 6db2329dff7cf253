"""benchmarks/methods.py: every method once, whatever becomes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import methods
import pandas as pd
import pytest

from bdbench.registry import ATTACKS, DEFENSES


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods that give a row at once, and are named when they run; `mcldef` fails."""
    ran: list[str] = []

    def run(name: str, runs: Path, device: str, *, rehearsal: bool) -> dict[str, Any]:
        ran.append(name)
        if name == "mcldef":
            raise RuntimeError("no such\n kernel")
        return {"ba": 0.9}

    monkeypatch.setattr(methods, "KINDS", {"defense": (DEFENSES, run), "attack": (ATTACKS, run)})
    return ran


def test_a_method_that_fails_has_a_row_and_alone_runs_again(tmp_path: Path, played: list[str]) -> None:
    out = ["--out", str(tmp_path / "rows.csv")]
    assert methods.main(out) == 1
    rows = pd.read_csv(tmp_path / "rows.csv").set_index("method")
    assert set(rows.index) == {*DEFENSES.names(), *ATTACKS.names()}
    assert rows.loc["mcldef", "said"] == "RuntimeError: no such kernel"
    assert (rows.drop("mcldef")["said"] == "ok").all()
    played.clear()
    assert methods.main(out) == 1
    assert played == ["mcldef"]


def test_a_rehearsal_of_a_defense_and_of_an_attack(tmp_path: Path) -> None:
    words = ["--rehearsal", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.csv")]
    assert methods.main([*words, "--only", "cbd", "--only", "sig"]) == 0
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert rows[["kind", "method", "said"]].to_numpy().tolist() == [["defense", "cbd", "ok"], ["attack", "sig", "ok"]]
    assert rows["ba"].between(0, 1).all()
