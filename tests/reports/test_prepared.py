"""Evaluations that somebody prepared never take the table from the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from toys import seal_again

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.errors import DamageWarning
from bdbench.reports.results import read_rows


@pytest.fixture(scope="module")
def evaluations(toys: DatasetArtifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of one dataset, without a defense and with one."""
    folder = tmp_path_factory.mktemp("evaluations")
    for method in ("none", "oracle"):
        model = stages.defend(toys.path, method, options={"epochs": 1}, out=folder / method)
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


def test_a_reference_without_attack_gives_no_der(evaluations: Path, tmp_path: Path) -> None:
    for name in ("none-eval", "oracle-eval"):
        shutil.copytree(evaluations / name, tmp_path / name)
    changed = tmp_path / "none-eval"
    frame = pd.read_parquet(changed / "metrics.parquet")
    frame[~frame["metric"].isin(["asr", "floor"])].to_parquet(changed / "metrics.parquet", index=False)
    seal_again(changed, json.loads((changed / "manifest.json").read_text()))
    assert [row["der"] for row in read_rows([tmp_path])] == [None, None]
