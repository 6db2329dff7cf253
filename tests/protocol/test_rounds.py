"""What a defense would have set aside after each epoch: stored with the model, judged by `evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import seal_again, toy_file

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.cli.app import run
from bdbench.defenses.base import Defended, Round, Task
from bdbench.errors import DamagedError, MethodError
from bdbench.progress import Silent
from bdbench.registry import DEFENSES
from bdbench.reports.runs import Shelf, describe_runs
from bdbench.stages import models

OPTIONS = {"isolation_epochs": 3, "isolation_rate": 0.05, "finetune": False, "unlearn_steps": 0}


@pytest.fixture(scope="module")
def model(toys: DatasetArtifact, tmp_path_factory: pytest.TempPathFactory) -> ModelArtifact:
    """ABL with three isolating epochs, of which each would isolate 6 of 120 samples."""
    return stages.defend(toys.path, "abl", options=OPTIONS, out=tmp_path_factory.mktemp("rounds") / "abl")


@pytest.fixture(scope="module")
def judged(model: ModelArtifact, toys: DatasetArtifact) -> EvaluationArtifact:
    return stages.evaluate(model.path, data=toys.path)


def altered(found: EvaluationArtifact | ModelArtifact, folder: Path, name: str, table: pa.Table) -> Path:
    """A copy of an artifact with another table in it, sealed as who prepares one would."""
    shutil.copytree(found.path, folder)
    pq.write_table(table, folder / name)
    seal_again(folder, json.loads((folder / "manifest.json").read_text()))
    return folder


def rounds_table(rows: list[Any], **other: Any) -> pa.Table:
    return pa.table({"phase": ["isolate"] * len(rows), "epoch": [1] * len(rows), "row": rows} | other)


def test_a_model_tells_what_would_have_been_isolated_after_each_epoch(model: ModelArtifact) -> None:
    rounds = model.rounds_of(120)
    assert [(phase, epoch, len(rows)) for phase, epoch, rows in rounds] == [("isolate", it, 6) for it in (1, 2, 3)]
    samples = model.samples
    assert samples is not None
    assert sorted(rounds[-1].rows.tolist()) == np.flatnonzero(samples["set_aside"]).tolist()


def test_each_epoch_is_judged_by_the_truth(
    model: ModelArtifact, judged: EvaluationArtifact, toys: DatasetArtifact
) -> None:
    poison = set(torch.nonzero(toys.is_poison).flatten().tolist())
    assert judged.epochs is not None
    told = {
        (row["epoch"], row["metric"]): (row["numerator"], row["denominator"]) for _, row in judged.epochs.iterrows()
    }
    expected = {}
    for _, epoch, rows in model.rounds_of(120):
        hits = len(poison & set(rows.tolist()))
        expected[epoch, "detection_precision"] = hits, 6
        expected[epoch, "detection_recall"] = hits, 12
        expected[epoch, "false_alarms"] = 6 - hits, 108
    assert told == expected
    assert set(judged.epochs["phase"]) == {"isolate"}
    np.testing.assert_allclose(judged.epochs["value"], judged.epochs["numerator"] / judged.epochs["denominator"])


def test_the_last_epoch_is_what_the_table_shows(judged: EvaluationArtifact) -> None:
    assert judged.epochs is not None
    last = judged.epochs[judged.epochs["epoch"] == 3].drop(columns=["phase", "epoch"]).set_index("metric")
    shown = judged.metrics.set_index("metric").loc[last.index]
    assert last.astype(float).equals(shown.astype(float))


def test_a_report_draws_the_epochs(judged: EvaluationArtifact) -> None:
    row = {"dataset_id": "d", "model_id": "m", "evaluation_id": judged.id}
    (found,) = describe_runs([row], Shelf.of([judged.path]))
    lines = found["rounds"]["isolate"]
    assert list(lines) == ["precision", "recall", "false alarms"]
    assert all(epochs == [1, 2, 3] for epochs, _ in lines.values())
    assert judged.epochs is not None
    expected = judged.epochs.loc[judged.epochs["metric"] == "detection_recall", "value"]
    assert lines["recall"][1] == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_method_that_chooses_once_tells_no_epochs(toys: DatasetArtifact, tmp_path: Path) -> None:
    plain = stages.defend(toys.path, "none", options={"epochs": 1}, out=tmp_path / "none")
    assert plain.rounds_of(120) == []
    assert stages.evaluate(plain.path, data=toys.path).epochs is None


def test_nothing_is_judged_where_nobody_knows_the_truth(toys: DatasetArtifact, tmp_path: Path) -> None:
    taken = stages.take(toy_file(tmp_path), out=tmp_path / "taken")
    found = stages.defend(taken.path, "abl", options=OPTIONS | {"isolation_epochs": 1}, out=tmp_path / "abl")
    assert len(found.rounds_of(len(taken.train))) == 1
    assert stages.evaluate(found.path).epochs is None


def test_where_nothing_is_poisoned_every_epoch_has_its_false_alarms(tmp_path: Path) -> None:
    clean = stages.poison(toy_file(tmp_path), "none", out=tmp_path / "clean")
    found = stages.defend(clean.path, "abl", options=OPTIONS, out=tmp_path / "abl")
    epochs = stages.evaluate(found.path).epochs
    assert epochs is not None
    assert epochs[["epoch", "metric", "numerator", "denominator"]].values.tolist() == [
        [epoch, "false_alarms", 5, 114] for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (rounds_table([-1, 5]), r"rounds\.parquet does not name 2 different samples of 120 after isolate 1"),
        (rounds_table([5, 120]), "does not name 2 different samples"),
        (rounds_table([5, 5]), "does not name 2 different samples"),
        (rounds_table([5, None]), "its column 'row' has gaps"),
        (rounds_table([0.5]), "its column 'row' holds double, not integer"),
        (rounds_table([5], epoch=["one"]), "its column 'epoch' holds string, not integer"),
        (rounds_table([5]).drop_columns("phase"), "it has no column 'phase'"),
    ],
    ids=["negative", "beyond", "twice", "gap", "fraction", "words", "missing"],
)
def test_rounds_that_somebody_prepared_are_damage(
    model: ModelArtifact, toys: DatasetArtifact, tmp_path: Path, table: pa.Table, said: str
) -> None:
    changed = altered(model, tmp_path / "abl", "rounds.parquet", table)
    with pytest.raises(DamagedError, match=said):
        stages.evaluate(changed, data=toys.path, out=tmp_path / "eval")


def test_judged_epochs_that_somebody_prepared_are_shown_as_far_as_they_go(
    judged: EvaluationArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged.epochs is not None
    frame = judged.epochs.assign(phase="\x1b[31m[bold]", value=float("nan"), epoch=2**40)
    frame.loc[0, "metric"] = "=1+1"
    changed = altered(judged, tmp_path / "eval", "epochs.parquet", pa.Table.from_pandas(frame, preserve_index=False))
    with pytest.raises(SystemExit) as ended:
        run(["inspect", str(changed)])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert str(2**40) in printed
    row = {"dataset_id": "d", "model_id": "m", "evaluation_id": judged.id}
    (found,) = describe_runs([row], Shelf.of([changed]))
    assert found["rounds"]["\x1b[31m[bold]"]["recall"][1] == [None] * 3


def test_damaged_epochs_leave_the_row_and_the_report(judged: EvaluationArtifact, tmp_path: Path) -> None:
    changed = altered(judged, tmp_path / "eval", "epochs.parquet", pa.table({"phase": [1]}))
    row = {"dataset_id": "d", "model_id": "m", "evaluation_id": judged.id}
    (found,) = describe_runs([row], Shelf.of([changed]))
    assert found["rounds"] == {}
    assert any("No rounds" in line and "epochs.parquet" in line for line in found["missing"])


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([Round("a", 1, torch.tensor([0, 120]))], r"a round \(a 1\) that does not name different samples of 120"),
        ([Round("a", 1, torch.tensor([3, 3]))], "does not name different samples"),
        ([Round("a", 1, torch.tensor([0.5]))], "does not name different samples"),
        ([Round("a", 1, torch.tensor([1])), Round("a", 1, torch.tensor([2]))], "two rounds of one epoch"),
    ],
    ids=["beyond", "twice", "fraction", "epoch"],
)
def test_a_defense_that_names_no_samples_is_a_mistake_of_its_author(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: list[Round], said: str
) -> None:
    method = DEFENSES.load("none")
    monkeypatch.setattr(method, "run", lambda _, task: untrained(task, rounds))
    with pytest.raises(MethodError, match=said):
        stages.defend(toys.path, "none", out=tmp_path / "none")


def untrained(task: Task, rounds: list[Round]) -> Defended:
    return Defended(task.new_model("model"), rounds=rounds)


def test_more_rounds_than_an_artifact_may_hold_are_not_kept_and_said(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    notes = Notes()
    monkeypatch.setattr(models, "ROWS", 5)
    method = DEFENSES.load("none")
    told = [Round("train", 1, torch.arange(2)), Round("train", 2, torch.arange(4))]
    monkeypatch.setattr(method, "run", lambda _, task: untrained(task, told))
    made = stages.defend(toys.path, "none", out=tmp_path / "none", progress=notes)
    assert made.rounds_of(120) == []
    assert "what was set aside after each epoch is not kept: 6 rows, an artifact holds 5" in notes.lines
