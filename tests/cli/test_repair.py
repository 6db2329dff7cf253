"""What a user of a repair sees: the model beside its suspect, the settings that were tried, and messages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdbench import stages
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy, halves, strongest
from bdbench.defenses.repair.ft import FineTuning
from bdbench.registry import DEFENSES, repairs

DATA, SUSPECT, MENDED = "runs/digits-badnets-s0", "runs/digits-badnets-s0-none", "runs/mended"


def choosing(_: FineTuning, task: Task, suspect: Any, trusted: Any) -> Defended:
    """Return the suspect, with the findings of a choice between two settings of which the second ruins it."""
    _, held = halves(trusted, 0.5, task.engine.seed)
    before = accuracy(task.engine, suspect, held)
    choice = strongest([0.5, 1.0], lambda setting: before if setting < 1 else 0.0, before, len(held), None)
    return Defended(suspect, findings={**choice.findings, "pruned": {"layers.1": 2}, "said": "pruned 2 channels"})


@pytest.fixture(scope="module")
def repaired(walked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A walk with a repaired model, not yet evaluated."""
    folder = tmp_path_factory.mktemp("repair") / "walk"
    shutil.copytree(walked, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(FineTuning, "mend", choosing)
        stages.defend(Path(DATA), "ft", suspect=Path(SUSPECT), out=Path(MENDED), device="cpu")
    return folder


@pytest.fixture
def in_repair(repaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it that a test may change."""
    shutil.copytree(repaired, tmp_path / "walk")
    monkeypatch.chdir(tmp_path / "walk")
    return tmp_path / "walk"


def test_a_repaired_model_is_shown_beside_the_model_that_it_repaired(in_repair: Path, bdbench: Any) -> None:
    result = bdbench("evaluate", MENDED, "--json")
    (row,), (suspect,) = result.json["rows"], result.json["suspects"]
    assert (row["defense"], suspect["defense"]) == ("ft", "none")
    assert row["suspect_id"] == suspect["model_id"]
    assert (row["ba_change"], row["asr_change"]) == (0, 0)
    assert f"bdbench compare {SUSPECT}-eval {MENDED}-eval" in result.err
    shown = bdbench("evaluate", MENDED).out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│")] == ["none", "ft"]
    assert shown.count("+0.000") == 2


def test_a_condition_is_of_the_models_that_were_named_only(in_repair: Path, bdbench: Any) -> None:
    result = bdbench("evaluate", MENDED, "--assert", "ba_change>=0", "--assert", "ba>=2")
    assert result.code == 3
    assert f"{MENDED}-eval: ba" in result.err
    assert f"{SUSPECT}-eval: ba" not in result.err


def test_a_suspect_that_is_not_here_is_said(in_repair: Path, bdbench: Any) -> None:
    shutil.rmtree(SUSPECT)
    result = bdbench("evaluate", MENDED, "--json")
    wanted = result.json["rows"][0]["suspect_id"]
    assert result.json["suspects"] == []
    assert f"the row of the suspect, model {wanted}, is missing: it is neither under runs nor under runs/" in result.err


def test_a_suspect_that_is_damaged_costs_its_row_only(in_repair: Path, bdbench: Any) -> None:
    shutil.rmtree(f"{SUSPECT}-eval")
    Path(SUSPECT, "model.safetensors").unlink()
    result = bdbench("evaluate", MENDED, "--json")
    assert (result.code, len(result.json["rows"]), result.json["suspects"]) == (0, 1, [])
    assert f"{SUSPECT}/model.safetensors is missing" in result.err


def test_a_model_that_was_repaired_twice_is_shown_with_both_before_it(in_repair: Path, bdbench: Any) -> None:
    again = bdbench("defend", DATA, "--method", "ft", "--suspect", MENDED, "--epochs", "1", "--out", "runs/twice")
    assert f"suspect: {MENDED} (made by ft)" in again.err
    result = bdbench("evaluate", "runs/twice", "--json").json
    assert [row["suspect"] for row in result["rows"]] == [{"method": "ft"}]
    assert {row["defense"] for row in result["suspects"]} == {"ft", "none"}


def test_inspect_shows_the_settings_that_were_tried(in_repair: Path, bdbench: Any) -> None:
    shown = " ".join(bdbench("inspect", MENDED).out.split())
    assert "result pruned 2 channels pruned 2 channels: layers.1 2" in shown
    assert "weakest repair to the strongest, with the accuracy on 34 held-out images: the suspect" in shown
    (weak,) = (line for line in bdbench("inspect", MENDED).out.splitlines() if line.startswith("│ 0.5"))
    (strong,) = (line for line in bdbench("inspect", MENDED).out.splitlines() if line.startswith("│ 1"))
    assert "chosen" in weak
    assert "0.000 │ below the floor" in strong


def test_ranks_have_a_bound_that_can_be_moved(in_repair: Path, bdbench: Any) -> None:
    said = bdbench("table", "--ranks", "asr", "--min-ba", "0.5").out
    assert "must keep 0.5 of the undefended model's BA" in " ".join(said.split())
    for wrong in (["--ranks", "ba", "--min-ba", "0.5"], ["--min-ba", "0.5"]):
        refused = bdbench("table", *wrong)
        assert refused.code == 2
        assert "--min-ba bounds the ranks by DER and ASR; add --ranks der" in refused.err


@pytest.mark.parametrize(
    ("trusted", "said"),
    [
        (("--trusted", "0"), "method 'ft' needs trusted clean images, and runs/few has none; make some with: bdbench"),
        (("--trusted-per-class", "1"), "of 10 trusted images, --holdout 0.5 holds out 0"),
    ],
)
def test_too_few_trusted_images_are_refused_with_the_way_out(
    in_repair: Path, bdbench: Any, monkeypatch: pytest.MonkeyPatch, trusted: tuple[str, str], said: str
) -> None:
    monkeypatch.setattr(FineTuning, "mend", choosing)
    bdbench("poison", *trusted, "--out", "runs/few")
    bdbench("train", "runs/few", "--epochs", "1", "--out", "runs/few-none")
    result = bdbench("defend", "runs/few", "--method", "ft")
    assert result.code == (1 if "has none" in said else 2)
    assert said in result.err


def test_what_cannot_be_a_suspect_is_said(in_repair: Path, bdbench: Any) -> None:
    bdbench("poison", "--rate", "0.05", "--out", "runs/other")
    other = bdbench("defend", "runs/other", "--method", "ft", "--suspect", SUSPECT)
    assert other.code == 1
    assert "(runs/other); name the dataset that it was trained on, or a suspect of this one" in other.err
    assert f"{DATA} is a dataset artifact; a model artifact is needed" in (
        bdbench("defend", DATA, "--method", "ft", "--suspect", DATA).err
    )
    with Path(SUSPECT, "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\0")
    damaged = bdbench("defend", DATA, "--method", "ft", "--suspect", SUSPECT)
    assert f"{SUSPECT}/model.safetensors was changed: its SHA-256 is not the manifest's" in damaged.err


def test_a_class_without_trusted_images_is_named(in_repair: Path, bdbench: Any) -> None:
    bdbench("poison", "--trusted", "0.004", "--out", "runs/few")
    bdbench("train", "runs/few", "--epochs", "1", "--out", "runs/few-none")
    said = bdbench("defend", "runs/few", "--method", "ft", "--epochs", "1").err
    assert "no trusted image of 6 of 10 classes (class 0, 3, 6, 7, 8 and 1 more): a repair may forget them" in said


def test_repairs_are_listed_by_themselves(bdbench: Any) -> None:
    lines = bdbench("list", "defenses").out.splitlines()
    heading = next(place for place, line in enumerate(lines) if line.startswith("repairs"))
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert names[: heading - 1] == [name for name in DEFENSES.rows if name not in repairs()]
    assert "ft" in names[heading - 1 :]
    assert "or repair of a model: mcldef, ft," in " ".join(bdbench("defend", "--help").out.replace("│", " ").split())
