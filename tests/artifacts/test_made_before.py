"""What version 0.1 stored opens today, under the same ids; `made-by-0.1.tar.gz` was written by its own commands."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact, verify
from bdbench.artifacts.model import ModelArtifact, counted
from bdbench.datasets import digits
from bdbench.progress import Silent

STORED = Path(__file__).with_name("made-by-0.1.tar.gz")
CPU = {"device": "cpu", "precision": "fp32"}


class Notes(Silent):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["d", "m", "dbd", "m-eval", "dbd-eval"])
def test_every_artifact_of_0_1_is_whole(stored: Path, name: str) -> None:
    verify(stored / "runs" / name)


def test_a_history_of_0_1_counts_every_phase_in_epochs(stored: Path) -> None:
    history = ModelArtifact.open(stored / "runs" / "dbd").history
    counts = {str(phase): counted(rows) for phase, rows in history.groupby("phase")}
    assert {phase: (unit, count.tolist()) for phase, (unit, count) in counts.items()} == {
        phase: ("epoch", [1]) for phase in ("simclr", "head", "mixmatch")
    }


def test_what_0_1_stored_tells_no_epochs(stored: Path) -> None:
    assert ModelArtifact.open(stored / "runs" / "dbd").rounds_of(180) == []
    assert EvaluationArtifact.open(stored / "runs" / "dbd-eval").epochs is None


@pytest.fixture
def notes(stored: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setenv("BDBENCH_CACHE", str(stored / "cache"))
    return Notes()


def poison_again(out: Path, notes: Notes) -> DatasetArtifact:
    return stages.poison(
        "digits", "lc", options={"surrogate_epochs": 12}, source_options={"images": 200, "image_size": 8},
        trusted=0.1, seed=3, out=out, progress=notes, **CPU,
    )  # fmt: skip


def test_the_same_questions_have_the_ids_of_0_1(stored: Path, notes: Notes) -> None:
    runs = stored / "runs"
    poison_again(runs / "d", notes)
    stages.defend(runs / "d", "none", options={"epochs": 1}, out=runs / "m", progress=notes, **CPU)
    assert [line.split(" is there already")[0] for line in notes.lines] == [str(runs / n) for n in ("d", "m")]


def test_the_key_of_cached_features_is_that_of_0_1(stored: Path, tmp_path: Path, notes: Notes) -> None:
    """DBD's version is another, but not that of its first stage; what 0.1 kept there has no checksum."""
    short = {"epochs": 1, "ssl_epochs": 1, "head_epochs": 1, "steps_per_epoch": 2}
    stages.defend(stored / "runs" / "d", "dbd", options=short, out=tmp_path / "dbd", progress=notes, **CPU)
    assert any("encoders" in line and "is damaged and made again" in line for line in notes.lines)


def test_a_surrogate_that_0_1_cached_without_a_checksum_is_trained_again(
    stored: Path, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "AUGMENT", "crop,flip")  # as it was then
    again = poison_again(tmp_path / "d", notes)
    assert any("is damaged and made again (its checksum is another)" in line for line in notes.lines)
    assert again.id == DatasetArtifact.open(stored / "runs" / "d").id
