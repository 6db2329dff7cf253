"""Evaluations -> one row each -> tables: rich, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from bdbench.artifacts import EvaluationArtifact
from bdbench.errors import ArtifactError, OptionError
from bdbench.metrics import defence_effectiveness, mean_interval
from bdbench.ranking import Ranked, Ranking, rank
from bdbench.registry import DEFENSES
from bdbench.store import find_artifacts

Format = Literal["rich", "markdown", "csv", "latex", "json"]

RATES = (
    "ba", "asr", "asr_others", "floor", "ra", "ba_non_target", "target_recall", "detection_precision",
    "detection_recall",
)  # fmt: skip
SCORES = ("auroc", "tpr_at_1_fpr", "tpr_at_5_fpr")
KEYS = ("dataset", "model", "attack", "attack_options", "defense", "defense_options", "preset")
SOURCE = ("source", "source_options")
"""What tells data sets of one name apart; rows from before it was kept have None."""
WEAK_ATTACK = 0.5
FLOOR_MARGIN = 0.1


class Column(NamedTuple):
    """A column of the printed table: key of the row, heading, and whether it is a rate."""

    key: str
    heading: str
    is_rate: bool = True


COLUMNS = (
    Column("dataset", "data", False),
    Column("model", "model", False),
    Column("attack", "attack", False),
    Column("defense", "defence", False),
    Column("preset", "preset", False),
    Column("seeds", "seeds", False),
    Column("ba", "BA"),
    Column("asr", "ASR"),
    Column("asr_others", "ASR, other classes"),
    Column("floor", "floor"),
    Column("ra", "RA"),
    Column("target_recall", "target recall"),
    Column("der", "DER"),
    Column("detection_precision", "set aside: precision"),
    Column("auroc", "AUROC"),
    Column("seconds", "seconds", False),
    Column("peak_memory_bytes", "peak MiB", False),
    Column("marks", "", False),
)

SHARED = ("dataset", "model", "attack", "preset", "seeds")
"""Columns that stand once above the printed table where all its rows agree."""

SPARED = ("peak_memory_bytes", "seconds", "target_recall", "detection_precision", "auroc", "ra", "asr_others", "der")
"""Columns that a narrow terminal does without, first to last."""

MARKS = {
    "w": "the attack failed: its undefended ASR is under 0.5 or within 0.1 of its floor; do not score defences by it",
    "n": "the data as they were found: no trigger is known, and so no ASR",
    "?": "no undefended row of the same data set and model here: neither DER nor the strength of the attack is known",
    "b": "a small budget, not the paper's",
    "c": "other options than the preset's",
    "o": "the defence was told the target class",
    "r": "a reference that reads the truth, no defence",
    "p": "the attack's generator was trained with a victim of its own, then frozen and replayed as data",
    "u": "the defence found no backdoor and returned the model as it was",
}


def read_rows(places: Sequence[Path], *, strict: bool = False) -> list[dict[str, Any]]:
    """Return a row per evaluation found at or under the given folders, oldest first.

    A row has dataset, model, attack, defense, preset, seed, and for every rate its value, n, low and high.

    Raises:
        ArtifactError: a place is no folder, or no evaluation is there; `strict`, and an artifact there is damaged.
    """
    for place in places:
        if not place.is_dir():
            raise ArtifactError(f"{place} is not a folder; give the folder that holds your runs")
    seen: dict[str, dict[str, Any]] = {}
    for place in places:
        for path, manifest in find_artifacts(place, "evaluation", strict=strict):
            seen[manifest.id] = evaluation_row(EvaluationArtifact(path, manifest))
    if not seen:
        raise ArtifactError(f"no evaluation under {', '.join(map(str, places))}; make one with: bdbench evaluate")
    return mark_rows(list(seen.values()))


def evaluation_row(evaluation: EvaluationArtifact) -> dict[str, Any]:
    """Return one evaluation as a flat row of JSON values; what does not apply is None."""
    facts = evaluation.manifest.facts
    row: dict[str, Any] = {**facts, **{name: facts.get(name) for name in SOURCE}}
    row |= {"evaluation_id": evaluation.id, "path": str(evaluation.path)}
    entries = {entry["metric"]: entry for entry in evaluation.records("metrics.parquet")}
    for name in (*RATES, *SCORES):
        entry = entries.get(name, {"value": None, "denominator": None, "low": None, "high": None})
        row[name] = _finite(entry["value"])
        if name in RATES:
            row |= {f"{name}_n": entry["denominator"], f"{name}_low": _finite(entry["low"])}
            row |= {f"{name}_high": _finite(entry["high"])}
    return row


def mark_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `der` against the undefended row of the same data set, model, seed and, if there is one, preset.

    Also `attack_failed` and `marks`. An undefended row tells by its own ASR whether the attack failed: a data set may
    have several, of other budgets.
    """
    undefended = {_pairing(row): row for row in rows if row["defense"] == "none"}
    undefended |= {(*_pairing(row), row["preset"]): row for row in rows if row["defense"] == "none"}
    marked = []
    for row in rows:
        near = undefended.get((*_pairing(row), row["preset"]), undefended.get(_pairing(row)))
        base = row if row["defense"] == "none" else near
        attacked = row["asr"] is not None
        failed = None
        if base is not None and attacked:
            failed = bool(base["asr"] < WEAK_ATTACK or base["asr"] - base["floor"] < FLOOR_MARGIN)
        der = None
        if base is not None and attacked and row["defense"] != "none" and not row.get("reads_truth"):
            der = defence_effectiveness(base["ba"], base["asr"], row["ba"], row["asr"])
        marks = "n" if not attacked else "?" if base is None else "w" if failed else ""
        marks += "" if row["preset"] == "paper" else "b"
        marks += "c" if row.get("changed") else ""
        marks += "o" if row["defense_options"].get("oracle_target") is not None else ""
        marks += "r" if row.get("reads_truth") else ""
        marks += "p" if row.get("replay") else ""
        marks += "u" if row.get("findings", {}).get("unchanged") else ""
        marked.append({**row, "der": der, "attack_failed": failed, "marks": marks})
    return marked


def _pairing(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["dataset_id"], row["model"], row["seed"]


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge rows that differ in seeds only: mean, and under `<metric>_sd` and `<metric>_half` the spread.

    `<metric>_sd` is the sample standard deviation, `<metric>_half` half of the 95 % t interval; both None for one seed.
    """
    merged = []
    for group in by_setting(rows):
        seeds = sorted({row["seed"] for row in group})
        out: dict[str, Any] = {key: group[0].get(key) for key in (*KEYS, *SOURCE)}
        out |= {"seeds": seeds, "marks": "".join(sorted({mark for row in group for mark in row["marks"]}))}
        for name in (*RATES, *SCORES, "der", "seconds", "peak_memory_bytes"):
            out |= mean_and_spread(name, [row.get(name) for row in group])
        merged.append(out)
    return merged


def mean_and_spread(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """Return mean, standard deviation and half interval of a metric under the names that `over_seeds` gives them."""
    parts = mean_interval([math.nan if value is None else value for value in values])
    return dict(zip((name, f"{name}_sd", f"{name}_half"), map(_finite, parts), strict=True))


def merge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `over_seeds` with attacks and defences named so that rows of different options are told apart."""
    merged = over_seeds(rows)
    for row, dataset in zip(merged, _sources_apart(merged), strict=True):
        row["dataset"] = dataset
    attacks = _tell_apart(merged, "attack", ("dataset",))
    defenses = _tell_apart(merged, "defense", ("dataset", "model", "preset"))
    return [
        row | {"attack": attack, "defense": defense}
        for row, attack, defense in zip(merged, attacks, defenses, strict=True)
    ]


def _grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring what belongs to one data set, model and attack together, its defences in the registry's order."""
    settings: dict[tuple[str | None, ...], int] = {}
    places = {name: place for place, name in enumerate(DEFENSES.names())}
    return sorted(
        rows,
        key=lambda row: (
            settings.setdefault(_setting(row), len(settings)), places.get(row["defense"].split()[0], len(places))
        ),
    )  # fmt: skip


def _setting(row: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("dataset", "model", "attack"))


def by_setting(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return rows in groups that differ in seeds only, both in the order of the rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(key) for key in (*KEYS, *SOURCE)], sort_keys=True), []).append(row)
    return list(groups.values())


def _sources_apart(rows: list[dict[str, Any]]) -> list[str]:
    """Return the name of each row's data set; of equal names with their source's options, or else its id."""
    told = []
    for row in rows:
        own = row["source_options"] or {}
        others = [
            other["source_options"] or {}
            for other in rows
            if other["dataset"] == row["dataset"]
            and None not in (row["source"], other["source"])
            and other["source"] != row["source"]
        ]
        differing = sorted({name for other in others for name in own | other if own.get(name) != other.get(name)})
        said = [f"{name}={own[name]}" for name in differing if name in own]
        if others and not differing:
            said = [row["source"][:6]]
        told.append(" ".join([row["dataset"], *said]))
    return told


def _tell_apart(rows: list[dict[str, Any]], name: str, among: Sequence[str]) -> list[str]:
    """Return the name of each row's attack or defence, with the options that differ among rows of equal `among`."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[key] for key in (*among, name)), []).append(row)
    told = []
    for row in rows:
        own = row[f"{name}_options"]
        others = [it[f"{name}_options"] for it in alike[tuple(row[key] for key in (*among, name))]]
        differing = [key for key, value in own.items() if any(other.get(key) != value for other in others)]
        differing = [key for key in differing if own[key] is not None]
        told.append(" ".join([row[name], *(f"{key}={own[key]}" for key in differing)]))
    return told


def render(rows: Sequence[dict[str, Any]], style: Format) -> Fitting | str:
    """Return the table of BA and ASR over seeds in one of the formats; JSON and CSV hold every single run.

    Args:
        rows: from `read_rows`.
        style: rich gives what a `rich.console.Console` prints, the others text.
    """
    if style == "json":
        return json.dumps({"rows": list(rows)}, indent=1)
    if style == "csv":
        flat = [
            {key: json.dumps(item) if isinstance(item, dict | list) else item for key, item in row.items()}
            for row in rows
        ]
        return pd.DataFrame(flat).to_csv(index=False)
    merged = _grouped(merge(rows))
    columns = [column for column in COLUMNS if any(cell(row, column) for row in merged)]
    cells = [[cell(row, column) for column in columns] for row in merged]
    notes = [f"{mark}: {text}" for mark, text in MARKS.items() if any(mark in row["marks"] for row in merged)]
    if style == "rich":
        return Fitting(columns, cells, merged, notes)
    return _markdown(columns, cells, notes) if style == "markdown" else _latex(columns, cells, notes)


RANKING = (
    Column("defense", "defence", False), Column("preset", "preset", False), Column("rank", "average rank"),
    Column("mean", "mean"),
)  # fmt: skip


def render_ranking(rows: Sequence[dict[str, Any]], metric: str, style: Format) -> Fitting | str:
    """Return the defences by their average ranks over attacks, with Friedman's test, in one of the formats.

    Args:
        rows: from `read_rows`.
        metric: der, ba or asr.
        style: as in `render`; CSV and JSON hold the same lines.

    Raises:
        OptionError: there is no row of a defence, or all attacks failed.
    """
    found = rank(merge(rows), metric)
    if not found.defenses:
        raise OptionError(f"nothing to rank: {'; '.join(left_out(found)) or 'no row is of a defence'}")
    lines = [own._asdict() for own in found.defenses]
    if style == "json":
        facts = {key: _finite(value) if isinstance(value, float) else value for key, value in found._asdict().items()}
        return json.dumps({**facts, "defenses": lines}, indent=1)
    if style == "csv":
        return pd.DataFrame(lines, columns=Ranked._fields).to_csv(index=False)
    cells = [
        [f"{line[column.key]:.3f}" if column.is_rate else str(line[column.key]) for column in RANKING] for line in lines
    ]
    if style == "rich":
        return Fitting(list(RANKING), cells, [line | {"marks": ""} for line in lines], ranking_notes(found))
    return (_markdown if style == "markdown" else _latex)(list(RANKING), cells, ranking_notes(found))


def ranking_notes(found: Ranking) -> list[str]:
    """Return what has to be said beside ranks: over what, Friedman's test, and what was left out."""
    notes = [f"ranked by {found.metric.upper()} over {found.blocks} settings of data set, model and attack"]
    if not math.isnan(found.p):
        notes.append(
            f"Friedman: chi-squared {found.statistic:.2f}, p {found.p:.3g}; critical difference of ranks "
            f"{found.critical_difference:.2f} (Nemenyi, 5 %)"
        )
    else:
        notes.append("no test: it needs at least 3 defences and 2 settings")
    return notes + left_out(found)


def left_out(found: Ranking) -> list[str]:
    """Return which settings have no part in a ranking, and why."""
    notes = []
    if found.failed:
        notes.append(f"left out, the attack failed or its strength is not known: {'; '.join(found.failed)}")
    if found.incomplete:
        notes.append(f"left out, a defence is missing: {'; '.join(found.incomplete)}")
    return notes


def cell(row: dict[str, Any], column: Column) -> str:
    """Return what a merged row shows in a column: of a rate the mean over seeds with its standard deviation."""
    value = row[column.key]
    if column.key == "seeds":
        return str(value[0]) if len(value) == 1 else f"{len(value)}"
    if column.key in ("seconds", "peak_memory_bytes"):
        return f"{value / (2**20 if column.key == 'peak_memory_bytes' else 1):,.0f}"
    if not column.is_rate:
        return str(value)
    if value is None:
        return ""
    spread = row[f"{column.key}_sd"]
    return f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


class Fitting:
    """A table for a terminal of any width.

    What all rows share stands above it. Where it is too wide, spreads get lines of their own, then columns stay away.

    Args:
        columns, cells: the table, cells as text.
        rows: what the lines are made of, for their emphasis.
        notes: lines below it.
    """

    def __init__(
        self, columns: list[Column], cells: list[list[str]], rows: list[dict[str, Any]], notes: list[str]
    ) -> None:
        texts = {column: [line[place] for line in cells] for place, column in enumerate(columns)}
        shared = [column for column in columns if column.key in SHARED and len(set(texts[column])) == 1]
        self.title = " · ".join(_shared(column, rows[0], texts[column][0]) for column in shared)
        self.columns = {column: texts[column] for column in columns if column not in shared}
        self.rows, self.notes = rows, notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Yield the table for a console of this width."""
        shown, notes = self.columns, list(self.notes)
        if _width(shown) > options.max_width:
            shown = {column: [text.replace(" ± ", "\n± ") for text in texts] for column, texts in shown.items()}
        spared = []
        for key in SPARED:
            if _width(shown) > options.max_width:
                spared += [column.heading for column in shown if column.key == key]
                shown = {column: texts for column, texts in shown.items() if column.key != key}
        if spared:
            notes.append(f"no room here for: {', '.join(spared)} (`bdbench table --format csv` has them)")
        if self.title:
            yield Text(self.title)
        yield self._table(shown)
        if notes:
            yield Text("\n".join(notes), style="dim italic")

    def _table(self, shown: Mapping[Column, Sequence[str]]) -> Table:
        table = Table(header_style="bold")
        for column, texts in shown.items():
            if _is_number(column):
                heading = "\n".join(textwrap.wrap(column.heading, _least(column, texts)))
                table.add_column(heading, justify="right", no_wrap=True)
            else:
                table.add_column(column.heading, overflow="fold")
        for place, row in enumerate(self.rows):
            table.add_row(
                *(texts[place] for texts in shown.values()),
                style="bold" if row["defense"] == "none" else "dim" if "r" in row["marks"] else None,
                end_section=any(_setting(after) != _setting(row) for after in self.rows[place + 1 : place + 2]),
            )
        return table


def _width(columns: Mapping[Column, Sequence[str]]) -> int:
    """Return the least width of a table that breaks no word and no number."""
    return 1 + sum(3 + _least(column, texts) for column, texts in columns.items())


def _least(column: Column, texts: Iterable[str]) -> int:
    parts = (part for text in texts for part in (text.splitlines() if _is_number(column) else text.split()))
    return max(map(len, (*column.heading.split(), *parts)), default=0)


def _is_number(column: Column) -> bool:
    return column.is_rate or column.key in ("seconds", "peak_memory_bytes")


def _shared(column: Column, row: dict[str, Any], text: str) -> str:
    if column.key == "seeds":
        return f"seed {text}" if len(row["seeds"]) == 1 else f"{text} seeds"
    return f"{column.heading} {text}"


def _markdown(columns: list[Column], cells: list[list[str]], notes: list[str]) -> str:
    lines = ["| " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.is_rate else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip()


def _latex(columns: list[Column], cells: list[list[str]], notes: list[str]) -> str:
    def escape(text: str) -> str:
        for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("±", r"$\pm$")):
            text = text.replace(plain, escaped)
        return text

    def line(parts: Iterable[str]) -> str:
        return " & ".join(escape(part) for part in parts) + r" \\"

    alignment = "".join("r" if column.is_rate else "l" for column in columns)
    return "\n".join(
        [
            *(f"% {note}" for note in notes),
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line(column.heading for column in columns),
            r"\midrule",
            *(line(cell) for cell in cells),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
