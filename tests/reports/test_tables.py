"""Rows and tables: what is compared with what, what is marked, what is averaged."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from bdbench.cli.quickstart import COLUMNS, METHODS
from bdbench.errors import ArtifactError
from bdbench.protocol.metric_list import METRICS, RATES, SCORES
from bdbench.reports import results, tables


def row(defense: str = "none", seed: int = 0, ba: float = 0.9, asr: float = 1.0, **other: Any) -> dict[str, Any]:
    """A row as `evaluation_row` gives it."""
    metrics = {"ba": ba, "asr": asr, "floor": 0.02, "ra": 0.0, "ba_non_target": ba, "target_recall": 0.8}
    full: dict[str, Any] = {
        "dataset": "digits", "dataset_id": f"d{seed}", "model": "convnet", "attack": "badnets", "attack_options": {},
        "defense": defense, "defense_options": {}, "preset": "paper", "seed": seed, "seconds": 10.0,
        "peak_memory_bytes": 1,
    }  # fmt: skip
    for name in RATES:
        full |= {name: metrics.get(name), f"{name}_n": 100, f"{name}_low": None, f"{name}_high": None}
    return {**full, **dict.fromkeys(SCORES), **other}


def test_a_table_shows_the_columns_that_are_asked_for() -> None:
    rows = results.mark_rows([row(), row("cbd")])
    heading = str(tables.render(rows, "markdown", ("asr", "floor"))).splitlines()[0]
    assert "| ASR | floor |" in heading
    assert "BA" not in heading


@pytest.mark.parametrize(("options", "shown"), [({"rate": 0.1}, False), ({"rate": 0}, True)])
def test_false_alarms_are_shown_beside_rows_without_poison(options: dict[str, float], shown: bool) -> None:
    rows = [row(attack_options=options), row("abl", attack_options=options, false_alarms=0.01)]
    text = str(tables.render(results.mark_rows(rows), "markdown"))
    assert ("false alarms |" in text.splitlines()[0]) == shown


def test_the_quickstarts_table_fits_80_columns() -> None:
    named = {"dataset": "digits", "model": "convnet-16", "preset": "tiny", "detection_precision": 1.0, "auroc": 0.99}
    rows = results.mark_rows([row(method, **named) for method in METHODS])
    stream = io.StringIO()
    Console(width=80, file=stream).print(tables.render(rows, "rich", COLUMNS))
    printed = stream.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    assert "no room" not in printed
    for heading in ("BA", "ASR", "floor", "recall", "seconds"):
        assert heading in printed


def test_a_place_without_evaluations_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a folder; give the folder that holds your runs"):
        results.read_rows([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(ArtifactError, match=f"no evaluation under {tmp_path}; make one with: bdbench evaluate"):
        results.read_rows([tmp_path])


def test_der_compares_with_the_undefended_row_of_the_same_data_and_seed() -> None:
    rows = results.mark_rows([row(ba=0.93), row("cbd", ba=0.50, asr=0.0), row("cbd", seed=1)])
    assert rows[1]["der"] == pytest.approx(0.785)
    assert rows[0]["der"] is None
    assert rows[2]["der"] is None
    assert "?" in rows[2]["marks"]


def test_undefended_rows_of_several_budgets_are_judged_each_by_its_own() -> None:
    rows = [row(asr=0.05, defense_options={"epochs": 12}), row(asr=0.98, defense_options={"augment": "none"})]
    for given in (rows, rows[::-1]):
        assert [(item["attack_failed"], item["marks"]) for item in results.mark_rows(given)] == [
            (item["asr"] < 0.5, "w" if item["asr"] < 0.5 else "") for item in given
        ]


@pytest.mark.parametrize(("asr", "floor", "failed"), [(0.49, 0.0, True), (0.5, 0.0, False), (0.6, 0.55, True)])
def test_an_attack_failed_where_the_undefended_asr_is_low_or_near_its_floor(
    asr: float, floor: float, failed: bool
) -> None:
    marked = results.mark_rows([row(asr=asr, floor=floor), row("abl")])
    assert [item["attack_failed"] for item in marked] == [failed, failed]
    assert [item["asr"] for item in marked] == [asr, 1.0]  # what was measured stays, as does its mean
    assert [item["asr"] for item in results.over_seeds(marked)] == [asr, 1.0]
    assert ("w" in marked[1]["marks"]) is failed


def test_a_budget_that_is_not_the_papers_is_marked() -> None:
    assert results.mark_rows([row(preset="fast")])[0]["marks"] == "b"
    assert results.mark_rows([row()])[0]["marks"] == ""


@pytest.mark.parametrize(
    ("facts", "mark"),
    [
        ({"defense_options": {"oracle_target": 0}}, "o"), ({"defense_options": {"oracle_target": None}}, ""),
        ({"reads_truth": True}, "r"), ({"replay": True}, "p"), ({"changed": ["epochs"]}, "c"),
        ({"findings": {"took": False}}, "a"), ({"findings": {"took": True}}, ""), ({"preset": "code"}, ""),
        ({"findings": {"unchanged": True}}, "u"), ({"findings": {"unchanged": False}}, ""), ({"asr": None}, "n"),
    ],
)  # fmt: skip
def test_what_a_reader_has_to_know_of_a_row_is_marked(facts: dict[str, Any], mark: str) -> None:
    marked = results.mark_rows([row(), row("mcldef", **facts)])
    assert [item["marks"] for item in marked] == ["", mark]
    if mark:
        assert f"{mark}: {tables.MARKS[mark]}" in str(tables.render(marked, "markdown"))


def test_data_of_one_name_and_other_sources_are_no_seeds_of_one_setting() -> None:
    small, large = {"source": "aa", "source_options": {}}, {"source": "bb", "source_options": {"image_size": 16}}
    merged = results.merge(results.mark_rows([row(**small), row(seed=1, **small), row(**large)]))
    assert [(item["dataset"], item["seeds"]) for item in merged] == [("digits", [0, 1]), ("digits image_size=16", [0])]


def test_sources_of_one_name_and_the_same_options_are_told_apart_by_their_ids() -> None:
    merged = results.merge(
        results.mark_rows([row(source=name, source_options={}) for name in ("aaaaaaaa", "bbbbbbbb")])
    )
    assert [item["dataset"] for item in merged] == ["digits aaaaaa", "digits bbbbbb"]


def test_rows_from_before_sources_were_kept_are_one_setting() -> None:
    assert len(results.merge(results.mark_rows([row(), row(seed=1)]))) == 1


def test_seeds_of_one_setting_are_averaged_and_other_settings_are_not() -> None:
    rows = [row(seed=0, ba=0.8), row(seed=1, ba=0.9), row(seed=0, defense_options={"epochs": 3})]
    merged = results.over_seeds(results.mark_rows(rows))
    assert [item["seeds"] for item in merged] == [[0, 1], [0]]
    assert merged[0]["ba"] == pytest.approx(0.85)
    assert merged[0]["ba_sd"] == pytest.approx(math.sqrt(0.005))
    assert merged[1]["ba_sd"] is None


def test_a_metric_that_a_run_lacks_is_left_out_of_the_mean_not_counted_as_zero() -> None:
    merged = results.over_seeds(results.mark_rows([row(seed=0, auroc=0.8), row(seed=1, auroc=None)]))
    assert merged[0]["auroc"] == pytest.approx(0.8)


def test_csv_and_json_hold_every_run() -> None:
    rows = results.mark_rows([row(seed=0), row(seed=1)])
    assert len(pd.read_csv(io.StringIO(str(tables.render(rows, "csv"))))) == 2
    parsed = json.loads(str(tables.render(rows, "json")))["rows"]
    assert [item["seed"] for item in parsed] == [0, 1]


def test_rows_that_differ_in_options_are_told_apart_by_them() -> None:
    rows = [row(attack_options={"rate": rate, "target": 0}) for rate in (0.1, 0.01)]
    rows.append(row(attack="sig", attack_options={"rate": 0.05, "target": 0}))
    rows += [row(attack="sig", attack_options={"rate": 0.05, "target": 0}, defense="abl", defense_options={"gamma": 1})]
    shown = str(tables.render(results.mark_rows(rows), "markdown")).splitlines()[2:6]
    assert [line.split(" | ")[2:4] for line in shown] == [
        ["badnets rate=0.1", "none"], ["badnets rate=0.01", "none"], ["sig", "none"], ["sig", "abl"],
    ]  # fmt: skip


def test_markdown_has_as_many_cells_in_every_line() -> None:
    text = str(tables.render(results.mark_rows([row(preset="fast"), row("cbd", asr=0.0)]), "markdown"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "b: a small budget" in text


def test_latex_escapes_what_latex_would_read() -> None:
    text = str(tables.render(results.mark_rows([row(dataset="my_data & more")]), "latex"))
    assert r"my\_data \& more" in text
    assert text.count(r"\\") == 2


def test_notes_on_marks_are_printed_below_a_latex_table() -> None:
    lines = str(tables.render(results.mark_rows([row(preset="fast")]), "latex")).splitlines()
    below = lines[lines.index(r"\end{tabular}") + 1 :]
    assert below == [r"\par\smallskip", r"{\footnotesize", r"b: a small budget, not the paper's\par", "}"]
    assert not any(line.startswith("%") for line in lines)


def test_what_latex_reads_as_a_command_is_escaped() -> None:
    marked = results.mark_rows([row(dataset=r"a\b {c} #1 $x^2~y <z>")])
    assert r"a\textbackslash{}b \{c\} \#1 \$x\textasciicircum{}2\textasciitilde{}y \textless{}z\textgreater{}" in str(
        tables.render(marked, "latex")
    )


def test_the_best_defense_of_a_setting_is_bold_in_latex() -> None:
    rows = [row(), row("oracle", ba=0.99, asr=0.0, reads_truth=True), row("cbd", ba=0.85, asr=0.0), row("abl", asr=0.1)]
    rows += [row(attack="sig", dataset_id="s", asr=0.1), row("cbd", attack="sig", dataset_id="s")]
    rows += [row(attack="lf", dataset_id="l"), row("cbd", attack="lf", dataset_id="l")]
    lines = str(tables.render(results.mark_rows(rows), "latex", ["ba", "asr"])).splitlines()
    told = [line.split(" & ") for line in lines if line.startswith("digits")]
    bold = [(line[2], line[3], line[6], line[7]) for line in told if "textbf" in "".join(line)]
    assert bold == [
        ("badnets", "cbd", "0.850", r"\textbf{0.000}"), ("badnets", "abl", r"\textbf{0.900}", "0.100"),
    ]  # fmt: skip
    assert r"bold: the best defense of a setting\par" in lines


def test_numbers_stand_right_and_names_left() -> None:
    marked = results.mark_rows([row()])
    lines = str(tables.render(marked, "markdown")).splitlines()
    aligned = dict(zip(lines[0].split("|")[1:-1], lines[1].split("|")[1:-1], strict=True))
    assert {name.strip() for name, rule in aligned.items() if rule == "---"} == {
        "data", "model", "attack", "defense", "preset", "seeds",
    }  # fmt: skip
    assert {aligned[" seconds "], aligned[" peak MiB "], aligned[" BA "]} == {"---:"}
    assert r"\begin{tabular}{llllllrrrrrrr}" in str(tables.render(marked, "latex"))


def test_chosen_metrics_are_shown_in_their_order_and_no_others() -> None:
    marked = results.mark_rows([row(seconds=1234.0), row("abl", asr=0.25)])
    head = str(tables.render(marked, "markdown", ["seconds", "asr", "ba_non_target", "der"])).splitlines()[0]
    assert head == "| data | model | attack | defense | preset | seeds | seconds | ASR | BA, other classes | DER |"
    rows = json.loads(str(tables.render(marked, "json", ["asr"])))["rows"]
    assert {"asr", "asr_n", "asr_low", "asr_high", "defense", "seed"} <= rows[0].keys()
    assert not {"ba", "ba_n", "seconds"} & rows[0].keys()
    assert pd.read_csv(io.StringIO(str(tables.render(marked, "csv", ["asr"]))))["asr"].tolist() == [1.0, 0.25]


def printed(rows: list[dict[str, Any]], width: int, columns: Sequence[str] | None = None) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.render(results.mark_rows(rows), "rich", columns), crop=False)
    return console.export_text()


def seeds_of(*defenses: str, attack: str = "badnets") -> list[dict[str, Any]]:
    """Two seeds of each, with every rate."""
    rates = dict.fromkeys(("detection_precision", "asr_others", "auroc"), 0.5)
    return [row(name, seed, 0.9 + seed / 100, attack=attack, **rates) for name in defenses for seed in (0, 1)]


def test_what_all_rows_share_stands_above_the_printed_table() -> None:
    shown = printed([row(ba=0.912), row("abl", ba=0.834)], 200).splitlines()
    assert shown[0].strip() == "data digits · model convnet · attack badnets · preset paper · seed 0"
    assert "badnets" not in "".join(shown[1:])
    assert "0.912" in next(line for line in shown if "none" in line)
    assert "attack badnets" not in printed([row(), row(attack="sig")], 200)
    assert "2 seeds" in printed(seeds_of("none"), 200).splitlines()[0]


@pytest.mark.parametrize("width", [60, 80, 100, 130, 200])
def test_a_terminal_of_any_width_shows_whole_numbers_and_names(width: int) -> None:
    text = printed(seeds_of("none", "mcldef"), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "mcldef" in text
    table = "".join(line for line in lines if line.startswith(("┃", "│")))
    assert all(heading in table for heading in ("BA", "ASR", "floor"))
    left_out = text.partition("hidden at this width")[2]
    assert ("AUROC" in left_out) is ("AUROC" not in table)
    assert bool(left_out) is (width < 130)
    assert ("`bdbench table --wide` shows them" in " ".join(left_out.split())) is bool(left_out)
    assert ("0.905 ± 0.007" in table) is (width == 200)


def test_metrics_that_are_asked_for_are_shown_whatever_the_width() -> None:
    text = printed(seeds_of("none", "mcldef"), 60, list(METRICS))
    head = text.splitlines()[2:6]
    assert all(any(word in line for line in head) for word in ("AUROC", "RA", "DER"[0], "seconds", "peak", "precision"))
    assert "hidden at this width" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) > 60


def test_defenses_of_an_attack_stand_together_in_the_order_of_the_registry() -> None:
    rows = [row("mcldef"), row(attack="sig"), row("abl"), row("mine", attack="sig"), row(), row("oracle", attack="sig")]
    shown = str(tables.render(results.mark_rows(rows), "markdown")).splitlines()[2:8]
    assert [tuple(line.split(" | ")[2:4]) for line in shown] == [
        ("badnets", "none"), ("badnets", "abl"), ("badnets", "mcldef"), ("sig", "none"), ("sig", "oracle"),
        ("sig", "mine"),
    ]  # fmt: skip


def test_a_ranking_of_nothing_says_why() -> None:
    with pytest.raises(ArtifactError, match=r"^nothing to rank: left out, the attack failed"):
        tables.render_ranking(results.mark_rows([row(asr=0.1), row("abl")]), "der", "rich")


def repaired(suspect: str, ba: float = 0.8, asr: float = 0.1, **other: Any) -> dict[str, Any]:
    """A row of a model that repaired another one, given by its id."""
    return row("ft", ba=ba, asr=asr, suspect_id=suspect, **{"model_id": "ft", **other})


def test_a_repair_is_compared_with_the_model_that_it_repaired() -> None:
    plain, victim = row(model_id="plain", ba=0.9, asr=0.6), row("victim", model_id="victim", ba=0.85, asr=1.0)
    for suspect, ba, asr in (("plain", -0.1, -0.5), ("victim", -0.05, -0.9)):
        marked = results.mark_rows([plain, victim, repaired(suspect)])
        assert (marked[2]["ba_change"], marked[2]["asr_change"]) == pytest.approx((ba, asr))
        assert marked[2]["der"] == pytest.approx((1 - asr + ba) / 2)
        assert [item["ba_change"] for item in marked[:2]] == [None, None]


def test_a_model_that_was_repaired_twice_is_compared_with_the_first_one() -> None:
    twice = repaired("ft", 0.7, 0.0, model_id="twice")
    for rows in ([row(model_id="plain"), repaired("plain"), twice], [row(), repaired("plain"), twice]):
        assert results.mark_rows(rows)[2]["ba_change"] == pytest.approx(-0.2)


def test_a_repair_whose_suspect_is_not_there_is_compared_with_the_undefended_row() -> None:
    marked = results.mark_rows([row(model_id="plain"), repaired("elsewhere")])
    assert marked[1]["asr_change"] == pytest.approx(-0.9)
    assert "?" in results.mark_rows([repaired("elsewhere")])[0]["marks"]


def test_an_attackers_own_model_tells_itself_whether_the_attack_failed() -> None:
    marked = results.mark_rows([row("victim", asr=0.3, model_id="victim"), repaired("victim")])
    assert ["w" in item["marks"] for item in marked] == [True, True]
    assert marked[0]["der"] is None


@pytest.mark.parametrize(("ba", "is_marked"), [(0.8099, True), (0.8101, False)])
def test_what_keeps_less_than_nine_tenths_of_the_accuracy_is_marked(ba: float, is_marked: bool) -> None:
    marked = results.mark_rows([row(), row("cbd", ba=ba)])
    assert ["l" in item["marks"] for item in marked] == [False, is_marked]


def test_changes_are_shown_with_their_sign_beside_repairs_only() -> None:
    lines = printed([row(model_id="plain"), repaired("plain", 0.9004, 0.25)], 80).splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = (line for line in lines if line.startswith("│ ft"))
    assert [part.strip() for part in line.split("│")[2:6]] == ["0.900", "0.250", "+0.000", "-0.750"]
    assert any(line.startswith("change: against the undefended model") for line in lines)
    assert "change" not in printed([row(), row("abl")], 200)


def test_repairs_of_an_attackers_own_model_are_another_setting() -> None:
    rows = [row(model_id="plain"), row("victim", model_id="victim"), row("abl"), repaired("plain") | {"suspect": {}}]
    own = repaired("victim") | {"suspect": {"method": "victim"}}

    def named(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(item["attack"], item["defense"]) for item in results.merge(results.mark_rows(rows))]

    assert named([*rows, own]) == [
        ("badnets", "none"), ("badnets suspect=victim", "victim"), ("badnets", "abl"), ("badnets", "ft"),
        ("badnets suspect=victim", "ft"),
    ]  # fmt: skip
    assert {attack for attack, _ in named([*rows[:3], own])} == {"badnets"}


def test_the_bound_of_ranks_is_said_with_who_misses_it() -> None:
    rows = [row(), row("abl", ba=0.3, asr=0.0), row("cbd", asr=0.4)]
    text = str(tables.render_ranking(results.mark_rows(rows), "der", "markdown"))
    assert "| defense | preset | average rank | mean | BA lost |" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[2:4]] == ["| cbd", "| abl"]
    assert "keep 0.9 of the undefended model's BA" in text
    assert text.splitlines()[6].strip().endswith("(--min-ba); below it: abl everywhere")
    assert "BA lost" not in str(tables.render_ranking(results.mark_rows(rows), "der", "markdown", 0.3))
