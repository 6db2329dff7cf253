"""The three stages from Python, and what every registered defense keeps."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pytest
import torch
from needs import needs_of
from safetensors.torch import load_file, save_file
from toys import (
    ATTACK_NAMES,
    TOY_ATTACKS,
    TRAINS_NOTHING,
    cannot_compile,
    seal_again,
    sealed,
    toy_compiler,
    toy_file,
    toy_source,
)

from bdbench import files, stages
from bdbench.artifacts import finding, manifests, store
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact, verify
from bdbench.artifacts.model import ModelArtifact
from bdbench.cli.app import run
from bdbench.data import ImageDataset, Role
from bdbench.defenses.base import Defended, Defense, Task
from bdbench.defenses.training.plain import NoDefense
from bdbench.errors import ArtifactError, DamageWarning, MethodError, OptionError, TrainingError
from bdbench.options import Options, describe_options
from bdbench.progress import Silent
from bdbench.protocol import budget, judging, networks, poisoning
from bdbench.protocol.metrics import Rate
from bdbench.registry import ATTACKS, DEFENSES
from bdbench.reports import results, tables
from bdbench.training.engine import Engine
from bdbench.training.recipe import Recipe

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}

SMALL: dict[str, dict[str, Any]] = {
    "cbd": {"twin_epochs": 1},
    "abl": {"isolation_epochs": 1, "isolation_rate": 0.05, "unlearn_steps": 2, "unlearn_step_limit": 0},
    "dbd": {"ssl_epochs": 1, "ssl_batch_size": 64, "head_epochs": 1, "steps_per_epoch": 2},
    "nad": {"teacher_epochs": 1},
    "fine-pruning": {"holdout": 0.7, "tolerance": 1.0},
    "mcldef": {"significance": 1.0, "inversion_epochs": 40, "inversion_cost": 0.0},
    "nft": {"steps_per_epoch": 2},
    "anp": {"steps_per_epoch": 4, "lr": 1.0, "holdout": 0.7},
    "rnp": {"unlearn_steps": 40, "unlearn_lr": 0.1, "lr": 1.0, "holdout": 0.7},
    "mcr": {"curve_epochs": 2, "holdout": 0.7, "tolerance": 1.0},
    "tsbd": {"unlearn_epochs": 2},
    "mm-bm": {"batch_size": 2, "first_bound": 0.2, "epochs": 2},
    "unit": {"holdout": 0.7, "tolerance": 1.0},
    "neural-cleanse": {"anomaly_threshold": 0.0, "inversion_epochs": 40, "inversion_cost": 0.0},
}
"""Budgets for 120 images; a method that is not named here runs its tiny preset with one epoch."""

every_attack = pytest.mark.parametrize("name", ATTACK_NAMES)
every_defense = pytest.mark.parametrize("name", DEFENSES.names())
every_blind_defense = pytest.mark.parametrize("name", sorted(set(DEFENSES.names()) - {"oracle", "clean"}))


def defend(data: DatasetArtifact, name: str, out: Path, **settings: Any) -> ModelArtifact:
    """Run a defense with a budget of a second; methods that mend a model get an undefended one."""
    options = {"epochs": 1, "batch_size": 32} | SMALL.get(name, {}) | settings.pop("options", {})
    needs = needs_of(name, data, data.path.parent, **CPU)
    return stages.defend(data.path, name, preset="tiny", options=options, out=out, **{**CPU, **needs, **settings})


def hashes(artifact: ModelArtifact | DatasetArtifact) -> dict[str, Any]:
    """Hashes of all files but the history, which holds seconds."""
    return {name: said["sha256"] for name, said in artifact.manifest.files.items() if name != "history.parquet"}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


# the walk


def test_digits_go_through_all_three_stages(digits: DatasetArtifact, tmp_path: Path) -> None:
    assert digits.manifest.facts["counts"] == {"train": 1366, "test": 359, "triggered": 323, "trusted": 72}
    options = {"epochs": 4, "lr": 0.05, "batch_size": 64, "augment": "none"}
    plain = stages.defend(digits.path, "none", options=options, out=tmp_path / "none", **CPU)
    result = stages.evaluate(plain.path, data=digits.path, **CPU)
    for artifact in (digits, plain, result):
        verify(artifact.path)
    values = result.metrics.set_index("metric")["value"]
    assert values["ba"] > 0.9
    assert values["asr"] > 0.9
    assert values["floor"] < 0.1


def test_ba_counts_all_test_images_and_asr_all_but_those_of_the_target(digits: DatasetArtifact, tmp_path: Path) -> None:
    model = stages.defend(digits.path, "none", options={"epochs": 1}, out=tmp_path / "none", **CPU)
    table = stages.evaluate(model.path, data=digits.path, **CPU).metrics.set_index("metric")
    of_target = int((digits.test.labels == 0).sum())
    assert table.loc["ba", "denominator"] == 359
    assert table["denominator"][["asr", "floor"]].tolist() == [359 - of_target] * 2
    assert table.loc["target_recall", "denominator"] == of_target


def test_metrics_follow_from_the_predictions(toys: DatasetArtifact, tmp_path: Path) -> None:
    result = stages.evaluate(defend(toys, "none", tmp_path / "none").path, data=toys.path, **CPU)
    frame = result.predictions
    test, triggered = frame[frame["split"] == "test"], frame[frame["split"] == "triggered"]
    value = result.metrics.set_index("metric")["value"]
    clean = test.set_index("row")["prediction"]
    assert value["ba"] == pytest.approx((test["prediction"] == test["clean_label"]).mean())
    assert value["asr"] == pytest.approx((triggered["prediction"] == 0).mean())
    assert value["ra"] == pytest.approx((triggered["prediction"] == triggered["clean_label"]).mean())
    assert value["floor"] == pytest.approx((clean.loc[triggered["row"]] == 0).mean())
    assert (triggered["label"] == 0).all()
    assert frame["confidence"].between(0.25, 1).all()


def test_detection_is_measured_against_the_roles(toys: DatasetArtifact, tmp_path: Path) -> None:
    model = defend(toys, "abl", tmp_path / "abl")
    table = stages.evaluate(model.path, data=toys.path, **CPU).metrics.set_index("metric")
    assert model.samples is not None
    aside, is_poison = model.samples["set_aside"], toys.truth["role"] == Role.POISON
    assert table.loc["detection_precision", "numerator"] == (aside & is_poison).sum()
    assert table.loc["detection_precision", "denominator"] == aside.sum() == 6
    assert table.loc["detection_recall", "denominator"] == 12


def test_covers_do_not_count_as_poison(toy_archive: Path, tmp_path: Path) -> None:
    data = stages.poison(toy_archive, "wanet", trusted=0, out=tmp_path / "data")
    assert data.truth["role"].value_counts().to_dict() == {Role.CLEAN: 84, Role.COVER: 24, Role.POISON: 12}
    table = stages.evaluate(defend(data, "abl", tmp_path / "abl").path, **CPU).metrics.set_index("metric")
    assert table.loc["detection_recall", "denominator"] == 12


def test_a_method_that_decides_nothing_has_no_precision(toys: DatasetArtifact, tmp_path: Path) -> None:
    scored = stages.evaluate(defend(toys, "cbd", tmp_path / "cbd").path, data=toys.path, **CPU).metrics
    assert "auroc" in set(scored["metric"])
    assert not {"detection_precision", "detection_recall"} & set(scored["metric"])
    plain = stages.evaluate(defend(toys, "none", tmp_path / "none").path, data=toys.path, **CPU).metrics
    assert "auroc" not in set(plain["metric"])


def test_all_to_all_is_judged_on_all_images_and_has_no_target(toy_archive: Path, tmp_path: Path) -> None:
    data = stages.poison(toy_archive, "badnets", options={"labels": "all-to-all"}, out=tmp_path / "data")
    table = stages.evaluate(defend(data, "none", tmp_path / "none").path, **CPU).metrics.set_index("metric")
    assert table.loc["asr", "denominator"] == 40
    assert "target_recall" not in table.index


def test_source_specific_asr_counts_the_source_and_says_beside_it_how_the_others_fare(
    toy_archive: Path, tmp_path: Path
) -> None:
    options = {"labels": "source-specific", "source": 3, "target": 2}
    data = stages.poison(toy_archive, "badnets", options=options, out=tmp_path / "data")
    model = defend(data, "none", tmp_path / "none")
    frame = stages.evaluate(model.path, **CPU).predictions
    frame["prediction"] = frame["clean_label"]
    # triggered: 10 images of the source class, 7 called the target; 20 of the classes 0 and 1, 4 called so
    triggered, of_source = frame["split"] == "triggered", frame["clean_label"] == 3
    frame.loc[frame[triggered & of_source].index[:7], "prediction"] = 2
    frame.loc[frame[triggered & ~of_source].index[:4], "prediction"] = 2
    # without trigger, one image of the source class and five of the others are called the target
    frame.loc[frame[~triggered & of_source].index[:1], "prediction"] = 2
    frame.loc[frame[~triggered & (frame["clean_label"] == 0)].index[:5], "prediction"] = 2
    rates, _ = judging.measure(frame, data, model)
    assert {name: rates[name] for name in ("asr", "asr_others", "ra", "floor")} == {
        "asr": Rate(7, 10),
        "asr_others": Rate(4, 20),
        "ra": Rate(3, 10),
        "floor": Rate(1, 10),
    }


def test_the_other_classes_have_a_column_where_labels_are_source_specific_only(
    toys: DatasetArtifact, toy_archive: Path, tmp_path: Path
) -> None:
    data = stages.poison(toy_archive, "badnets", options={"labels": "source-specific"}, out=tmp_path / "data")
    for folder, source in (("specific", data), ("plain", toys)):
        made = stages.evaluate(defend(source, "none", tmp_path / folder / "none").path, data=source.path, **CPU)
        (row,) = results.read_rows([made.path])
        shown = str(tables.render([row], "markdown"))
        assert ("ASR, other classes" in shown) == (folder == "specific")
        assert row["asr_others_n"] == (20 if folder == "specific" else None)


def test_an_evaluation_tells_a_table_all_it_needs(toys: DatasetArtifact, tmp_path: Path) -> None:
    model = defend(toys, "none", tmp_path / "none")
    facts = stages.evaluate(model.path, data=toys.path, **CPU).manifest.facts
    assert (facts["dataset"], facts["attack"], facts["defense"], facts["model"]) == (
        "toy",
        "badnets",
        "none",
        "convnet",
    )
    assert (facts["dataset_id"], facts["model_id"], facts["seed"]) == (toys.id, model.id, 0)


# reuse and equality


def test_an_equal_call_takes_what_is_there(toy_archive: Path, tmp_path: Path) -> None:
    notes = Notes()
    calls: list[Callable[[], Any]] = [
        lambda: stages.poison(toy_archive, "badnets", out=tmp_path / "data", progress=notes),
        lambda: defend(DatasetArtifact.open(tmp_path / "data"), "none", tmp_path / "none", progress=notes),
        lambda: stages.evaluate(tmp_path / "none", **CPU),
    ]
    for call in calls:
        first = call()
        made = first.manifest.made
        again = call()
        assert again.id == first.id
        assert again.manifest.made == made
    assert ["is there already" in line for line in notes.lines].count(True) == 2
    assert any(line.startswith("only 11 poisoned samples") for line in notes.lines)


def test_force_makes_bit_equal_files(toy_archive: Path, tmp_path: Path) -> None:
    first = stages.poison(toy_archive, "badnets", out=tmp_path / "data")
    forced = stages.poison(toy_archive, "badnets", out=tmp_path / "data", force=True)
    assert first.manifest.files == forced.manifest.files
    model = defend(first, "abl", tmp_path / "abl")
    assert hashes(model) == hashes(defend(first, "abl", tmp_path / "abl", force=True))
    result = stages.evaluate(model.path, **CPU)
    assert result.manifest.files == stages.evaluate(model.path, force=True, **CPU).manifest.files


def test_what_lost_a_file_is_made_again_by_the_same_calls_bit_equal(toy_archive: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("truth.parquet", lambda: stages.poison(toy_archive, "badnets", out=tmp_path / "data")),
        ("model.safetensors", lambda: defend(DatasetArtifact.open(tmp_path / "data"), "abl", tmp_path / "abl")),
        ("predictions.parquet", lambda: stages.evaluate(tmp_path / "abl", **CPU)),
    ]
    for lost, call in calls:
        first = call()
        before = hashes(first)
        (first.path / lost).unlink()
        with pytest.warns(DamageWarning, match=f"is made again: {lost} missing"):
            assert hashes(call()) == before


@every_attack
def test_equal_seeds_give_equal_data_sets_in_any_folder(name: str, toy_archive: Path, tmp_path: Path) -> None:
    options = {"rate": 0.1} | TOY_ATTACKS.get(name, {})
    one, other = (
        stages.poison(toy_archive, name, options=options, seed=5, out=tmp_path / folder) for folder in ("one", "other")
    )
    assert one.id == other.id
    assert one.manifest.files == other.manifest.files


@every_defense
def test_equal_seeds_give_equal_models_in_any_folder(name: str, toys: DatasetArtifact, tmp_path: Path) -> None:
    one, other = (defend(toys, name, tmp_path / folder) for folder in ("one", "other"))
    assert one.id == other.id
    assert hashes(one) == hashes(other)


@every_defense
def test_another_seed_gives_another_model(name: str, toys: DatasetArtifact, tmp_path: Path) -> None:
    one, other = (defend(toys, name, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert one.id != other.id
    is_drawn = name not in TRAINS_NOTHING
    assert (hashes(one)["model.safetensors"] != hashes(other)["model.safetensors"]) == is_drawn


def test_weights_begin_from_seed_and_purpose(toys: DatasetArtifact) -> None:
    heads = [
        networks.fresh_model("convnet", toys.train, seed, purpose).head.weight
        for seed, purpose in ((0, "model"), (0, "model"), (1, "model"), (0, "twin"))
    ]
    assert [torch.equal(heads[0], head) for head in heads] == [True, True, False, False]


def test_the_seed_of_a_defense_is_that_of_its_data_set_unless_given(toy_archive: Path, tmp_path: Path) -> None:
    data = stages.poison(toy_archive, "badnets", seed=5, out=tmp_path / "data")
    assert defend(data, "none", tmp_path / "a").manifest.ask.seed == 5
    assert defend(data, "none", tmp_path / "b", seed=6).manifest.ask.seed == 6


@every_defense
def test_an_interrupted_defense_ends_as_an_uninterrupted_one(
    name: str, toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdbench.stages.models.Engine", partial(Engine, checkpoint_seconds=0.0))
    epochs = 8 if DEFENSES.load(name).needs_trusted else 2  # of one step, on 12 images, or of 4
    whole = defend(toys, name, tmp_path / "whole", options={"epochs": epochs})

    class Fuse(Silent):
        left = 9  # an epoch has two more calls than steps, of which there are six at most

        def advance(self, amount: int, status: str = "") -> None:  # noqa: ARG002
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    interrupted = 0
    for _ in range(100):
        try:
            model = defend(toys, name, tmp_path / "resumed", options={"epochs": epochs}, progress=Fuse())
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert not (tmp_path / "resumed").exists()
    assert interrupted or name in TRAINS_NOTHING
    assert hashes(model) == hashes(whole)


# what a defense may see


def scramble(artifact: DatasetArtifact, folder: Path) -> DatasetArtifact:
    """Copy a dataset artifact with another truth, other test images, another trigger, and the same id."""
    shutil.copytree(artifact.path, folder)
    rng = np.random.default_rng(0)
    truth = pd.read_parquet(folder / "truth.parquet")
    truth["clean_label"] = rng.permutation(truth["clean_label"].to_numpy())
    truth["role"] = rng.permutation(truth["role"].to_numpy())
    truth.to_parquet(folder / "truth.parquet", index=False)
    for split in ("test", "triggered"):
        frame = pd.read_parquet(folder / f"{split}.parquet")
        frame["label"] = rng.permutation(frame["label"].to_numpy()) if split == "test" else 3
        frame.to_parquet(folder / f"{split}.parquet", index=False)
        images = load_file(folder / f"{split}.safetensors")["images"]
        save_file({"images": 255 - images}, folder / f"{split}.safetensors")
    save_file({"pattern": torch.ones(1)}, folder / "attack.safetensors")
    raw = json.loads((folder / manifests.MANIFEST).read_text())
    raw["files"] = {
        name: {"sha256": files.file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in raw["files"]
    }
    (folder / manifests.MANIFEST).write_text(json.dumps(sealed(raw)))
    return DatasetArtifact.open(folder)


@every_blind_defense
def test_a_scrambled_truth_gives_the_same_model_bit_for_bit(name: str, toys: DatasetArtifact, tmp_path: Path) -> None:
    scrambled = scramble(toys, tmp_path / "scrambled")
    scrambled.verify()
    assert scrambled.id == toys.id
    assert scrambled.train.fingerprint == toys.train.fingerprint
    assert not scrambled.truth.equals(toys.truth)
    assert hashes(defend(toys, name, tmp_path / "one")) == hashes(defend(scrambled, name, tmp_path / "other"))


@every_blind_defense
def test_a_defense_opens_neither_truth_nor_test_images(
    name: str, toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    checked_file = manifests.checked_file

    def watched(path: Path, manifest: manifests.Manifest, file: str) -> Path:
        opened.append(file)
        return checked_file(path, manifest, file)

    needs_of(name, toys, toys.path.parent, **CPU)
    monkeypatch.setattr(manifests, "checked_file", watched)
    defend(toys, name, tmp_path / "model")
    assert {"train.safetensors", "train.parquet"} <= set(opened)
    allowed = {"train.safetensors", "train.parquet"}
    if DEFENSES.load(name).needs_trusted:
        allowed |= {"trusted.safetensors", "trusted.parquet"}
    if DEFENSES.load(name).needs_suspect:
        allowed |= {"model.safetensors"}
    if DEFENSES.load(name).needs_scan:
        allowed |= {"samples.parquet"}
    assert set(opened) <= allowed


@every_blind_defense
def test_a_defense_trains_without_the_files_of_the_truth(name: str, toys: DatasetArtifact, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(toys.path, blind)
    for file in blind.iterdir():
        if file.name.startswith(("truth", "originals", "test", "triggered", "attack")):
            file.unlink()
    assert hashes(defend(DatasetArtifact.open(blind), name, tmp_path / "one")) == hashes(
        defend(toys, name, tmp_path / "other")
    )


class Mender(Defense):
    """Gives the suspect model back."""

    paper = "none"
    threat = "none"
    needs_suspect = True
    needs_trusted = True
    presets = {"tiny": {}}  # noqa: RUF012

    def run(self, task: Task) -> Defended:
        assert task.suspect is not None
        assert task.trusted is not None
        return Defended(task.suspect)


@pytest.fixture
def mender(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a method that needs an undefended model and trusted images."""
    row = type(DEFENSES.rows["none"])(f"{__name__}:Mender", "gives the suspect back")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Mender.__module__])
    monkeypatch.setitem(DEFENSES.rows, "mender", row)
    return "mender"


class Decider(Defense):
    """Takes the first six samples for poison and says no more."""

    paper = "none"
    threat = "none"
    presets = {"tiny": {}}  # noqa: RUF012

    def run(self, task: Task) -> Defended:
        return Defended(task.new_model("model"), set_aside=torch.arange(len(task.train)) < 6)


def test_a_decision_without_scores_is_kept_and_judged(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = type(DEFENSES.rows["none"])(f"{__name__}:Decider", "decides")
    monkeypatch.setitem(DEFENSES.rows, "decider", row)
    model = stages.defend(toys.path, "decider", preset="tiny", out=tmp_path / "decided", **CPU)
    assert model.samples is not None
    assert model.samples["set_aside"].tolist() == [True] * 6 + [False] * 114
    assert model.samples["score"].tolist() == [1.0] * 6 + [0.0] * 114
    table = stages.evaluate(model.path, data=toys.path, **CPU).metrics.set_index("metric")
    hits = int((toys.truth["role"][:6] == Role.POISON).sum())
    assert table.loc["detection_precision", ["numerator", "denominator"]].tolist() == [hits, 6]
    # One threshold: the mean of its true-positive rate and of the share of clean samples left alone.
    assert table.loc["auroc", "value"] == pytest.approx((hits / 12 + 1 - (6 - hits) / 108) / 2)


def test_a_method_that_trains_from_scratch_takes_no_suspect(toys: DatasetArtifact, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="method 'none' trains from scratch and takes no --suspect"):
        defend(toys, "none", tmp_path / "none", suspect=tmp_path)


def test_a_method_that_mends_a_model_asks_for_it(digits: DatasetArtifact, tmp_path: Path, mender: str) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"method 'mender' repairs a model; no undefended one of .* with seed 0 .*bdbench train.*--suspect PATH",
    ):
        stages.defend(digits.path, mender, out=tmp_path / "mended", **CPU)


@pytest.mark.parametrize("settings", [{"seed": 3}, {"model": "wrn-16-1"}, {"seed": 3, "model": "wrn-16-1"}])
def test_the_command_for_a_missing_suspect_makes_it(
    toy_archive: Path, tmp_path: Path, mender: str, settings: dict[str, Any]
) -> None:
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "a b", trusted=0.1)
    stages.defend(data.path, "none", preset="tiny", options={"epochs": 1}, **CPU)  # of another seed or network
    mend = partial(stages.defend, data.path, mender, preset="tiny", out=tmp_path / "mended", **settings, **CPU)
    with pytest.raises(ArtifactError) as said:
        mend()
    found = re.search(r"make one with: bdbench (.*) \(or give --suspect PATH\)", str(said.value))
    assert found is not None
    with pytest.raises(SystemExit) as ended:
        run([*shlex.split(found[1]), "--epochs", "1", "--device", "cpu"])
    assert not ended.value.code
    assert mend().manifest.ask.seed == settings.get("seed", 0)


def test_a_suspect_of_the_same_preset_goes_before_a_newer_one(toy_archive: Path, tmp_path: Path, mender: str) -> None:
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "data", trusted=0.1)
    made = {
        preset: stages.defend(data.path, "none", preset=preset, options={"epochs": 1}, out=tmp_path / preset, **CPU)
        for preset in ("tiny", "fast")
    }
    mended = stages.defend(data.path, mender, preset="tiny", out=tmp_path / "mended", **CPU)
    assert mended.manifest.ask.inputs["suspect"] == made["tiny"].id
    shutil.rmtree(made["tiny"].path)
    again = stages.defend(data.path, mender, preset="tiny", out=tmp_path / "again", **CPU)
    assert again.manifest.ask.inputs["suspect"] == made["fast"].id


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("none", "lr"), ("cbd", "twin_lr"), ("cbd", "lr"), ("abl", "isolation_lr"), ("abl", "lr"),
        ("abl", "unlearn_lr"), ("dbd", "ssl_lr"), ("dbd", "lr"),
    ],
)  # fmt: skip
def test_a_rate_that_is_too_high_is_named_by_its_flag(
    toys: DatasetArtifact, tmp_path: Path, name: str, option: str
) -> None:
    with pytest.raises(TrainingError, match=rf"lower --{option.replace('_', '-')} \(now 1e\+30\)$"):
        defend(toys, name, tmp_path / "model", options={option: 1e30})


def test_a_mended_model_names_the_suspect_as_its_input(toy_archive: Path, tmp_path: Path, mender: str) -> None:
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "data", trusted=0.1)
    suspect = defend(data, "none", tmp_path / "none")
    mended = stages.defend(data.path, mender, suspect=suspect.path, out=tmp_path / "mended", **CPU)
    assert mended.manifest.ask.inputs == {"dataset": data.id, "suspect": suspect.id}
    assert hashes(mended)["model.safetensors"] == hashes(suspect)["model.safetensors"]


def test_a_suspect_of_another_data_set_is_refused(
    toys: DatasetArtifact, toy_archive: Path, tmp_path: Path, mender: str
) -> None:
    suspect = defend(toys, "none", tmp_path / "none")
    data = stages.poison(toy_archive, "badnets", seed=1, out=tmp_path / "data")
    with pytest.raises(ArtifactError, match=f"was trained on dataset {toys.id}, not on {data.id}"):
        stages.defend(data.path, mender, suspect=suspect.path, out=tmp_path / "mended", **CPU)


def test_a_repair_never_replaces_its_suspect(toys: DatasetArtifact, tmp_path: Path, mender: str) -> None:
    suspect = defend(toys, "none", tmp_path / "none")
    (tmp_path / "link").symlink_to(suspect.path)
    for out in (suspect.path, tmp_path / "link"):
        with pytest.raises(OptionError, match="is the suspect itself, which a repair must not replace; choose another"):
            stages.defend(toys.path, mender, suspect=suspect.path, out=out, force=True, **CPU)
    assert ModelArtifact.open(suspect.path).id == suspect.id
    verify(suspect.path)


@pytest.mark.parametrize("fact", [{"class_names": ["a", "b"]}, {"image_shape": [1, 5000, 5000]}])
def test_a_suspect_that_was_prepared_for_other_images_is_refused(
    toys: DatasetArtifact, tmp_path: Path, mender: str, fact: dict[str, Any]
) -> None:
    """Its manifest names this dataset: a loss would index classes that it has not, or a huge image pass it."""
    suspect = defend(toys, "none", tmp_path / "none").path
    weights = load_file(suspect / "model.safetensors")
    if "class_names" in fact:
        weights |= {name: weights[name][:2].clone() for name in ("head.weight", "head.bias")}
    save_file(weights, suspect / "model.safetensors")
    raw = json.loads((suspect / manifests.MANIFEST).read_text())
    seal_again(suspect, raw | {"facts": raw["facts"] | fact})
    for method in (mender, "ft"):
        with pytest.raises(ArtifactError, match=r"takes images of \[1, .* not those of .*; give another --suspect"):
            stages.defend(toys.path, method, suspect=suspect, out=tmp_path / "mended", **CPU)


@pytest.mark.parametrize(("place", "value"), [("head.weight", math.nan), ("head.weight", math.inf), ("mean", math.nan)])
def test_a_suspect_whose_weights_are_no_numbers_is_refused(
    toys: DatasetArtifact, tmp_path: Path, mender: str, place: str, value: float
) -> None:
    suspect = defend(toys, "none", tmp_path / "none").path
    weights = load_file(suspect / "model.safetensors")
    weights[place].view(-1)[0] = value
    save_file(weights, suspect / "model.safetensors")
    seal_again(suspect, json.loads((suspect / manifests.MANIFEST).read_text()))
    for method in (mender, "clp"):
        with pytest.raises(ArtifactError, match=rf"its weights {place} are not all finite numbers; train it again"):
            stages.defend(toys.path, method, suspect=suspect, out=tmp_path / "mended", **CPU)
    assert not (tmp_path / "mended").exists()


def test_the_newest_undefended_model_of_the_same_seed_is_mended_by_default(
    toy_archive: Path, tmp_path: Path, mender: str
) -> None:
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "data", trusted=0.1)
    defend(data, "none", tmp_path / "older")
    newest = defend(data, "none", tmp_path / "newest", options={"lr": 0.01})
    defend(data, "none", tmp_path / "other-seed", seed=1)
    defend(data, "cbd", tmp_path / "defended")
    notes = Notes()
    mended = stages.defend(data.path, mender, out=tmp_path / "mended", progress=notes, **CPU)
    assert mended.manifest.ask.inputs["suspect"] == newest.id
    assert f"suspect: {newest.path}" in notes.lines


def test_a_suspect_decides_the_model(toy_archive: Path, tmp_path: Path, mender: str) -> None:
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "data", trusted=0.1)
    suspect = defend(data, "none", tmp_path / "none")
    assert stages.defend(data.path, mender, out=tmp_path / "one", **CPU).manifest.facts["model"] == "convnet"
    with pytest.raises(OptionError, match=r"is a convnet, not a wrn-16-1; drop --model"):
        stages.defend(data.path, mender, suspect=suspect.path, model="wrn-16-1", out=tmp_path / "other", **CPU)
    with pytest.raises(ArtifactError, match="no undefended wrn-16-1 of"):
        stages.defend(data.path, mender, model="wrn-16-1", out=tmp_path / "other", **CPU)


# reference rows


def test_the_oracle_trains_on_what_is_not_poisoned(toys: DatasetArtifact, tmp_path: Path) -> None:
    keep = torch.from_numpy(toys.truth["role"].to_numpy(copy=True)) != Role.POISON
    expected = NoDefense().run(task_of(toys, toys.train.take(keep))).model.state_dict()
    made = stages.defend(toys.path, "oracle", preset="tiny", options={"epochs": 1}, out=tmp_path / "one", **CPU)
    assert all(torch.equal(expected[name], value) for name, value in made.classifier().state_dict().items())


def test_the_clean_row_trains_on_the_images_before_the_attack(toy_archive: Path, tmp_path: Path) -> None:
    # the warp covers other samples too: they are given back as well
    data = stages.poison(toy_archive, "wanet", trusted=0, out=tmp_path / "data")
    source = toy_source(1, 8).train
    assert torch.equal(data.unpoisoned.images, source.images)
    assert torch.equal(data.unpoisoned.labels, source.labels)
    assert not torch.equal(data.train.images, source.images)
    expected = NoDefense().run(task_of(data, source)).model.state_dict()
    made = stages.defend(data.path, "clean", preset="tiny", options={"epochs": 1}, out=tmp_path / "one", **CPU)
    assert all(torch.equal(expected[name], value) for name, value in made.classifier().state_dict().items())


def task_of(data: DatasetArtifact, train: ImageDataset) -> Task:
    """What plain training of one epoch would get, with other images in place of those of the artifact."""
    preset, _, recipe = budget.resolve_budget("none", "tiny", {"epochs": 1}, data)
    assert preset == "tiny"
    model = partial(networks.fresh_model, "convnet", data.train, data.manifest.ask.seed)
    return Task(train, model, recipe, Engine(torch.device("cpu"), bf16=False, seed=data.manifest.ask.seed))


@pytest.mark.parametrize("name", ["oracle", "clean"])
def test_a_reference_row_without_the_truth_is_refused(name: str, toys: DatasetArtifact) -> None:
    with pytest.raises(OptionError, match="reads which samples are poisoned, and nothing here tells it"):
        DEFENSES.load(name)().run(task_of(toys, toys.train))


def test_reference_rows_are_marked_and_get_no_rating(toys: DatasetArtifact, tmp_path: Path) -> None:
    for name in ("none", "oracle", "clean", "cbd"):
        stages.evaluate(defend(toys, name, tmp_path / name).path, data=toys.path, **CPU)
    rows = {row["defense"]: row for row in results.read_rows([tmp_path])}
    assert {name: "r" in row["marks"] for name, row in rows.items()} == {
        "none": False, "oracle": True, "clean": True, "cbd": False
    }  # fmt: skip
    assert {name: row["der"] is None for name, row in rows.items()} == {
        "none": True, "oracle": True, "clean": True, "cbd": False
    }  # fmt: skip


def test_a_method_that_needs_trusted_images_says_how_to_get_them(
    toy_archive: Path, tmp_path: Path, mender: str
) -> None:
    toys = stages.poison(toy_archive, "badnets", trusted=0, out=tmp_path / "data")
    suspect = defend(toys, "none", tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"bdbench poison --attack badnets --trusted 0\.05 --out .*data-trusted"):
        stages.defend(toys.path, mender, suspect=suspect.path, out=tmp_path / "mended", **CPU)


# finding the dataset


def test_evaluate_finds_the_data_set_by_id_beside_the_model(toy_archive: Path, tmp_path: Path) -> None:
    stages.poison(toy_archive, "badnets", seed=1, out=tmp_path / "runs" / "other")
    data = stages.poison(toy_archive, "badnets", out=tmp_path / "runs" / "data")
    result = stages.evaluate(defend(data, "none", tmp_path / "runs" / "none").path, **CPU)
    assert result.manifest.ask.inputs["dataset"] == data.id
    assert result.path == tmp_path / "runs" / "none-eval"


def test_evaluate_finds_the_data_set_by_id_under_runs(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "ROOT", toys.path.parent)
    assert isinstance(stages.evaluate(defend(toys, "none", tmp_path / "none").path, **CPU), EvaluationArtifact)


def test_evaluate_asks_for_a_data_set_that_it_cannot_find(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = defend(toys, "none", tmp_path / "none")
    with pytest.raises(ArtifactError, match=f"the dataset {toys.id} of .* is neither beside it .*; give --data PATH"):
        stages.evaluate(model.path, **CPU)


def test_evaluate_refuses_another_data_set(toys: DatasetArtifact, toy_archive: Path, tmp_path: Path) -> None:
    other = stages.poison(toy_archive, "badnets", seed=1, out=tmp_path / "other")
    model = defend(toys, "none", tmp_path / "none")
    with pytest.raises(ArtifactError, match=f"is of dataset {toys.id}, but .*other is {other.id}"):
        stages.evaluate(model.path, data=other.path, **CPU)


def test_the_newest_artifact_of_a_kind_is_found(toys: DatasetArtifact, tmp_path: Path) -> None:
    found = stages.latest("dataset", toys.path.parent)
    assert found is not None
    assert found.id == toys.id
    assert stages.latest("model", tmp_path) is None


# options


@pytest.mark.parametrize("trusted", [-0.1, 1.0])
def test_a_trusted_share_is_less_than_one(toy_archive: Path, tmp_path: Path, trusted: float) -> None:
    with pytest.raises(OptionError, match=f"trusted {trusted}"):
        stages.poison(toy_archive, "badnets", trusted=trusted, out=tmp_path / "data")


def test_an_unknown_data_set_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown dataset 'digit'\. Did you mean 'digits'\?"):
        stages.poison("digit", "badnets", out=tmp_path / "data")


def test_options_of_the_recipe_and_of_the_method_are_given_together(toys: DatasetArtifact) -> None:
    _, defense, recipe = budget.resolve_budget("abl", "tiny", {"lr": 0.3, "gamma": 0.7}, toys)
    assert recipe.lr == 0.3
    assert defense.model_dump()["gamma"] == 0.7


def test_what_the_user_gives_wins_over_the_preset(toys: DatasetArtifact) -> None:
    _, _, preset = budget.resolve_budget("none", "tiny", {}, toys)
    _, _, given = budget.resolve_budget("none", "tiny", {"epochs": preset.epochs + 1}, toys)
    assert given.epochs == preset.epochs + 1


def test_a_small_set_of_tiny_images_gets_the_tiny_budget(toys: DatasetArtifact) -> None:
    assert budget.resolve_budget("none", "auto", {}, toys)[0] == "tiny"


def test_automatic_augmentation_is_the_data_sets_own(toys: DatasetArtifact, digits: DatasetArtifact) -> None:
    assert budget.resolve_budget("none", "tiny", {}, digits)[2].augment == "crop"
    assert budget.resolve_budget("none", "tiny", {"augment": "none"}, digits)[2].augment == "none"


@pytest.mark.parametrize(
    ("name", "preset", "options", "message"),
    [
        ("abll", "tiny", {}, "unknown defense 'abll'. Did you mean 'abl'?"),
        ("abl", "tinny", {}, "--preset tinny: 'abl' has the presets paper, code, fast, tiny. Did you mean 'tiny'?"),
        (
            "abl",
            "tiny",
            {"isolation_rates": 0.1},
            "unknown option 'isolation_rates'. Did you mean 'isolation_rate'?",
        ),
        ("none", "tiny", {"gamma": 0.5}, r"gamma belongs to abl \(you chose none\)"),
        ("none", "tiny", {"augment": "flop"}, "unknown augmentation 'flop'"),
    ],
)
def test_wrong_names_are_answered(
    toys: DatasetArtifact, name: str, preset: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        budget.resolve_budget(name, preset, options, toys)


class AskedError(Exception):
    """Carries what a stage asked for, before it works."""


def other_value(value: Any, annotation: Any) -> Any:
    """A valid value that differs from the default."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if value is None:
        annotation = parts[0]
    elif get_origin(annotation) is not Literal and parts and get_origin(annotation) is not tuple:
        annotation = next(part for part in parts if get_origin(part) is Literal or isinstance(value, part))
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if annotation is bool:
        return not value
    if annotation is int:
        return 1 if value is None else value + 1
    if annotation is float:
        return 0.25 if value is None else value / 2 if value else 0.25
    if annotation is str:
        return "flip" if value != "flip" else "crop"
    if get_origin(annotation) is tuple:
        kind = get_args(annotation)[0]
        return (
            tuple(kind((place + 1) / 4) for place in range(len(get_args(annotation))))
            if value is not None
            else tuple([9] * len(get_args(annotation)))
        )
    raise NotImplementedError(annotation)


def fields_of(kind: str, cls: type[Options]) -> list[tuple[str, str, Any]]:
    return [(kind, option.name, other_value(option.default, option.annotation)) for option in describe_options(cls)]


BESIDE: dict[tuple[str, str], dict[str, Any]] = {("blended", "per_image"): {"picture": "noise"}}
"""What must be set so that another option may be."""

ATTACK_FIELDS = [field for name in ATTACKS.names() for field in fields_of(name, ATTACKS.load(name))]
DEFENSE_FIELDS = [field for name in DEFENSES.names() for field in fields_of(name, DEFENSES.load(name))]


def ask_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> str:
    """The id that a stage would make."""

    def caught(path: Path, ask: manifests.Ask, **_: Any) -> bool:
        raise AskedError(ask.id)

    monkeypatch.setattr(store, "existing", caught)
    monkeypatch.setattr("bdbench.stages.datasets.choose_rows", lambda *_: None)  # some values suit no toy
    with pytest.raises(AskedError) as asked:
        call()
    return str(asked.value)


@pytest.mark.parametrize(("attack", "option", "value"), ATTACK_FIELDS)
def test_every_option_of_an_attack_is_part_of_the_id(
    attack: str, option: str, value: Any, toy_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ATTACKS.load(attack).label_modes
    if option == "labels":
        value = next((mode for mode in modes if mode != ATTACKS.load(attack)().labels), None)
    if value is None or (option == "exclude_target" and "all-to-one" not in modes):
        pytest.skip("only one value makes sense")
    value = "wrn-16-1" if option == "victim" else value
    if option in ("target", "source", "partner"):
        value += 5  # not one of the other classes
    base = {"labels": "all-to-one"} if option == "exclude_target" else BESIDE.get((attack, option), {})
    plain = ask_of(monkeypatch, lambda: stages.poison(toy_archive, attack, options=base))
    assert ask_of(monkeypatch, lambda: stages.poison(toy_archive, attack, options={**base, option: value})) != plain


@pytest.mark.parametrize(
    ("defense", "option", "value"), [*DEFENSE_FIELDS, *(field for field in fields_of("none", Recipe))]
)
def test_every_option_of_a_defense_and_its_recipe_is_part_of_the_id(
    defense: str,
    option: str,
    value: Any,
    toys: DatasetArtifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls, needs = DEFENSES.load(defense), needs_of(defense, toys, toys.path.parent, **CPU)

    def ask(**options: Any) -> str:
        out = tmp_path / "m"
        call = partial(stages.defend, toys.path, defense, preset="tiny", options=options, out=out, **needs, **CPU)
        return ask_of(monkeypatch, call)

    known = cls.presets["tiny"].get(option)
    if value == known:
        value = other_value(value, {**Recipe.model_fields, **cls.model_fields}[option].annotation)
    assert ask(**{option: value}) != ask()


@pytest.mark.parametrize("setting", [{"seed": 1}, {"trusted": 0.1}, {"attack": "blended"}])
def test_seed_trusted_share_and_attack_are_part_of_the_id(
    setting: dict[str, Any], toy_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask_of(monkeypatch, lambda: stages.poison(toy_archive))
    assert ask_of(monkeypatch, lambda: stages.poison(toy_archive, **setting)) != plain


def test_other_images_are_part_of_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    for name, count in (("one", 120), ("other", 124)):
        (tmp_path / name).mkdir()
        toy_file(tmp_path / name, train=count)
    one, other = (ask_of(monkeypatch, partial(stages.poison, tmp_path / name / "toy.npz")) for name in ("one", "other"))
    assert one != other


@pytest.mark.parametrize("setting", [{"device": "auto"}, {"precision": "bf16"}])
def test_hardware_is_not_part_of_the_id(
    setting: dict[str, Any], toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = (
        ask_of(monkeypatch, lambda: stages.defend(toys.path, "none", out=tmp_path / "m", **CPU | changed))  # noqa: B023
        for changed in ({}, setting)
    )
    assert plain == other


def names_read(*modules: Any) -> set[str]:
    """All attributes that the modules read."""
    trees = [ast.parse(inspect.getsource(module)) for module in modules]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@every_attack
def test_every_option_of_an_attack_is_read(name: str) -> None:
    cls = ATTACKS.load(name)
    modules = [inspect.getmodule(base) for base in cls.__mro__ if issubclass(base, Options) and base is not Options]
    assert set(cls.model_fields) <= names_read(poisoning, *modules)


@every_defense
def test_every_option_of_a_defense_is_read(name: str) -> None:
    cls = DEFENSES.load(name)
    modules = [inspect.getmodule(base) for base in cls.__mro__ if issubclass(base, Options) and base is not Options]
    assert set(cls.model_fields) <= names_read(*modules)


def test_every_option_of_a_recipe_is_read() -> None:
    from bdbench.training import loop, recipe

    assert set(Recipe.model_fields) <= names_read(loop, recipe)


@every_defense
def test_no_option_of_a_defense_hides_one_of_the_recipe_or_the_stage(name: str) -> None:
    stage = {
        "model",
        "preset",
        "dataset",
        "suspect",
        "seed",
        "out",
        "device",
        "precision",
        "force",
        "config",
        "json",
    }
    assert not set(DEFENSES.load(name).model_fields) & {*Recipe.model_fields, *stage}


@every_attack
def test_no_option_of_an_attack_hides_one_of_the_stage(name: str) -> None:
    stage = {
        "dataset",
        "attack",
        "trusted",
        "seed",
        "out",
        "force",
        "config",
        "json",
        "data_root",
        "download",
    }
    assert not set(ATTACKS.load(name).model_fields) & {*stage, "image_size", "test_fraction"}


@every_defense
def test_a_defense_says_what_it_is(name: str) -> None:
    cls = DEFENSES.load(name)
    help_text = inspect.getdoc(cls) or ""
    assert cls.threat
    assert cls.paper == "none" or (cls.paper.startswith("https://") and cls.paper in help_text)
    assert len(help_text) > 40
    assert all(option.description for option in describe_options(cls))


@every_defense
@pytest.mark.parametrize("preset", ["paper", "fast", "tiny"])
def test_every_defense_has_every_budget(name: str, preset: str, toys: DatasetArtifact) -> None:
    chosen, defense, recipe = budget.resolve_budget(name, preset, {}, toys)
    assert chosen == preset
    assert isinstance(defense, DEFENSES.load(name))
    assert recipe.epochs >= 1


@every_defense
def test_every_flag_that_the_help_of_a_defense_names_exists(name: str) -> None:
    cls = DEFENSES.load(name)
    flags = {info.flag for options in (cls, Recipe) for info in describe_options(options)}
    known = (
        flags | {flag.replace("--", "--no-", 1) for flag in flags} | {"--preset", "--augment", "--without", "--method"}
    )
    assert set(re.findall(r"--[a-z][a-z-]+", cls.__doc__ or "")) <= known


PAPER: dict[str, dict[str, Any]] = {
    "none": {
        "epochs": 100, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4,
        "schedule": "step", "warmup": 0,
    },
    "cbd": {
        "twin_epochs": 5, "twin_step_limit": 0, "twin_lr": 0.1, "twin_schedule": "constant", "twin_augment": "auto",
        "twin_judges": "batch", "epochs": 100, "batch_size": 64, "lr": 0.1, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-4, "schedule": "step", "information_weight": 0.01, "bottleneck": 1e-4, "reweight": True,
        "critic_dropout": 0.2,
    },
    "abl": {
        "isolation_epochs": 20, "isolation_rate": 0.01, "isolation_lr": 0.1, "isolation_augment": "none", "gamma": 0.5,
        "trap": "batch", "batch_size": 64, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "finetune": False,
        "objective": "joint", "unlearn_batch_size": 64, "unlearn_epochs": 80, "unlearn_lr": 5e-4,
        "unlearn_weight_decay": 1e-4, "unlearn_stop": 1000, "unlearn_step_limit": 0, "isolate_by": "last",
    },
    "dbd": {
        "ssl_epochs": 100, "ssl_batch_size": 512, "ssl_lr": 0.4, "ssl_weight_decay": 1e-4, "ssl_warmup": 0,
        "temperature": 0.5, "symmetric": True, "head_epochs": 10, "head_batch_size": 128, "sce_alpha": 0.1,
        "sce_beta": 1, "credible_rate": 0.5, "split_by": "all", "split_augmented": False, "steps_per_epoch": 1024,
        "sharpening": 0.5, "mixup": 0.75, "unlabelled_weight": 15, "epochs": 190, "batch_size": 64, "lr": 0.002,
        "schedule": "constant", "weight_decay": 0,
    },
    "mcldef": {
        "form": "pixel", "oracle_target": None, "inversion_epochs": 100, "inversion_batch_size": 64,
        "inversion_augment": "none", "purify_augment": "auto", "tau": 0.5, "clean_weight": 0, "clean_norms": False,
        "epochs": 20, "batch_size": 64, "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
        "schedule": "step",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_preset_has_the_papers_constants(name: str, toys: DatasetArtifact) -> None:
    _, defense, recipe = budget.resolve_budget(name, "paper", {}, toys)
    found = {**recipe.model_dump(), **defense.model_dump()}
    assert {option: found[option] for option in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize(("name", "epochs", "rates"), [
    ("none", (0, 19, 20, 69, 70, 99), (0.1, 0.1, 0.01, 0.01, 0.001, 0.001)),
    ("cbd", (0, 19, 20, 69, 70, 99), (0.1, 0.1, 0.01, 0.01, 0.001, 0.001)),
    ("abl", (0, 39, 40, 59), (0.1, 0.1, 0.01, 0.01)),  # of its code: the paper's form does not fine-tune
    ("mcldef", (0, 1, 9, 10, 19), (0.1, 0.01, 0.01, 0.001, 0.001)),
])  # fmt: skip
def test_the_paper_preset_has_the_papers_learning_rates(
    name: str, epochs: tuple[int, ...], rates: tuple[float, ...], toys: DatasetArtifact
) -> None:
    _, _, recipe = budget.resolve_budget(name, "code" if name == "abl" else "paper", {}, toys)
    assert [recipe.lr_at(epoch) for epoch in epochs] == pytest.approx(rates)


def test_a_model_says_which_options_are_not_its_presets(toys: DatasetArtifact, tmp_path: Path) -> None:
    """Else a run of one epoch under the name of the paper's preset would read as the paper's."""
    options = {"epochs": 1, "lr": 0.05, "momentum": 0.5}  # the second one is what `tiny` has
    model = stages.defend(toys.path, "none", preset="tiny", options=options, out=tmp_path / "none", **CPU)
    assert model.manifest.facts["changed"] == ["epochs", "momentum"]
    (row,) = results.mark_rows([results.evaluation_row(stages.evaluate(model.path, data=toys.path))])
    assert row["changed"] == ["epochs", "momentum"]
    assert "c" in row["marks"]


def test_a_model_of_a_preset_as_it_is_has_nothing_changed(toys: DatasetArtifact, tmp_path: Path) -> None:
    model = stages.defend(toys.path, "none", preset="tiny", out=tmp_path / "none", **CPU)
    assert model.manifest.facts["changed"] == []


def test_a_model_says_whether_it_was_compiled(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"preset": "tiny", "options": {"epochs": 1}, **CPU}
    plain = stages.defend(toys.path, "none", out=tmp_path / "plain", **told)
    toy_compiler(monkeypatch)
    compiled = stages.defend(toys.path, "none", out=tmp_path / "compiled", compile=True, **told)
    toy_compiler(monkeypatch, cannot_compile())
    refused = stages.defend(toys.path, "none", out=tmp_path / "refused", compile=True, **told)
    assert [model.manifest.made["compiled"] for model in (plain, compiled, refused)] == [False, True, False]


def test_seconds_count_the_epochs_before_an_interruption(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = defend(toys, "none", tmp_path / "none", options={"epochs": 1})
    for counted in (0.25, 1e6):
        monkeypatch.setitem(model.manifest.made, "training_seconds", counted)
        facts = judging.row_facts(model, toys)
        assert facts["seconds"] == max(model.manifest.made["seconds"], counted)


def test_a_defense_that_scores_other_samples_is_a_mistake_of_ours(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = DEFENSES.load("none").run
    monkeypatch.setattr(
        DEFENSES.load("none"), "run", lambda self, task: run(self, task)._replace(scores=torch.zeros(3))
    )
    with pytest.raises(MethodError, match=r"returned scores of shape \(3,\) for 120 samples"):
        defend(toys, "none", tmp_path / "none")


def test_channel_statistics_by_hand() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    mean, std = networks.channel_statistics(images)
    assert mean.tolist() == [0.5]
    # 128 values, half of them 0.5 from the mean: sqrt(32 / 127)
    assert std.tolist() == pytest.approx([0.50197], abs=1e-4)


def test_images_of_one_colour_have_a_deviation_that_can_be_divided_by() -> None:
    assert networks.channel_statistics(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))[1].tolist() == pytest.approx(
        [1e-3] * 3
    )


def test_seconds_are_estimated_by_phase(toys: DatasetArtifact) -> None:
    usual = stages.estimate_seconds(toys.path, "cbd", options={"epochs": 1000, "twin_epochs": 1})
    assert usual["clean"] > 20 * usual["twin"] > 0
    assert "invert" in stages.estimate_seconds(toys.path, "mcldef")


def test_a_training_records_the_threads_that_its_work_was_worth(
    toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small = stages.defend(toys.path, "none", options={"epochs": 1}, out=tmp_path / "small")
        monkeypatch.setattr("bdbench.training.devices.SMALL_WORK", 0)
        large = stages.defend(toys.path, "none", options={"epochs": 1}, out=tmp_path / "large")
    finally:
        torch.set_num_threads(before)
    assert [made.manifest.made["threads"] for made in (small, large)] == [1, 2]


class Told(Silent):
    """A progress that keeps what it is told of."""

    def __init__(self) -> None:
        self.bars: dict[str, list[int]] = {}

    def start(self, label: str, total: int, unit: str = "images") -> None:  # noqa: ARG002
        self.bars[label] = self.now = [0, total]

    def advance(self, amount: int, status: str = "") -> None:  # noqa: ARG002
        self.now[0] += amount


def test_an_evaluation_says_how_far_it_is(toys: DatasetArtifact, tmp_path: Path) -> None:
    made = stages.defend(toys.path, "none", options={"epochs": 1}, out=tmp_path / "none")
    told = Told()
    stages.evaluate(made.path, data=toys.path, progress=told)
    counts = toys.manifest.facts["counts"]
    assert told.bars == {name: [counts[name], counts[name]] for name in ("test", "triggered")}
