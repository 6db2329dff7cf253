"""benchmarks/reproduce.py: its suites fit the registry, rows of other machines survive, numbers meet their like."""

from __future__ import annotations

import json
import shutil
import tarfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import pages
import pytest
import reproduce

from bdbench import stages
from bdbench.artifacts.made import plain
from bdbench.attacks.badnets import BadNets
from bdbench.attacks.base import TrainingAttack
from bdbench.cli.quickstart import METHODS
from bdbench.defenses.training.cbd import CBD
from bdbench.errors import OptionError, TrainingError
from bdbench.protocol import budget
from bdbench.protocol.metric_list import RATES, SCORES
from bdbench.registry import ATTACKS, DATASETS, DEFENSES, MODELS, repairs
from bdbench.reports import results, tables
from bdbench.sweeps import checking, grid, sweep
from bdbench.training.recipe import Recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SUITES: dict[str, list[Any]] = reproduce.suites()
CELLS = [cell for cells in SUITES.values() for cell in cells]
ENTRIES: list[dict[str, Any]] = compare.reported()

every_suite = pytest.mark.parametrize("suite", SUITES)
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['attack']}-{entry['defense']}")


def resolved(cell: Any) -> dict[str, Any]:
    """All options of a cell, the preset's and the defaults included."""
    cls = DEFENSES.load(cell.method)
    recipe, method = budget.split_options({**cls.presets[cell.preset], **cell.options}, cls)
    return {**Recipe.parse(recipe).model_dump(), **cls.parse(method).model_dump()}


def row(defense: str = "none", ba: float = 0.9, asr: float = 1.0, **other: Any) -> dict[str, Any]:
    """A row as `reproduce.run` gives it."""
    full: dict[str, Any] = {
        "dataset": "cifar10", "dataset_id": "d0", "model": "wrn-16-1", "model_id": f"m-{defense}",
        "evaluation_id": f"e-{defense}", "attack": "badnets", "attack_options": {"rate": 0.1, "target": 0},
        "defense": defense, "defense_options": {"epochs": 12}, "preset": "fast", "seed": 0, "seconds": 10.0,
        "peak_memory_bytes": 1, "findings": {}, "variant": "", "made": {"at": "now"}, "processor": "here", "cores": 2,
        "command": "python",
    }  # fmt: skip
    for name in RATES:
        full |= {name: None, f"{name}_n": 100, f"{name}_low": None, f"{name}_high": None}
    full |= dict.fromkeys(SCORES)
    return {**full, "ba": ba, "asr": asr, "floor": 0.02, "ba_non_target": ba, **other}


def row_of(cell: Any, **other: Any) -> dict[str, Any]:
    """The row that a cell would give."""
    named: dict[str, Any] = {"dataset": cell.dataset, "attack": cell.attack, "model": cell.model, "preset": cell.preset}
    named["attack_options"] = compare.todays(cell.attack_options, ATTACKS, cell.attack)
    named["defense_options"] = compare.todays(cell.options, DEFENSES, cell.method)
    return row(cell.method, seed=cell.seed, variant=cell.variant, **named, **other)


def run_suite(folder: Path, *flags: str) -> int:
    """The exit code of `cifar10-budget`, which has four cells, in a folder of its own."""
    places = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    return int(reproduce.main(["cifar10-budget", *places, *flags]))


def kept(folder: Path) -> list[str]:
    """The defenses that have a row."""
    return [found["defense"] for found in compare.read_rows(folder / "results" / "cifar10-budget.csv")]


# the suites


@every_suite
def test_every_cell_of_a_suite_has_a_name_of_its_own(suite: str) -> None:
    names = [cell.name for cell in SUITES[suite]]
    assert len(set(names)) == len(names)


def test_cells_that_share_a_folder_are_the_same_cell() -> None:
    models: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for cell in CELLS:
        assert models.setdefault(cell.name, cell) == cell
        source = (cell.dataset, cell.attack, cell.attack_options, cell.seed)
        assert data.setdefault(cell.data_name, source) == source


@every_suite
def test_the_undefended_model_comes_before_what_is_read_against_it(suite: str) -> None:
    seen = set()
    for cell in SUITES[suite]:
        place = (cell.data_name, cell.model, cell.preset)
        assert cell.method in ("none", "victim") or place in seen
        seen.add(place)


@every_suite
def test_every_name_and_option_of_a_suite_is_in_the_registry(suite: str) -> None:
    for cell in SUITES[suite]:
        assert cell.dataset in DATASETS.rows
        assert cell.model in MODELS.rows
        ATTACKS.load(cell.attack).parse(cell.attack_options)
        if cell.method == "victim":
            assert issubclass(ATTACKS.load(cell.attack), TrainingAttack)
        else:
            resolved(cell)


@every_suite
def test_no_two_cells_of_a_suite_ask_for_the_same_model(suite: str) -> None:
    asked = [
        json.dumps(
            [cell.data_name, cell.model, cell.method, cell.precision, resolved(cell)], sort_keys=True, default=str
        )
        for cell in SUITES[suite]
        if cell.method != "victim"
    ]
    assert len(set(asked)) == len(asked)


def test_sig_leaves_half_of_its_target_class_clean() -> None:
    share_of_class = 1 / 10
    cells = [cell for suite, cells in SUITES.items() if suite != "attacks" for cell in cells if cell.attack == "sig"]
    assert {cell.attack_options["rate"] / share_of_class for cell in cells} == {0.5}


def test_quickstart_has_the_methods_of_the_command() -> None:
    assert [cell.method for cell in SUITES["quickstart"] if cell.seed == 0] == list(METHODS)


def test_cifar10_paper_ends_with_the_other_seeds() -> None:
    seeds = [cell.seed for cell in SUITES["cifar10-paper"]]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}


# what sources report


@every_entry
def test_a_reported_entry_says_all_that_a_reader_needs(entry: dict[str, Any]) -> None:
    texts = ("title", "url", "file", "dataset", "model", "attack", "trigger", "defense", "budget")
    assert all(isinstance(entry[name], str) and entry[name] for name in texts)
    assert entry["url"].startswith("https://")
    assert 0 <= entry["ba"] <= 1
    assert 0 <= entry["asr"] <= 1
    assert 0 < entry["rate"] < 1
    assert isinstance(entry["target"], int)
    assert entry["ba_over"] in ("all", "non-target")
    assert set(entry) <= {*texts, "ba", "asr", "rate", "target", "ba_over", "variant", "note", "preset"}


@every_entry
def test_a_reported_entry_has_names_of_the_registry(entry: dict[str, Any]) -> None:
    assert entry["dataset"] in DATASETS.rows
    assert entry["model"] in MODELS.rows
    assert entry["attack"] in ATTACKS.rows
    assert entry["defense"] in {*DEFENSES.rows, "victim"}
    variants = {cell.variant for cell in CELLS if cell.method == entry["defense"]}
    assert entry.get("variant", "") in {"", *variants}


# merging rows


def test_a_new_row_replaces_the_old_one_of_the_same_key_and_others_stay() -> None:
    old = [row(ba=0.5), row(ba=0.6, seed=1), row("abl", ba=0.7)]
    merged = reproduce.merge(old, [row(ba=0.8, made={"at": "later"}), row("cbd")])
    assert [(item["defense"], item["seed"], item["ba"]) for item in merged] == [
        ("none", 0, 0.8), ("none", 1, 0.6), ("abl", 0, 0.7), ("cbd", 0, 0.9),
    ]  # fmt: skip


def test_other_options_make_another_row() -> None:
    assert len(reproduce.merge([row("cbd")], [row("cbd", defense_options={"epochs": 3})])) == 2


def test_an_old_row_keeps_its_der_and_marks_when_its_undefended_row_is_replaced() -> None:
    old = [row(ba=0.5), row("abl", ba=0.7, der=0.123, marks="bw")]
    merged = reproduce.merge(old, [row(ba=0.8, made={"at": "later"})])
    assert merged[1]["der"] == 0.123
    assert merged[1]["marks"] == "bw"


def test_a_new_row_is_compared_with_an_old_undefended_row_of_the_same_data() -> None:
    merged = reproduce.merge([row(ba=0.9, asr=1.0)], [row("abl", ba=0.9, asr=0.0)])
    assert merged[1]["der"] == 1.0
    assert merged[1]["marks"] == "b"


def test_a_row_whose_model_was_not_made_anew_keeps_its_machine() -> None:
    old = [row(processor="there", cores=64)]
    assert reproduce.merge(old, [row()])[0]["processor"] == "there"
    assert reproduce.merge(old, [row(made={"at": "later"})])[0]["processor"] == "here"


FILES = sorted(file for file in (BENCHMARKS / "results").glob("*.csv") if file.stem in SUITES)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_file_that_is_written_again_holds_the_same_rows(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path)
    before = compare.read_rows(file)
    reproduce.keep(file.stem, [], {}, tmp_path)
    after = compare.read_rows(tmp_path / file.name)
    assert sorted(after, key=compare.key) == sorted(before, key=compare.key)


def test_an_id_of_digits_only_stays_text(tmp_path: Path) -> None:
    reproduce.keep("cifar10-budget", [row(model_id="0123456789012345", dataset_id="1e5")], {}, tmp_path)
    found = compare.read_rows(tmp_path / "cifar10-budget.csv")[0]
    assert (found["model_id"], found["dataset_id"]) == ("0123456789012345", "1e5")


def test_options_of_an_older_row_are_those_that_would_be_given_today(tmp_path: Path) -> None:
    """It lacks options that came later; one that went is left out, unless it was set."""
    old = row("cbd", defense_options={"twin_lr": 0.5, "gone": None, "missed": 3})
    reproduce.keep("cifar10-cpu", [old], {}, tmp_path)
    (found,) = compare.read_rows(tmp_path / "cifar10-cpu.csv")
    assert found["attack_options"] == plain(BadNets.parse(old["attack_options"]).model_dump())
    assert found["defense_options"] == plain(CBD(twin_lr=0.5).model_dump()) | {"missed": 3}


def test_the_file_of_a_suite_has_its_order_and_a_column_of_variants(tmp_path: Path) -> None:
    cells = [cell for cell in SUITES["ablation"] if cell.method in ("none", "cbd")]
    reproduce.keep("ablation", [row_of(cell) for cell in reversed(cells)], {}, tmp_path)
    rows = compare.read_rows(tmp_path / "ablation.csv")
    assert [item["variant"] for item in rows] == [cell.variant for cell in cells]
    assert "| cbd reweighting-only |" in (tmp_path / "ablation.md").read_text()


# running


def test_a_method_that_mends_gets_the_undefended_model_of_its_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def defend(data: Path, method: str, **given: Any) -> SimpleNamespace:
        calls.append((method, given["out"].name, given.get("suspect"), given["preset"], given["compile"]))
        return SimpleNamespace(path=given["out"], manifest=SimpleNamespace(made={"seconds": 30.0}))

    monkeypatch.setattr(DEFENSES, "load", lambda name: SimpleNamespace(needs_suspect=name == "mcldef"))
    monkeypatch.setattr(stages, "poison", lambda *_, **given: SimpleNamespace(path=given["out"]))
    monkeypatch.setattr(stages, "defend", defend)
    monkeypatch.setattr(stages, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(results, "evaluation_row", lambda _: {})
    cell = next(cell for cell in SUITES["ablation"] if cell.variant == "given-target")
    found = reproduce.run(cell, reproduce.Settings(tmp_path, {}, compile=True))
    assert calls == [
        ("none", "cifar10-badnets-s0-none", None, "fast", True),
        ("mcldef", "cifar10-badnets-s0-mcldef-given-target", tmp_path / "cifar10-badnets-s0-none", "fast", True),
    ]
    assert found["made"] == {"seconds": 30.0}
    assert found["variant"] == "given-target"


def test_the_command_of_a_row_compiles_where_the_row_did(tmp_path: Path) -> None:
    one, other = SUITES["precision"][:2]
    rows = [row_of(one), row_of(other) | {"made": {**row_of(other)["made"], "compiled": True}}]
    reproduce.keep("precision", rows, {}, tmp_path)
    found = [row["command"].partition("precision")[2] for row in compare.read_rows(tmp_path / "precision.csv")]
    assert found == ["", " --compile"]


def test_a_cell_that_fails_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cell: Any, settings: Any) -> dict[str, Any]:
        if cell.method == "abl":
            raise TrainingError("the loss is not finite;\nlower its learning rate")
        return row_of(cell)

    monkeypatch.setattr(reproduce, "run", run)
    assert run_suite(tmp_path) == 1
    assert kept(tmp_path) == ["none", "cbd", "mcldef"]
    failure = "- `cifar10-badnets-s0-paper-abl`: the loss is not finite; lower its learning rate"
    text = tmp_path / "results" / "cifar10-budget.md"
    assert failure in text.read_text()
    assert "failed: the loss is not finite" in capsys.readouterr().out

    monkeypatch.setattr(reproduce, "run", lambda cell, _: row_of(cell))
    assert run_suite(tmp_path, "--only", "cbd") == 0
    assert failure in text.read_text()  # still so: it was not tried again
    assert run_suite(tmp_path, "--missing") == 0
    assert kept(tmp_path) == ["none", "abl", "cbd", "mcldef"]
    assert "Failed" not in text.read_text()


def test_a_suite_of_which_every_cell_fails_has_a_table_of_failures_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(cell: Any, settings: Any) -> dict[str, Any]:
        raise OptionError("no")

    monkeypatch.setattr(reproduce, "run", run)
    assert run_suite(tmp_path) == 1
    assert not (tmp_path / "results" / "cifar10-budget.csv").exists()
    assert (tmp_path / "results" / "cifar10-budget.md").read_text().count("\n- ") == 4


def test_when_the_time_is_up_a_running_cell_is_interrupted_and_finished_rows_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cell: Any, settings: Any) -> dict[str, Any]:
        limit = time.monotonic() + 30
        while cell.method == "abl" and time.monotonic() < limit:
            time.sleep(0.01)
        return row_of(cell)

    monkeypatch.setattr(reproduce, "run", run)
    begun = time.monotonic()
    assert run_suite(tmp_path, "--seconds", "2") == 0
    assert time.monotonic() - begun < 20
    assert kept(tmp_path) == ["none"]
    assert capsys.readouterr().out.endswith("time is up; run the same command again\n")


def test_no_cell_begins_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "run", lambda cell, _: pytest.fail(cell.name))
    assert run_suite(tmp_path, "--seconds", "0") == 0
    assert "time is up" in capsys.readouterr().out


def test_an_interruption_by_the_user_is_not_taken_for_the_end_of_the_slice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(cell: Any, settings: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, "--seconds", "600")


def test_the_list_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "run", lambda cell, _: row_of(cell))
    run_suite(tmp_path, "--only", "none")
    (tmp_path / "runs" / ".cifar10-badnets-s0-paper-abl.work").mkdir(parents=True)
    capsys.readouterr()
    assert run_suite(tmp_path, "--list") == 0
    words = [text.split()[:2] for text in capsys.readouterr().out.splitlines()]
    assert words == [["-", "row"], ["interrupted", "-"], ["-", "-"], ["-", "-"]]


def test_a_substring_that_no_name_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run_suite(tmp_path, "--only", "nothing")


# comparing


def entry(**other: Any) -> dict[str, Any]:
    """A reported entry."""
    found = {
        "title": "a source", "url": "https://example.org", "dataset": "cifar10", "model": "wrn-16-1", "rate": 0.1,
        "target": 0, "attack": "badnets", "trigger": "a patch", "defense": "abl", "ba": 0.86, "asr": 0.03,
        "ba_over": "all", "budget": "100 epochs",
    }  # fmt: skip
    return {**found, **other}


def settings_of(folder: Path, **suites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured settings of rows that were kept in files."""
    for suite, rows in suites.items():
        (folder / f"{suite}.csv").write_text(str(tables.render(results.mark_rows(rows), "csv")))
    return list(compare.measured(folder, list(suites)))


@pytest.mark.parametrize(("over", "measured", "difference"), [("all", "82.7", "-3.3"), ("non-target", "85.4", "-0.6")])
def test_the_measured_ba_is_over_the_images_of_the_source(
    over: str, measured: str, difference: str, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, one=[row("abl", ba=0.827, ba_non_target=0.854, asr=0.004)])
    cells = compare.line(entry(ba_over=over, preset="fast"), settings[0], 1)
    assert cells[-6:] == ["86.0", measured, difference, "3.0", "0.4", "-2.6"]


def test_a_difference_that_rounds_to_none_has_no_minus(tmp_path: Path) -> None:
    assert (
        compare.line(entry(ba=0.8601, preset="fast"), settings_of(tmp_path, one=[row("abl", ba=0.86)])[0], 1)[-4]
        == "+0.0"
    )


def test_an_entry_meets_its_own_attack_and_defense_only(tmp_path: Path) -> None:
    rows = [row("abl", attack="blended"), row("cbd"), row("abl", dataset="digits"), row("abl", variant="other")]
    settings = settings_of(tmp_path, one=rows)
    assert compare.comparable(entry(), settings) == []
    text = compare.markdown([entry()], settings)
    assert "no comparable measured row yet" in text
    assert "- a source: badnets (a patch), abl, wrn-16-1, rate 0.1, target 0: BA 86.0 (all), ASR 3.0" in text


def test_the_nearest_setting_is_shown_whatever_its_result(tmp_path: Path) -> None:
    rows = [
        row("abl", ba=0.9, asr=0.0),
        row("abl", ba=0.1, asr=0.9, preset="paper"),
        row("abl", ba=0.9, asr=0.0, model="resnet-18", preset="paper"),
    ]
    lines = compare.markdown([entry(preset="paper")], settings_of(tmp_path, one=rows)).splitlines()
    assert len(lines) == 3
    assert "paper, seed 0 (`one`; nearest of 3)" in lines[2]
    assert lines[2].endswith("| 86.0 | 10.0 | -76.0 | 3.0 | 90.0 | +87.0 |")


@pytest.mark.parametrize(
    "other", [{"model": "resnet-18"}, {"rate": 0.05}, {"target": 3}, {"preset": "paper"}, {"preset": None}]
)
def test_a_difference_is_told_only_where_the_settings_agree(other: dict[str, Any], tmp_path: Path) -> None:
    (setting,) = settings_of(tmp_path, one=[row("abl", ba=0.8, asr=0.4)])
    assert compare.line(entry(preset="fast"), setting, 1)[-6:] == ["86.0", "80.0", "-6.0", "3.0", "40.0", "+37.0"]
    assert compare.line(entry(**{"preset": "fast", **other}), setting, 1)[-6:] == [
        "86.0",
        "80.0",
        "",
        "3.0",
        "40.0",
        "",
    ]


def test_entries_that_wait_for_their_method_have_the_name_that_it_will_have() -> None:
    sources = tomllib.loads(compare.PAPER.read_text())["source"]
    told = {entry["defense"] for source in sources for entry in source["entries"]}
    assert told <= {*DEFENSES.rows, "victim"}


def test_entries_of_methods_that_are_not_in_bdbench_yet_are_left_out(tmp_path: Path) -> None:
    told = "".join(f'  {{ defense = "{name}" }},\n' for name in ("abl", "anything"))
    (tmp_path / "paper.toml").write_text(f"[[source]]\nentries = [\n{told}]\n")
    assert [found["defense"] for found in compare.reported(tmp_path / "paper.toml")] == ["abl"]


@pytest.mark.parametrize(("reported", "nearest"), [(0.05, 0.1), (0.02, 0.01)])
def test_rates_are_near_by_their_ratio(reported: float, nearest: float, tmp_path: Path) -> None:
    rows = [row("abl", attack_options={"rate": rate, "target": 0}) for rate in (0.1, 0.01)]
    settings = settings_of(tmp_path, one=rows)
    setting = compare.markdown([entry(rate=reported)], settings).splitlines()[2].split("|")[5]
    assert f"rate {nearest}, target 0" in setting


def test_a_source_that_tells_the_target_meets_the_variant_that_is_told(tmp_path: Path) -> None:
    rows = [row("mcldef"), row("mcldef", ba=0.1, variant="given-target", defense_options={"oracle_target": 0})]
    settings = settings_of(tmp_path, one=rows)
    lines = compare.markdown([entry(defense="mcldef", variant="given-target")], settings).splitlines()
    assert len(lines) == 3
    assert "fast given-target" in lines[2]


def test_seeds_are_averaged_and_a_cell_that_two_suites_share_counts_once(tmp_path: Path) -> None:
    seeds = [row("abl", ba=0.8, seed=0), row("abl", ba=0.9, seed=1)]
    settings = settings_of(tmp_path, one=seeds, two=seeds[:1])
    assert [(item["suite"], item["seeds"]) for item in settings] == [("one", [0, 1])]
    assert settings[0]["ba"] == pytest.approx(0.85)


def test_every_reported_entry_is_in_the_table_or_in_the_list(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, one=[row(), row("abl"), row("none", attack="blended")])
    lines = compare.markdown(ENTRIES, settings).splitlines()
    assert sum(text.startswith(("| [", "- ")) for text in lines) == len(ENTRIES)
    assert len({text.count("|") for text in lines if text.startswith("|")}) == 1


def test_the_page_is_written_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- compare -->\nstale text\n<!-- /compare -->\nafter\n")
    assert compare.compare(tmp_path, ["one"], page) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- compare -->\n")
    assert text.endswith("\n<!-- /compare -->\nafter\n")
    assert "stale text" not in text
    page.write_text("nothing\n")
    assert compare.compare(tmp_path, ["one"], page) == 1
    assert page.read_text() == "nothing\n"


@pytest.mark.parametrize("name", pages.TABLES)
def test_the_tables_of_the_pages_are_those_of_the_results(name: str) -> None:
    page, suite, shown = pages.TABLES[name]
    text = page.read_text(encoding="utf-8")
    assert compare.fill(text, name, shown(compare.read_rows(BENCHMARKS / "results" / f"{suite}.csv"))) == text


def test_the_comparison_of_the_repository_is_that_of_the_results() -> None:
    text = compare.PAGE.read_text(encoding="utf-8")
    settings = compare.measured(BENCHMARKS / "results", [*SUITES, "repairs"])
    assert compare.fill(text, compare.MARKER, compare.markdown(ENTRIES, settings)) == text


def test_an_attack_stands_beside_what_its_source_reports_for_its_rate() -> None:
    interval = {"asr_low": 0.95, "asr_high": 1.0}
    rows = [
        row(variant="3-epochs", defense_options={"epochs": 3}, **interval),
        row(variant="3-epochs", defense_options={"epochs": 3}, attack_options={"rate": 0.02, "target": 0}, **interval),
        row(variant="3-epochs-no-covers", defense_options={"epochs": 3}, **interval),
    ]
    lines = [text.split(" | ") for text in pages.attacks(rows).splitlines()[2:]]
    assert [cells[1] for cells in lines] == ["10 %", "2 %", "10 %"]
    assert lines[2][0] == "| `badnets`, no covers"
    assert "github.com" in lines[0][-1]
    assert not any("github.com" in cells[-1] for cells in lines[1:])


def test_the_grid_has_an_attack_a_line_and_marks_those_that_failed() -> None:
    rows = [
        row("none", attack=attack, seed=seed, ba=0.8 + seed / 10, asr=asr, marks=marks)
        for attack, asr, marks in (("sig", 0.1, "w"), ("batt", 1.0, ""))
        for seed in (0, 1)
    ]
    lines = pages.grid([*rows, row("abl", attack="batt", asr=0.0, marks="")]).splitlines()
    assert lines[0] == "| attack | none | abl |"
    assert lines[2] == "| `sig` (failed) | BA 0.850 ± 0.071<br>ASR 0.100 ± 0.000 |  |"
    assert lines[3].startswith("| `batt` | BA 0.850 ± 0.071<br>ASR 1.000 ± 0.000 | BA ")
    assert "±" not in lines[3].split(" | ")[2]


def test_repairs_have_a_line_each_and_ranks_with_their_bound() -> None:
    rows = [row(ba=0.9, asr=1.0), row("ft", ba=0.85, asr=0.5), row("mcldef", ba=0.3, asr=0.0)]
    lines = pages.repairs(results.mark_rows(rows)).splitlines()
    assert lines[0] == "| BA / ASR, % | badnets |"
    assert lines[2:5] == ["| `none` | 90.0 / 100.0 |", "| `mcldef` | 30.0 / 0.0 (l) |", "| `ft` | 85.0 / 50.0 |"]
    assert lines[8].startswith("| ft | fast | 1.000 |")
    assert any(line.rstrip().endswith("below it: mcldef everywhere") for line in lines)


# the grid


def test_a_sweep_goes_on_from_the_stored_grid(tmp_path: Path) -> None:
    """Its records say what was asked; what a record holds may change, and they with it.

    Defenses whose version has risen since are named as changed.
    """
    with tarfile.open(BENCHMARKS / "results" / "grid.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    given = grid.read_grid(BENCHMARKS / "grid.toml")
    checked = checking.check(given)
    there = sweep.Sweep(given, tmp_path, suspects=checked.suspects, methods=checked.methods)
    states = there.states()
    risen = {cell: DEFENSES.load(cell.defense).version > 1 for cell in states}
    assert {cell: state.state for cell, state in states.items()} == {
        cell: "changed" if risen[cell] else "done" for cell in states
    }
    assert len(results.read_rows([tmp_path], strict=True)) == len(given.cells)


def test_the_grid_of_repairs_has_every_repair() -> None:
    given = grid.read_grid(BENCHMARKS / "repairs.toml")
    assert {cell.defense for cell in given.cells} == {"none", "oracle", *repairs()}
