"""Evaluations that somebody prepared never take the table from the others."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import seal_again

from bdbench import stages
from bdbench.artifacts import manifest_forms
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.errors import DamagedError, DamageWarning
from bdbench.protocol import suspects
from bdbench.reports import tables
from bdbench.reports.results import read_rows

MORE = {"abl": {"isolation_epochs": 1, "unlearn_steps": 2}}


@pytest.fixture(scope="module")
def evaluations(toys: DatasetArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of one dataset, without a defense and with one."""
    folder = tmp_path_factory.mktemp("evaluations")
    for method in ("none", "oracle", "abl"):
        model = stages.defend(toys.path, method, options={"epochs": 1, **MORE.get(method, {})}, out=folder / method)
        stages.evaluate(model.path, data=toys.path, out=folder / f"{method}-eval")
    return folder


@pytest.mark.parametrize(
    ("metric", "column"), [("ba", "value"), ("asr", "value"), ("floor", "value"), ("ba", "metric"), ("asr", "metric")]
)
def test_an_evaluation_without_a_number_is_left_out(
    evaluations: Path, tmp_path: Path, metric: str, column: str
) -> None:
    for name in ("none-eval", "oracle-eval"):
        shutil.copytree(evaluations / name, tmp_path / name)
    changed = tmp_path / "none-eval"
    frame = pd.read_parquet(changed / "metrics.parquet")
    frame.loc[frame["metric"] == metric, column] = None
    frame.to_parquet(changed / "metrics.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    with pytest.warns(DamageWarning, match="left out"):
        (row,) = read_rows([tmp_path])
    assert row["defense"] == "oracle"


def test_an_evaluation_that_names_no_numbers_leaves_the_others_in_the_table(evaluations: Path, tmp_path: Path) -> None:
    for name in ("none-eval", "oracle-eval"):
        shutil.copytree(evaluations / name, tmp_path / name)
    raw = json.loads((tmp_path / "none-eval" / "manifest.json").read_text())
    seal_again(tmp_path / "none-eval", raw | {"files": {}})
    with pytest.warns(DamageWarning, match=r"has no metrics\.parquet"):
        (row,) = read_rows([tmp_path])
    assert row["defense"] == "oracle"


def test_a_reference_without_attack_gives_no_der(evaluations: Path, tmp_path: Path) -> None:
    for name in ("none-eval", "oracle-eval"):
        shutil.copytree(evaluations / name, tmp_path / name)
    changed = tmp_path / "none-eval"
    frame = pd.read_parquet(changed / "metrics.parquet")
    frame[~frame["metric"].isin(["asr", "floor"])].to_parquet(changed / "metrics.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    assert [row["der"] for row in read_rows([tmp_path])] == [None, None]


@pytest.mark.parametrize("change", ["twice", "half", "order", "rows"])
def test_scores_of_other_rows_are_no_scores(
    evaluations: Path, toys: DatasetArtifact, tmp_path: Path, change: str
) -> None:
    changed = tmp_path / "abl"
    shutil.copytree(evaluations / "abl", changed)
    frame = pd.read_parquet(changed / "samples.parquet")
    others = {
        "twice": pd.concat([frame, frame]),
        "half": frame[:60],
        "order": frame[::-1],
        "rows": frame.assign(row=-1),
    }
    others[change].to_parquet(changed / "samples.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    with pytest.raises(DamagedError, match=r"scored \d+ samples, not these 120"):
        suspects.rank(ModelArtifact.open(changed), toys)
    with pytest.raises(DamagedError, match=r"scored \d+ samples, not these 120"):
        stages.evaluate(changed, data=toys.path, out=tmp_path / "eval")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_scores_that_are_no_numbers_are_damage(
    evaluations: Path, toys: DatasetArtifact, tmp_path: Path, value: float | None
) -> None:
    changed = tmp_path / "abl"
    shutil.copytree(evaluations / "abl", changed)
    frame = pd.read_parquet(changed / "samples.parquet")
    frame.loc[3, "score"] = value
    frame.to_parquet(changed / "samples.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    for use in (suspects.rank, lambda model, data: stages.evaluate(model.path, data=data.path, out=tmp_path / "eval")):
        with pytest.raises(DamagedError, match="a score that is no number"):
            use(ModelArtifact.open(changed), toys)


def test_a_class_name_of_half_a_character_is_escaped(toys: DatasetArtifact, tmp_path: Path) -> None:
    shutil.copytree(toys.path, tmp_path / "toys")
    raw = json.loads((tmp_path / "toys" / "manifest.json").read_text())
    raw["facts"]["class_names"][0] = "\ud800"
    seal_again(tmp_path / "toys", raw)
    assert DatasetArtifact.open(tmp_path / "toys").class_names[0] == r"\ud800"


@pytest.mark.parametrize("labels", [[0] * 60, [4] * 120, [-1] * 120])
def test_labels_that_name_no_class_are_damage(
    evaluations: Path, toys: DatasetArtifact, tmp_path: Path, labels: list[int]
) -> None:
    changed = tmp_path / "toys"
    shutil.copytree(toys.path, changed)
    pd.DataFrame({"row": range(len(labels)), "label": labels}).to_parquet(changed / "train.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    with pytest.raises(DamagedError, match=r"train\.parquet does not hold its labels"):
        suspects.rank(ModelArtifact.open(evaluations / "abl"), DatasetArtifact.open(changed))


@pytest.mark.parametrize(
    "said",
    [
        '{"a": "\x01"}',
        "[" * 100_000,
        '{"index_columns": ["nope"], "columns": [], "column_indexes": []}',
        "5",
    ],
    ids=["control", "nested", "index", "number"],
)
def test_odd_notes_of_pandas_are_damage_or_nothing(evaluations: Path, tmp_path: Path, said: str) -> None:
    changed = tmp_path / "eval"
    shutil.copytree(evaluations / "none-eval", changed)
    table = pq.ParquetFile(changed / "metrics.parquet").read()
    pq.write_table(table.replace_schema_metadata({b"pandas": said.encode()}), changed / "metrics.parquet")
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    with suppress(DamagedError):
        assert len(EvaluationArtifact.open(changed).metrics)


@pytest.mark.parametrize(("part", "key"), [("config", "model"), ("config", "preset"), ("inputs", "dataset")])
def test_what_was_asked_of_a_model_and_is_not_said_is_damage(
    evaluations: Path, toys: DatasetArtifact, tmp_path: Path, part: str, key: str
) -> None:
    shutil.copytree(evaluations / "none", tmp_path / "none")
    raw = json.loads((tmp_path / "none" / "manifest.json").read_text())
    del raw["ask"][part][key]
    seal_again(tmp_path / "none", raw)
    with pytest.raises(DamagedError, match=f"does not say the {key} that was asked"):
        stages.evaluate(tmp_path / "none", data=toys.path, out=tmp_path / "eval")


@pytest.mark.parametrize("key", ["labels", "target"])
def test_what_was_asked_of_a_dataset_and_is_not_said_is_damage(toys: DatasetArtifact, tmp_path: Path, key: str) -> None:
    shutil.copytree(toys.path, tmp_path / "toys")
    raw = json.loads((tmp_path / "toys" / "manifest.json").read_text())
    del raw["ask"]["config"][key]
    seal_again(tmp_path / "toys", raw)
    with pytest.raises(DamagedError, match=f"does not say the {key} that was asked"):
        _ = DatasetArtifact.open(tmp_path / "toys").target


@pytest.mark.parametrize("target", ["x", -1, 99, None, True])
def test_a_target_that_is_no_class_is_damage(toys: DatasetArtifact, tmp_path: Path, target: object) -> None:
    shutil.copytree(toys.path, tmp_path / "toys")
    raw = json.loads((tmp_path / "toys" / "manifest.json").read_text())
    raw["ask"]["config"]["target"] = target
    seal_again(tmp_path / "toys", raw)
    with pytest.raises(DamagedError, match="its target"):
        _ = DatasetArtifact.open(tmp_path / "toys").target


def test_every_fact_that_is_written_has_a_form(evaluations: Path, toys: DatasetArtifact) -> None:
    for place in (toys.path, evaluations / "abl", evaluations / "abl-eval"):
        raw = json.loads((place / "manifest.json").read_text())
        facts, made = manifest_forms.PARTS[raw["ask"]["kind"]]
        assert raw["facts"].keys() <= facts.model_fields.keys()
        assert raw["made"].keys() <= made.model_fields.keys()


@pytest.mark.parametrize(
    "change", [{"guessed": "x"}, {"remarks": 5}, {"unreadable": [1]}, {"guessed": {"augment": {}}}]
)
def test_facts_of_another_form_are_damage(toys: DatasetArtifact, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(toys.path, tmp_path / "toys")
    raw = json.loads((tmp_path / "toys" / "manifest.json").read_text())
    raw["facts"] |= change
    seal_again(tmp_path / "toys", raw)
    with pytest.raises(DamagedError, match=rf"facts\.{next(iter(change))}"):
        DatasetArtifact.open(tmp_path / "toys")


@pytest.mark.parametrize("change", ["step twice", "step of text", "no speed", "row twice"])
def test_a_history_of_another_form_is_damage(evaluations: Path, tmp_path: Path, change: str) -> None:
    changed = tmp_path / "none"
    shutil.copytree(evaluations / "none", changed)
    table = pq.ParquetFile(changed / "history.parquet").read()
    text = pa.array(["x"] * len(table))
    others = {
        "step twice": lambda: table.append_column("step", table["step"]),
        "step of text": lambda: table.drop_columns(["step"]).append_column("step", text),
        "no speed": lambda: table.drop_columns(["images_per_second"]),
        "row twice": lambda: table.append_column("row", text).append_column("row", text),
    }
    pq.write_table(others[change](), changed / "history.parquet")
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    with pytest.raises(DamagedError, match=r"history\.parquet is not a Parquet file of the form"):
        _ = ModelArtifact.open(changed).history


def test_facts_of_any_text_reach_a_spreadsheet_as_text(evaluations: Path, tmp_path: Path) -> None:
    changed = tmp_path / "eval"
    shutil.copytree(evaluations / "none-eval", changed)
    raw = json.loads((changed / "manifest.json").read_text())
    raw["facts"] |= {"model": "\ud800", "=1+1": "=2+2"}
    seal_again(changed, raw)
    written = tables.render(read_rows([tmp_path]), "csv")
    assert isinstance(written, str)
    assert "\\ud800" in written
    assert "'=1+1" in written.splitlines()[0]
    assert ",=" not in written
