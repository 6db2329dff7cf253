"""The stage `scan`: what it sees, what it keeps, how it is judged, and training without what it set aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_stages import CPU, hashes, scramble
from toys import sealed

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.artifacts.manifests import MANIFEST
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact, class_evidence
from bdbench.defenses.training.retrain import at_random
from bdbench.errors import ArtifactError, DamagedError, OptionError
from bdbench.files import file_sha256
from bdbench.registry import DETECTORS
from bdbench.sweeps import worker

every_detector = pytest.mark.parametrize("name", DETECTORS.names())


@pytest.fixture(scope="session")
def suspect(toys: DatasetArtifact) -> ModelArtifact:
    """A model of the toys that learned their trusted images too."""
    place = toys.path.with_name("toys-none-trusted")
    return stages.defend(toys.path, "none-trusted", preset="tiny", options={"epochs": 3}, out=place, **CPU)


def scan(data: DatasetArtifact, name: str, suspect: ModelArtifact, out: Path, **settings: Any) -> ScanArtifact:
    return stages.scan(data.path, name, suspect=suspect.path, out=out, **CPU, **settings)


def kept(found: ScanArtifact) -> dict[str, Any]:
    return {name: said["sha256"] for name, said in found.manifest.files.items()}


@every_detector
def test_a_scan_scores_every_sample_and_its_artifact_is_whole(
    name: str, toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    found = scan(toys, name, suspect, tmp_path / "scan")
    verify(found.path)
    assert found.samples["row"].tolist() == list(range(120))
    assert found.samples["score"].between(-1e30, 1e30).all()
    assert found.null is not None
    again = scan(toys, name, suspect, tmp_path / "again")
    assert kept(again) == kept(found)


@every_detector
def test_a_scan_sees_neither_truth_nor_test_images(
    name: str, toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    scrambled = scramble(toys, tmp_path / "scrambled")
    blind = tmp_path / "blind"
    shutil.copytree(toys.path, blind)
    for file in ("truth.parquet", "originals.safetensors", "test.parquet", "test.safetensors", "triggered.parquet"):
        (blind / file).unlink()
    found = [
        scan(data, name, suspect, tmp_path / str(n))
        for n, data in enumerate((toys, scrambled, DatasetArtifact.open(blind)))
    ]
    assert kept(found[0]) == kept(found[1]) == kept(found[2])


def test_an_evaluation_opens_the_truth(toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan", decide="budget:0.1")
    judged = stages.evaluate_scan(found.path, data=toys.path)
    table = judged.metrics.set_index("metric")
    aside = torch.from_numpy(found.samples["set_aside"].to_numpy(copy=True))
    assert int(aside.sum()) == 12
    assert table.loc["detection_recall", "numerator"] == int((aside & toys.is_poison).sum())
    assert table.loc["detection_recall", "denominator"] == 12
    assert 0 <= table.loc["auroc_in_class", "value"] <= 1
    assert judged.manifest.facts["judged"] == "scan"


def test_training_without_nothing_is_plain_training(
    toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan", decide="alarm:0.0001")
    assert not found.samples["set_aside"].any()
    budget: dict[str, Any] = {"preset": "tiny", "options": {"epochs": 1}, **CPU}
    plain = stages.defend(toys.path, "none", out=tmp_path / "none", **budget)
    without = stages.defend(toys.path, "retrain", without=found.path, out=tmp_path / "retrain", **budget)
    assert hashes(plain)["model.safetensors"] == hashes(without)["model.safetensors"]


def test_what_is_left_out_changes_the_model_and_the_control_leaves_out_as_much_of_every_label(
    toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan", decide="budget:0.1")
    budget: dict[str, Any] = {"preset": "tiny", "without": found.path, **CPU}
    models = [
        stages.defend(toys.path, "retrain", options={"epochs": 1, "random": drawn}, out=tmp_path / str(drawn), **budget)
        for drawn in (False, True)
    ]
    assert hashes(models[0])["model.safetensors"] != hashes(models[1])["model.safetensors"]
    aside, labels = torch.from_numpy(found.samples["set_aside"].to_numpy(copy=True)), toys.train.labels
    assert torch.equal(labels[at_random(aside, labels, 0)].bincount(), labels[aside].bincount())


def test_a_scan_that_would_remove_a_class_is_refused_with_the_way_out(
    toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan", decide="budget:0.99")
    with pytest.raises(OptionError, match="largest-loss"):
        stages.defend(toys.path, "retrain", without=found.path, preset="tiny", out=tmp_path / "model", **CPU)


def test_what_does_not_belong_together_is_refused(
    toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path, toy_archive: Path
) -> None:
    other = stages.poison(toy_archive, "badnets", seed=5, trusted=0.0, out=tmp_path / "other")
    with pytest.raises(ArtifactError, match="was trained on dataset"):
        scan(other, "spectral", suspect, tmp_path / "scan")
    with pytest.raises(ArtifactError, match="trusted"):
        stages.scan(other.path, "scan-lda", suspect=suspect.path, **CPU)
    undecided = scan(toys, "spectral", suspect, tmp_path / "undecided", decide="none")
    for arguments, said in (
        ({"method": "retrain"}, "--without"),
        ({"method": "none", "without": undecided.path}, "takes no --without"),
        ({"method": "retrain", "without": undecided.path}, "no decision"),
    ):
        with pytest.raises(OptionError, match=said):
            stages.defend(toys.path, out=tmp_path / "model", **arguments, **CPU)


def test_a_grid_cannot_name_a_scan() -> None:
    found = worker.check({"named": [["defense", "again", "retrain", {}]], "models": []})
    assert [(axis, label) for axis, label, _ in found["errors"]] == [("defense", "again")]
    assert "--without" in found["errors"][0][2]


def prepared(found: ScanArtifact, folder: Path, change: Callable[[dict[str, Any]], None]) -> ScanArtifact:
    """A copy of a scan that somebody changed, its hashes right again."""
    shutil.copytree(found.path, folder)
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw["facts"])
    for file in raw["files"]:
        place = folder / file
        raw["files"][file] = {"sha256": file_sha256(place), "bytes": place.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(sealed(raw)))
    return ScanArtifact.open(folder)


@pytest.mark.parametrize("name", ["flagged", "null", "at_least", "suspect", "smallest_share"])
def test_facts_of_a_scan_have_a_form(name: str, toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan")
    with pytest.raises(ArtifactError, match=name):
        prepared(found, tmp_path / "prepared", lambda facts: facts.update({name: ["x"]}))


def test_scores_and_classes_that_somebody_prepared_are_damage(
    toys: DatasetArtifact, suspect: ModelArtifact, tmp_path: Path
) -> None:
    found = scan(toys, "spectral", suspect, tmp_path / "scan")

    def spoil(file: str, column: str, value: Any) -> ScanArtifact:
        folder = tmp_path / column

        def change(_: dict[str, Any]) -> None:
            frame = pd.read_parquet(folder / file)
            frame.loc[1, column] = value
            frame.to_parquet(folder / file, index=False)

        return prepared(found, folder, change)

    with pytest.raises(DamagedError, match="no number"):
        spoil("samples.parquet", "score", float("nan")).samples_of(120)
    with pytest.raises(DamagedError, match="does not judge its 4 classes"):
        class_evidence(spoil("classes.parquet", "label", 99))
