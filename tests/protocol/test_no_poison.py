"""No poison: nothing is triggered, trusted images are reserved, and a defense is judged by BA and false alarms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import toy_file

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.errors import OptionError
from bdbench.protocol.metrics import Rate, false_alarms, set_aside_rates
from bdbench.reports import commands, page, results, tables
from bdbench.reports.matrices import cells_of, matrices_of
from bdbench.reports.pictures import contact_sheet
from bdbench.reports.ranking import rank

SHORT = {"epochs": 1}
ABL = {"isolation_epochs": 1, "isolation_rate": 0.05, "unlearn_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("none")


@pytest.fixture(scope="module")
def clean(folder: Path) -> DatasetArtifact:
    return stages.poison(toy_file(folder), "none", trusted=0.1, out=folder / "d")


@pytest.fixture(scope="module")
def rows(folder: Path, clean: DatasetArtifact) -> list[dict[str, object]]:
    """Rows of plain training and ABL without poison, and of the same under badnets at a rate of 0."""
    idle = stages.poison(toy_file(folder), "badnets", options={"rate": 0}, trusted=0.1, out=folder / "z")
    for data in (clean, idle):
        for method, options in (("none", {}), ("abl", ABL)):
            stages.evaluate(stages.defend(data.path, method, preset="tiny", options={**SHORT, **options}).path)
    return results.read_rows([folder])


def of(rows: list[dict[str, object]], attack: str, defense: str) -> dict[str, object]:
    (found,) = (row for row in rows if (row["attack"], row["defense"]) == (attack, defense))
    return found


def test_nothing_is_triggered_and_the_trusted_images_are_those_of_an_attack(
    folder: Path, clean: DatasetArtifact, tmp_path: Path
) -> None:
    attacked = stages.poison(toy_file(folder), "badnets", trusted=0.1, out=tmp_path / "b")
    assert clean.manifest.facts["counts"] == {"train": 108, "test": 40, "triggered": 0, "trusted": 12}
    assert clean.trusted is not None
    assert attacked.trusted is not None
    assert clean.trusted.fingerprint == attacked.trusted.fingerprint
    assert clean.train.fingerprint == attacked.unpoisoned.fingerprint
    assert not clean.is_poison.any()
    assert (clean.is_attacked, clean.is_taken) == (False, False)
    verify(clean.path)


def test_a_dataset_as_found_is_another_thing(folder: Path, clean: DatasetArtifact, tmp_path: Path) -> None:
    taken = stages.take(toy_file(folder), out=tmp_path / "t")
    assert (taken.is_attacked, taken.is_taken) == (False, True)
    assert taken.id != clean.id
    none = stages.poison(toy_file(folder), "none", trusted=0, out=tmp_path / "n")
    assert (none.is_taken, none.trusted) == (False, None)


def test_ba_is_measured_and_asr_is_blank(rows: list[dict[str, object]]) -> None:
    row = of(rows, "none", "none")
    assert row["ba"] is not None
    assert row["ba_n"] == 40
    assert [row[name] for name in ("asr", "floor", "ra", "der", "auroc", "detection_recall")] == [None] * 6
    assert row["attack_failed"] is None
    assert row["marks"] == "0bc"


def test_what_a_defense_sets_aside_are_false_alarms(rows: list[dict[str, object]]) -> None:
    row = of(rows, "none", "abl")
    assert row["false_alarms_n"] == 108
    # 5 % of 108 samples, all of them clean
    assert row["false_alarms"] == 5 / 108
    assert of(rows, "none", "none")["false_alarms"] is None


def test_false_alarms_are_counted_over_what_is_not_poison() -> None:
    aside, poison = (torch.tensor(list(map(bool, values))) for values in ([1, 1, 0, 1, 0], [1, 0, 0, 0, 1]))
    assert false_alarms(aside, poison) == Rate(2, 3)
    assert set_aside_rates(aside, poison)["false_alarms"] == Rate(2, 3)


def test_a_rate_of_0_is_no_failed_attack(rows: list[dict[str, object]]) -> None:
    row = of(rows, "badnets", "abl")
    assert row["asr"] is not None
    assert (row["der"], row["attack_failed"]) == (None, None)
    assert set(str(row["marks"])) >= {"0"}
    assert not {"w", "?", "n"} & set(str(row["marks"]))


@pytest.mark.parametrize("style", ["markdown", "latex", "csv", "json"])
def test_tables_have_a_row_without_poison(rows: list[dict[str, object]], style: tables.Format) -> None:
    text = tables.render(rows, style)
    assert isinstance(text, str)
    assert ("no poison" in text) == (style in ("markdown", "latex"))
    if style == "markdown":
        assert "0: nothing was poisoned, on purpose" in text
        assert "failed" not in text
    if style == "json":
        assert [row["asr"] for row in json.loads(text)["rows"] if row["attack"] == "none"] == [None, None]


def test_the_references_run_where_nothing_is_poisoned(clean: DatasetArtifact) -> None:
    for method in ("oracle", "clean"):
        model = stages.defend(clean.path, method, preset="tiny", options=SHORT)
        assert model.manifest.facts["reads_truth"]


def test_a_report_shows_it_and_averages_without_it(rows: list[dict[str, object]], folder: Path) -> None:
    (matrix,) = matrices_of(cells_of(rows))
    assert "no poison" in matrix.attacks
    (summary,) = (summary for summary in matrix.summaries if summary.defense == "abl")
    assert (summary.counted, summary.left_out) == (0, {"without poison": 2})
    page.write_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "nothing poisoned" in text
    assert "attack failed</span>" not in text


def test_ranks_by_ba_take_it_in_and_ranks_by_asr_do_not(rows: list[dict[str, object]]) -> None:
    merged = results.merge(rows)
    assert rank(merged, "ba").blocks == 2
    assert rank(merged, "asr").blocks == rank(merged, "der").blocks == 0
    assert rank(merged, "der").failed == ()


def test_it_is_drawn_and_made_again_by_its_command(clean: DatasetArtifact, tmp_path: Path) -> None:
    contact_sheet(clean, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert commands.poison_command(clean).endswith("--attack none --trusted 0.1 --out again/d")


# trusted images per class


def test_so_many_trusted_images_of_every_class(folder: Path, tmp_path: Path) -> None:
    for attack in ("none", "badnets"):
        data = stages.poison(toy_file(folder), attack, trusted_per_class=3, out=tmp_path / attack)
        assert data.trusted is not None
        assert data.trusted.labels.bincount().tolist() == [3, 3, 3, 3]
        assert len(data.train) == 108
        assert "--trusted-per-class 3" in commands.poison_command(data)
        assert "--trusted " not in commands.poison_command(data)


def test_they_are_another_dataset_for_another_seed(folder: Path, tmp_path: Path) -> None:
    one, other = (
        stages.poison(toy_file(folder), "none", trusted_per_class=3, seed=seed, out=tmp_path / str(seed))
        for seed in (0, 1)
    )
    assert one.trusted is not None
    assert other.trusted is not None
    assert one.trusted.fingerprint != other.trusted.fingerprint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trusted": 0.1, "trusted_per_class": 3}, "give one of the two"),
        ({"trusted_per_class": 0}, "must be at least 1"),
        ({"trusted_per_class": 1000}, r"trusted_per_class 1000 leaves none of the \d+ training images of class"),
    ],
)
def test_trusted_images_that_cannot_be_are_refused(
    folder: Path, tmp_path: Path, given: dict[str, float], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        stages.poison(toy_file(folder), "badnets", out=tmp_path / "d", **given)  # type: ignore[arg-type]
