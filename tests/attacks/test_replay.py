"""Attacks that train a victim: the dataset that replays them, and the victim that lies beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import TOY_ATTACKS, Fuse, toy_file

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.artifacts.model import ModelArtifact
from bdbench.attacks.parts.victims import VictimAttack
from bdbench.errors import ArtifactError
from bdbench.progress import Silent
from bdbench.registry import ATTACKS
from bdbench.reports import results
from bdbench.training.engine import Engine

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
ATTACK = "input-aware"
MENDED: dict[str, Any] = {"epochs": 1, "batch_size": 32, "oracle_target": 0, "inversion_epochs": 5}

TRAINERS = [name for name in ATTACKS.names() if issubclass(ATTACKS.load(name), VictimAttack)]


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def poison(folder: Path, out: str, attack: str = ATTACK, **settings: Any) -> DatasetArtifact:
    options = TOY_ATTACKS.get(attack, {}) | settings.pop("options", {})
    return stages.poison(toy_file(folder), attack, options=options, trusted=0.1, out=folder / out, **CPU, **settings)


def victim_of(data: DatasetArtifact) -> Path:
    return data.path.with_name(f"{data.path.name}-victim")


def hashes(path: Path) -> dict[str, str]:
    """Hashes of all files but the history, which holds seconds."""
    artifact = verify(path)
    return {name: said["sha256"] for name, said in artifact.manifest.files.items() if name != "history.parquet"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatasetArtifact]:
    """108 images replayed from an attack that trained a victim; tests only read it."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDBENCH_CACHE", str(folder / "cache"))
        yield poison(folder, "data")


def test_the_victim_lies_beside_the_data_set(data: DatasetArtifact) -> None:
    victim = ModelArtifact.open(victim_of(data))
    assert (victim.dataset_id, victim.manifest.ask.method) == (data.id, "victim")
    assert victim.manifest.made["training_seconds"] == pytest.approx(victim.history["seconds"].sum(), abs=0.01)
    assert list(victim.history["phase"]) == ["mask", "victim"]
    assert victim.classifier()(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    verify(victim.path)


def test_the_state_in_the_data_set_triggers_new_images(data: DatasetArtifact) -> None:
    attack = ATTACKS.load(ATTACK).parse(TOY_ATTACKS[ATTACK])
    again = attack.trigger(data.test, data.triggered_rows, data.tensors("attack.safetensors"), "test", 0)
    assert torch.equal(again, data.triggered.images)


def test_rows_of_a_replay_are_marked(data: DatasetArtifact, tmp_path: Path) -> None:
    plain = stages.defend(data.path, "none", options={"epochs": 1}, out=tmp_path / "none", **CPU)
    for number, model in enumerate((victim_of(data), plain.path)):
        stages.evaluate(model, data=data.path, out=tmp_path / f"eval-{number}", **CPU)
    rows = {row["defense"]: row for row in results.mark_rows(results.read_rows([tmp_path]))}
    assert set(rows) == {"victim", "none"}
    assert all("p" in row["marks"] for row in rows.values())


def test_the_victim_is_found_by_its_data_set(data: DatasetArtifact, tmp_path: Path) -> None:
    result = stages.evaluate(victim_of(data), out=tmp_path / "eval", **CPU)
    assert result.manifest.facts["replay"]
    assert result.manifest.facts["attack"] == ATTACK
    assert result.metrics.set_index("metric").loc["asr", "denominator"] == 30


def test_a_method_that_mends_takes_the_victim(data: DatasetArtifact, tmp_path: Path) -> None:
    mended = stages.defend(data.path, "mcldef", options=MENDED, suspect=victim_of(data), out=tmp_path / "mended", **CPU)
    assert mended.manifest.ask.inputs["suspect"] == ModelArtifact.open(victim_of(data)).id
    assert mended.manifest.facts["model"] == "convnet"
    verify(mended.path)


def test_an_equal_call_reuses_both(toy_archive: Path) -> None:
    folder = toy_archive.parent
    first, notes = poison(folder, "data"), Notes()
    written = [path.stat().st_mtime_ns for path in (first.path, victim_of(first))]
    again = poison(folder, "data", progress=notes)
    assert again.id == first.id
    assert [path.stat().st_mtime_ns for path in (again.path, victim_of(again))] == written
    assert any("there already" in line for line in notes.lines)


def test_a_lost_victim_is_made_again(toy_archive: Path) -> None:
    folder = toy_archive.parent
    first = poison(folder, "data")
    before = [hashes(path) for path in (first.path, victim_of(first))]
    shutil.rmtree(victim_of(first))
    again = poison(folder, "data")
    assert [hashes(path) for path in (again.path, victim_of(again))] == before


def test_a_stranger_in_the_victims_place_is_left_alone(toy_archive: Path) -> None:
    folder = toy_archive.parent
    place = folder / "data-victim"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"data-victim exists and is not an artifact.*--out"):
        poison(folder, "data")
    assert not (folder / "data").exists()
    assert (place / "thesis.txt").exists()


def test_another_attack_in_the_place_is_refused_and_forced_away(toy_archive: Path) -> None:
    folder = toy_archive.parent
    first = poison(folder, "data", attack="wanet-tc")
    with pytest.raises(ArtifactError, match="is another dataset"):
        poison(folder, "data", attack="lira")
    second = poison(folder, "data", attack="lira", force=True)
    assert ModelArtifact.open(victim_of(second)).dataset_id == second.id != first.id


def test_attacks_on_data_alone_leave_no_victim(toy_archive: Path) -> None:
    stages.poison(toy_archive, "badnets", out=toy_archive.parent / "data", **CPU)
    assert not (toy_archive.parent / "data-victim").exists()


@pytest.mark.parametrize("attack", TRAINERS)
def test_an_interrupted_attack_ends_as_an_uninterrupted_one(
    attack: str, toy_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdbench.stages.datasets.Engine", partial(Engine, checkpoint_seconds=0.0))
    folder, options = toy_archive.parent, {"victim_epochs": 2}
    whole = poison(folder, "whole", attack, options=options)
    # 108 images are 7 steps of 16: it ends in the second epoch of the victim, with the first phases behind it
    fuse = Fuse(10, "victim", size=16)
    with pytest.raises(KeyboardInterrupt):
        poison(folder, "resumed", attack, options=options, progress=fuse)
    assert not (folder / "resumed").exists()
    rest = Fuse(7, size=16)
    resumed = poison(folder, "resumed", attack, options=options, progress=rest)
    assert rest.started == ["victim"]
    assert hashes(resumed.path) == hashes(whole.path)
    assert hashes(victim_of(resumed)) == hashes(victim_of(whole))
