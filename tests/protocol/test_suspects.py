"""Data as they are found: nothing is added, nothing is claimed, and every suspect is named by its own file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bdbench import stages
from bdbench.artifacts import manifests
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.cli.app import run
from bdbench.cli.live import LineProgress
from bdbench.errors import ArtifactError, OptionError
from bdbench.protocol import planting, suspects
from bdbench.reports import commands, results, tables
from bdbench.reports.page import write_report

CPU = {"device": "cpu", "precision": "fp32"}
FEW = {"epochs": 1, "isolation_epochs": 1, "unlearn_steps": 1, "batch_size": 16}
SCORES = [0.5, 0.9, 0.1, 0.9, 0.7, 0.2]
LABELS = [0, 1, 1, 0, 1, 1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))


def write_photos(folder: Path, splits: dict[str, int]) -> Path:
    """Images whose first pixel is their number in the folder, by class; `splits` has how many a class each."""
    number = 0
    for split, each in splits.items():
        for name in ("ant", "bee", "cat"):
            (folder / split / name).mkdir(parents=True)
            for place in range(each):
                pixels = np.full((8, 8), 100, np.uint8)
                pixels[0, 0] = number
                Image.fromarray(pixels).save(folder / split / name / f"{number:03}-{place}.png")
                number += 1
    return folder


def called(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(word) for word in words])
    return int(ended.value.code or 0)


# taking


def test_names_with_brackets_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal's markup has brackets too: `[red]` would vanish, `[/x]` end in a traceback."""
    monkeypatch.setenv("COLUMNS", "200")
    photos = write_photos(tmp_path / "photos", {"train": 6, "test": 2})
    for split in ("train", "test"):
        (photos / split / "bee").rename(photos / split / "[red]")
    out = tmp_path / "[red][" / "x]"
    out.parent.mkdir()
    assert called("take", photos, "--out", out) == 0
    few = ("--epochs", 1, "--isolation-epochs", 1, "--unlearn-steps", 1, "--isolation-rate", 0.2)
    model = out.with_name("x]-abl")
    assert called("defend", out, "--method", "abl", *few, "--out", model) == 0
    for words in (
        ("inspect", out), ("suspects", model, "--top", 18, "--csv", tmp_path / "[red].csv"), ("evaluate", model),
        ("verify", out, model), ("inspect", model),
    ):  # fmt: skip
        assert called(*words) == 0
    said = capsys.readouterr()
    assert "1 [red]" in said.out or "0 [red]" in said.out
    assert said.err.count(str(out)) >= 6
    assert str(tmp_path / "[red].csv") in said.err


def test_what_is_taken_is_the_source_as_it_is(toy_archive: Path, tmp_path: Path) -> None:
    attacked = stages.poison(toy_archive, "badnets", trusted=0.0, out=tmp_path / "attacked")
    taken = stages.take(toy_archive, out=tmp_path / "taken")
    assert taken.train.fingerprint == attacked.unpoisoned.fingerprint
    assert taken.test.fingerprint == attacked.test.fingerprint
    assert not taken.is_attacked
    assert attacked.is_attacked
    assert taken.trusted is None
    assert len(taken.triggered) == 0
    assert taken.places[:2] == ["row 0", "row 1"]
    taken.verify()


@pytest.mark.parametrize("splits", [{"": 20}, {"train": 15, "test": 5}])
@pytest.mark.parametrize("images", [None, 30])
def test_every_image_is_named_by_its_own_file(splits: dict[str, int], images: int | None, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", splits)
    options = {} if images is None else {"images": images}
    taken = stages.take(photos, source_options={**options, "test_fraction": 0.25}, out=tmp_path / "taken")
    assert len(taken.places) == len(taken.train) == (images or 45)
    for place, pixels, label in zip(taken.places, taken.train.images, taken.train.labels, strict=True):
        assert int(Path(place).name[:3]) == int(pixels[0, 0, 0])
        assert Path(place).parent.name == taken.class_names[int(label)]
        assert (photos / place).is_file()


def test_a_file_that_is_named_otherwise_makes_another_artifact(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", {"": 4})
    taken = stages.take(photos, out=tmp_path / "taken")
    assert stages.take(photos, out=tmp_path / "taken").id == taken.id
    (photos / "ant" / "000-0.png").rename(photos / "ant" / "000-renamed.png")
    with pytest.raises(ArtifactError, match="is another dataset"):
        stages.take(photos, out=tmp_path / "taken")
    assert stages.take(photos, out=tmp_path / "taken", force=True).id != taken.id


def test_an_artifact_is_no_source(toys: DatasetArtifact) -> None:
    with pytest.raises(OptionError, match=r"is an artifact already; go on with: bdbench defend .* --method abl"):
        stages.take(toys.path)


# what is not known is not claimed


@pytest.mark.parametrize("method", ["oracle", "clean"])
def test_reference_rows_are_refused(method: str, toy_archive: Path, tmp_path: Path) -> None:
    taken = stages.take(toy_archive, out=tmp_path / "taken")
    with pytest.raises(OptionError, match=f"'{method}' reads which samples are poisoned, and of .*nobody knows it"):
        stages.defend(taken.path, method, **CPU)
    assert not (tmp_path / f"taken-{method}").exists()


def test_a_method_that_needs_trusted_images_is_refused_before_anything_else(toy_archive: Path, tmp_path: Path) -> None:
    taken = stages.take(toy_archive, out=tmp_path / "taken")
    with pytest.raises(ArtifactError, match="store it again with: bdbench take --trusted IMAGES"):
        stages.defend(taken.path, "mcldef", **CPU)


def test_only_benign_accuracy_is_measured(
    toy_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = stages.take(toy_archive, out=tmp_path / "runs" / "taken")
    rows = []
    for method, options in (("none", {"epochs": 1}), ("abl", FEW)):
        model = stages.defend(taken.path, method, options=options, **CPU)
        judged = stages.evaluate(model.path, **CPU)
        assert judged.metrics["metric"].tolist() == ["ba"]
        assert set(judged.predictions["split"]) == {"test"}
        rows.append(results.evaluation_row(judged))
    assert [row["marks"] for row in results.mark_rows(rows)] == ["nbc", "nbc"]
    assert [(row["der"], row["attack_failed"], row["auroc"]) for row in results.mark_rows(rows)] == [
        (None, None, None)
    ] * 2
    shown = str(tables.render(results.mark_rows(rows), "markdown"))
    assert "ASR |" not in shown
    assert "no trigger is known" in shown
    assert called("table", tmp_path / "runs", "--assert", "asr<=0.5") == 3
    assert called("table", tmp_path / "runs", "--ranks", "ba") == 0
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    assert "attack unproven" in (tmp_path / "page.html").read_text()
    assert called("inspect", taken.path, "--image", tmp_path / "sheet.png") == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    said = capsys.readouterr()
    assert "as it was found" in said.out
    assert "- augmentation in training: crop, nothing mirrored" in said.out


@pytest.mark.parametrize("options", [{"images": 30, "test_fraction": 0.25}, {"images": 30, "test_fraction": 0.2}])
def test_the_report_names_the_command_that_takes_it_again(options: dict[str, Any], tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", {"": 20})
    said = commands.poison_command(stages.take(photos, source_options=options, out=tmp_path / "taken"))
    share = options["test_fraction"]
    assert said == f"bdbench take {photos} --images 30 --test-fraction {share} --out again/taken"


# ranking


def scored() -> tuple[ModelArtifact, DatasetArtifact]:
    samples = pd.DataFrame({"row": range(6), "score": SCORES, "set_aside": [score > 0.8 for score in SCORES]})
    model = SimpleNamespace(samples_of=lambda _: samples)
    data = SimpleNamespace(
        train_labels=torch.tensor(LABELS), places=[f"{row}.png" for row in range(6)], class_names=("ant", "bee"),
        manifest=SimpleNamespace(facts={"counts": {"train": 6}}),
    )  # fmt: skip
    return cast("ModelArtifact", model), cast("DatasetArtifact", data)


def test_the_most_suspect_come_first() -> None:
    ranked = suspects.rank(*scored())
    assert set(ranked["row"][:2]) == {1, 3}
    assert ranked["row"].tolist()[2:] == [4, 0, 5, 2]
    assert ranked["place"].tolist() == [f"{row}.png" for row in ranked["row"]]
    assert ranked["class"].tolist() == [("ant", "bee")[LABELS[row]] for row in ranked["row"]]
    assert ranked["set_aside"].tolist() == [True, True, False, False, False, False]
    assert ranked.equals(suspects.rank(*scored()))


def test_equal_scores_favour_no_class_of_a_dataset_in_order_of_its_classes() -> None:
    samples = pd.DataFrame({"row": range(1000), "score": 1.0, "set_aside": False})
    labels = torch.arange(10).repeat_interleave(100)
    data = SimpleNamespace(
        train_labels=labels, places=[str(row) for row in range(1000)], class_names=tuple("abcdefghij"),
        manifest=SimpleNamespace(facts={"counts": {"train": 1000}}),
    )  # fmt: skip
    model = SimpleNamespace(samples_of=lambda _: samples)
    ranked = suspects.rank(cast("ModelArtifact", model), cast("DatasetArtifact", data))
    first = ranked["label"][:200].value_counts()
    # 20 of each, sd 4
    assert len(first) == 10
    assert first.between(8, 32).all()


@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, [("ant", 2, 1, 0.5), ("bee", 4, 1, 0.25)]), (4, [("ant", 2, 2, 1.0), ("bee", 4, 2, 0.5)])],
)
def test_suspects_are_counted_by_the_class_they_are_labelled_as(count: int, expected: list[Any]) -> None:
    counted = suspects.by_class(suspects.rank(*scored()), count)
    assert list(counted[["class", "images", "suspects", "share"]].itertuples(index=False, name=None)) == expected


def test_a_self_test_counts_what_was_planted_among_the_most_suspect() -> None:
    ranked = suspects.rank(*scored())  # rows 1 and 3, then 4, 0, 5, 2
    tested = planting.judge(ranked, torch.tensor([False, True, False, False, True, False]), "bee", count=3)
    assert (tested.planted, tested.images, tested.precision) == (2, 6, 0.5)
    assert tested.auroc == pytest.approx(6.5 / 8)  # row 1 ties with row 3; row 4 is before rows 0, 5 and 2
    assert (tested.others, tested.others_class, tested.others_count) == (3, "ant", 2)  # rows 3, 0, 5


@pytest.mark.parametrize(
    ("precision", "auroc", "verdict"),
    [(0.5, 0.6, "found"), (0.49, 0.9, "ranked high"), (0.0, 0.89, "not found")],
)
def test_a_self_test_says_whether_the_patch_was_found(precision: float, auroc: float, verdict: str) -> None:
    assert planting.SelfTest(10, 100, "bee", precision, auroc, 1, "ant", 1).verdict == verdict


def test_the_patch_of_a_self_test_is_at_the_stated_rate_on_images_of_other_classes(toys: DatasetArtifact) -> None:
    patch = planting.planted_patch(toys, 0.1, seed=3)
    assert (patch.rate, patch.exclude_target) == (0.1, True)
    assert patch.target == planting.planted_patch(toys, 0.1, seed=3).target
    targets = {planting.planted_patch(toys, 0.1, seed).target for seed in range(30)}
    assert targets == set(range(4))
    with pytest.raises(OptionError, match=r"self-test rate 0\.0 must be more than 0 and less than 1"):
        planting.planted_patch(toys, 0.0, seed=3)


@pytest.mark.parametrize("method", ["mcldef", "oracle"])
def test_a_method_that_needs_more_than_images_has_no_self_test(method: str) -> None:
    with pytest.raises(OptionError, match=f"'{method}' needs more than the training images"):
        planting.check_method(method)


def test_the_walk_from_a_folder_to_a_list_of_suspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), {"": 20})
    assert called("suspects") == 1
    assert "then bdbench scan" in capsys.readouterr().err
    assert called("take", "photos", "--json") == 0
    taken = json.loads(capsys.readouterr().out)
    assert taken["counts"] == {"train": 57, "test": 3, "triggered": 0, "trusted": 0}
    assert stages.take("photos", out=tmp_path / "from-python").id == taken["id"]
    assert called("train", "--epochs", "1") == 0
    assert called("suspects", "runs/photos-none-epochs1") == 1
    assert "which scores no samples; a defense such as abl does" in capsys.readouterr().err
    few = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert called("defend", "--method", "abl", *few) == 0
    capsys.readouterr()
    assert called("suspects", "--top", "4", "--share", "0.1", "--csv", "all.csv", "--image", "sheet.png") == 0
    shown = capsys.readouterr()
    assert "the 6 of 57 training images that abl suspects most" in shown.out
    ranked = pd.read_csv("all.csv")
    assert len(ranked) == 57
    assert all(place in shown.out for place in ranked["place"][:4])
    assert ranked["place"][4] not in shown.out
    assert Path("sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert called("suspects", "--json", "--share", "0.1") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counted"] == sum(item["suspects"] for item in facts["classes"]) == 6
    assert [item["place"] for item in facts["suspects"]] == ranked["place"][:10].tolist()
    assert "a clean one too" in facts["caveat"]
    assert "self_test" not in facts
    begun: list[str] = []
    begin = LineProgress.start
    monkeypatch.setattr(
        LineProgress, "start", lambda bar, label, total, *_: (begun.append(label), begin(bar, label, total))
    )
    made = [called("suspects", "--self-test", "--self-test-rate", "0.1", *more) for more in ((), ("--json",))]
    assert made == [0, 0]
    shown = capsys.readouterr()
    assert shown.out.count("A defense ranks every dataset, a clean one too.") == 2
    assert "self-test: a patch on 6 of 57 images, labelled " in shown.out
    assert begun.count("isolate") == 1  # the second call takes what the first one made
    tested = json.loads(shown.out[shown.out.index("{") :])["self_test"]
    assert (tested["planted"], tested["images"], tested["others"]) == (6, 57, 1)
    assert stages.latest("dataset").path == Path("runs/photos")  # the copy is nobody's newest
    assert len(list(Path("runs/.selftest").iterdir())) == 2
    assert called("suspects", "--csv", "runs/photos/manifest.json/all.csv") == 2
    assert called("suspects", "--image", "sheet.nothing") == 1
    Path("runs/photos/places.parquet").write_bytes(b"damaged")
    assert called("suspects") == 1
    assert "places.parquet" in capsys.readouterr().err


def test_the_truth_plays_no_part(toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stages.defend(toys.path, "abl", options=FEW, out=tmp_path / "abl", **CPU)
    opened: list[str] = []
    checked = manifests.checked_file
    monkeypatch.setattr(manifests, "checked_file", lambda *where: opened.append(where[-1]) or checked(*where))
    ranked = suspects.rank(model, toys)
    assert sorted(ranked["row"]) == list(range(120))
    assert ranked["score"].is_monotonic_decreasing
    assert opened == ["samples.parquet", "train.parquet"]


def test_images_that_somebody_vouches_for_calibrate_a_scan_and_are_repaired_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), {"": 20})
    write_photos(Path("vouched"), {"": 6})
    taken = stages.take(Path("photos"), trusted=Path("vouched"))
    assert taken.is_taken
    assert taken.trusted is not None
    counts = taken.manifest.facts["counts"]
    assert counts["trusted"] == len(taken.trusted) == 6 * len(taken.class_names)
    assert taken.id != stages.take(Path("photos"), out=tmp_path / "alone").id
    budget: dict[str, Any] = {"preset": "tiny", "options": {"epochs": 1}, **CPU}
    suspect = stages.defend(taken.path, "none", **budget)
    assert stages.defend(taken.path, "ft", suspect=suspect.path, **budget).manifest.facts["findings"] == {}
    assert stages.scan(taken.path, "spectral", suspect=suspect.path, **CPU).null is not None


def test_vouched_images_of_other_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), {"": 20})
    write_photos(Path("vouched"), {"": 6})
    next(path for path in sorted(Path("vouched").iterdir()) if path.is_dir()).rename(Path("vouched") / "stranger")
    with pytest.raises(OptionError, match="class stranger, which the dataset has not"):
        stages.take(Path("photos"), trusted=Path("vouched"))
