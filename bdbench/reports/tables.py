"""Evaluations -> one row each -> tables: rich, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from bdbench.errors import ArtifactError
from bdbench.protocol.metric_list import METRICS, MIN_BA
from bdbench.registry import DEFENSES
from bdbench.reports.formats import Column, latex, markdown, safe_table
from bdbench.reports.ranking import Ranking, rank
from bdbench.reports.results import UNDEFENDED, finite, has_no_poison, merge
from bdbench.wording import counted

Format = Literal["rich", "markdown", "csv", "latex", "json"]


NAMES = (
    Column("dataset", "data", is_number=False),
    Column("model", "model", is_number=False),
    Column("attack", "attack", is_number=False),
    Column("defense", "defense", is_number=False),
    Column("preset", "preset", is_number=False),
    Column("seeds", "seeds", is_number=False),
)
"""Columns that say what a row is of; every table has them."""

USUAL = (
    "ba", "asr", "asr_others", "floor", "ra", "target_recall", "der", "detection_precision", "auroc", "seconds",
    "peak_memory_bytes",
)  # fmt: skip
"""Metrics that a table shows unless others are asked for."""

COLUMNS = (
    *NAMES, *(Column(name, METRICS[name].heading) for name in USUAL), Column("marks", "", is_number=False)
)  # fmt: skip

CHANGES = ("ba_change", "asr_change")
"""What a table with repaired models shows too, after ASR."""

OF_SCANS = (
    "auroc", "auroc_in_class", "auroc_covers", "auprc", "tpr_at_01_fpr", "tpr_at_1_fpr", "tpr_at_5_fpr",
    "precision_at_50", "r_precision", "detection_precision", "detection_recall", "false_alarms", "seconds",
)  # fmt: skip
"""Metrics that a table of scans shows."""

SHARED = ("dataset", "model", "attack", "preset", "seeds")
"""Columns that stand once above the printed table where all its rows agree."""

SINGLE_RUN = (
    "dataset", "model", "attack", "attack_options", "defense", "defense_options", "preset", "seed", "marks", "path",
)  # fmt: skip
"""What says of a single run what it is of."""

SPARED = (
    "auroc_covers", "auprc", "precision_at_50", "tpr_at_5_fpr", "r_precision", "tpr_at_01_fpr", "auroc_in_class",
    "peak_memory_bytes", "seconds", "target_recall", "detection_precision", "auroc", "ra", "asr_others", "false_alarms",
    "der",
)  # fmt: skip
"""Columns that a narrow terminal does without, first to last."""

MARKS = {
    "w": "the attack failed: its undefended ASR is under 0.5 or within 0.1 of its floor; do not score defenses by it",
    "n": "the data as they were found: no trigger is known, and so no ASR",
    "0": "nothing was poisoned, on purpose: a defense is judged by its BA there, and by its false alarms",
    "?": "no undefended row of the same dataset and model here: neither DER nor the strength of the attack is known",
    "b": "a small budget, not the paper's",
    "c": "options differ from the preset",
    "o": "the defense was told the target class",
    "r": "a reference that reads the truth, not a defense",
    "p": "the attack's generator was trained with a victim of its own, then frozen and replayed as data",
    "u": "the defense returned the model unchanged: it found no backdoor, or no setting kept the accuracy",
    "a": "ABL's unlearning did not take: the isolated samples are still known; its findings say how far it came",
    "l": f"BA under {MIN_BA:g} of the undefended model's; `--ranks` puts it last",
}


def _grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring what belongs to one dataset, model and attack together, its defenses in the registry's order."""
    settings: dict[tuple[str | None, ...], int] = {}
    places = {name: place for place, name in enumerate(dict.fromkeys((*UNDEFENDED, *DEFENSES.names())))}
    return sorted(
        rows,
        key=lambda row: (
            settings.setdefault(_setting(row), len(settings)), places.get(row["defense"].split()[0], len(places))
        ),
    )  # fmt: skip


def _setting(row: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("dataset", "model", "attack"))


def render(rows: Sequence[dict[str, Any]], style: Format, columns: Sequence[str] | None = None) -> Fitting | str:
    """Return the table of BA and ASR over seeds in one of the formats; JSON and CSV hold every single run.

    Args:
        rows: from `read_rows`.
        style: rich gives what a `rich.console.Console` prints, the others text.
        columns: names of metrics to show, whatever the width of the terminal. Default: the usual ones that a row has,
            and of these as many as fit; JSON and CSV then hold all there is.
    """
    if style in ("json", "csv"):
        single = [_narrowed(row, columns) for row in rows]
        return json.dumps({"rows": single}, indent=1) if style == "json" else _csv(single)
    merged = _grouped(merge(rows))
    shown = COLUMNS
    if any("0" in row["marks"] for row in merged):
        shown = _with(shown, "auroc", "false_alarms")
    if any(row.get("suspect_id") for row in rows):
        shown = _with(shown, "floor", *CHANGES)
    if columns is not None:
        shown = (*NAMES, *(Column(name, METRICS[name].heading) for name in columns), COLUMNS[-1])
    shown = tuple(column for column in shown if any(cell(row, column) for row in merged))
    cells = [[cell(row, column) for column in shown] for row in merged]
    notes = [f"{mark}: {text}" for mark, text in MARKS.items() if any(mark in row["marks"] for row in merged)]
    if set(CHANGES) & {column.key for column in shown}:
        notes.append("change: against the undefended model; of a repair, the model that it repaired")
    if any(" ± " in text for line in cells for text in line):
        notes.append("±: standard deviation over seeds")
    if style == "rich":
        return Fitting(shown, cells, merged, notes, spared=SPARED if columns is None else ())
    if style == "markdown":
        return markdown(shown, cells, notes)
    best = _best(merged, shown)
    return latex(shown, cells, [*notes, *(["bold: the best defense of a setting"] if best else [])], best)


def _with(columns: Sequence[Column], before: str, *metrics: str) -> tuple[Column, ...]:
    """Return columns with those of some metrics before the one of another."""
    place = next(place for place, column in enumerate(columns) if column.key == before)
    return (*columns[:place], *(Column(name, METRICS[name].heading) for name in metrics), *columns[place:])


def render_scans(rows: Sequence[dict[str, Any]], style: Format) -> Fitting | str:
    """Return the table of scans over seeds; see `render`.

    Args:
        rows: from `read_rows(..., judged="scan")`.
        style: see `render`.
    """
    if style in ("json", "csv"):
        return json.dumps({"scans": list(rows)}, indent=1) if style == "json" else _csv(list(rows))
    merged = merge([{**row, "marks": "0" if has_no_poison(row) else ""} for row in rows])
    names = [column for column in NAMES if column.key not in ("preset", "defense")]
    columns = [
        *names[:3], Column("defense", "detector", is_number=False), *names[3:],
        *(Column(name, METRICS[name].heading) for name in OF_SCANS),
    ]  # fmt: skip
    columns = [column for column in columns if any(cell(row, column) for row in merged)]
    cells = [[cell(row, column) for column in columns] for row in merged]
    notes = [MARKS["0"]] if any(row["marks"] for row in merged) else []
    if style == "rich":
        return Fitting(columns, cells, merged, notes, spared=SPARED)
    return markdown(columns, cells, notes) if style == "markdown" else latex(columns, cells, notes)


def _best(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> set[tuple[int, int]]:
    """Return the places (row, column) of the highest BA and DER and the lowest ASR of each setting's defenses.

    Undefended and reference rows do not compete, nor do rows whose attack failed, nor those that lost too much BA; one
    defense alone is not the best.
    """
    settings: dict[tuple[str | None, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if row["defense"].split()[0] not in UNDEFENDED and not set("rwn0?l") & set(row["marks"]):
            settings.setdefault(_setting(row), []).append(place)
    best = set()
    for number, column in enumerate(columns):
        if column.key in ("ba", "asr", "der"):
            wanted = max if METRICS[column.key].better == "high" else min
            for places in (found for found in settings.values() if len(found) > 1):
                values = {place: round(rows[place][column.key], 3) for place in places}  # as they are printed
                best |= {(place, number) for place in places if values[place] == wanted(values.values())}
    return best


def _narrowed(row: dict[str, Any], columns: Sequence[str] | None) -> dict[str, Any]:
    """Return what CSV and JSON hold of a row: all, or what names it and the chosen metrics with counts and limits."""
    if columns is None:
        return row
    names = [name for column in columns for name in (column, f"{column}_n", f"{column}_low", f"{column}_high")]
    return {name: row[name] for name in (*SINGLE_RUN, *names) if name in row}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    flat = [
        {key: json.dumps(item) if isinstance(item, dict | list) else item for key, item in row.items()} for row in rows
    ]
    return safe_table(flat).to_csv(index=False)


RANKING = (
    Column("defense", "defense", is_number=False), Column("preset", "preset", is_number=False),
    Column("rank", "average rank"), Column("mean", "mean"), Column("lost", "BA lost"),
)  # fmt: skip


def render_ranking(rows: Sequence[dict[str, Any]], metric: str, style: Format, min_ba: float = MIN_BA) -> Fitting | str:
    """Return the defenses by their average ranks over attacks, with Friedman's test, in one of the formats.

    Args:
        rows: from `read_rows`.
        metric: der, ba or asr.
        style: as in `render`; CSV and JSON hold the same lines.
        min_ba: see `bdbench.reports.ranking.rank`.

    Raises:
        ArtifactError: there is no row of a defense, or all attacks failed.
    """
    found = rank(merge(rows), metric, min_ba)
    if not found.defenses:
        raise ArtifactError(f"nothing to rank: {'; '.join(left_out(found)) or 'no row is of a defense'}")
    lines = [own._asdict() for own in found.defenses]
    if style == "json":
        facts = {key: finite(value) if isinstance(value, float) else value for key, value in found._asdict().items()}
        return json.dumps({**facts, "defenses": lines}, indent=1)
    if style == "csv":
        return safe_table(lines).to_csv(index=False)
    shown = RANKING if found.lost else RANKING[:-1]
    cells = [
        [f"{value:.3f}" if isinstance(value := line[column.key], float) else str(value) for column in shown]
        for line in lines
    ]
    if style == "rich":
        return Fitting(shown, cells, [line | {"marks": ""} for line in lines], ranking_notes(found))
    return (markdown if style == "markdown" else latex)(shown, cells, ranking_notes(found))


def ranking_notes(found: Ranking) -> list[str]:
    """Return what has to be said beside ranks: over what, Friedman's test, and what was left out."""
    notes = [f"ranked by {found.metric.upper()} over {counted(found.blocks, 'setting')} of dataset, model and attack"]
    if found.min_ba:
        bound = f"a defense must keep {found.min_ba:g} of the undefended model's BA, or it shares the last rank"
        notes.append(f"{bound} of that setting (--min-ba); below it: {_lost(found) or 'none'}")
    if not math.isnan(found.p):
        notes.append(
            f"Friedman: chi-squared {found.statistic:.2f}, p {found.p:.3g}; critical difference of ranks "
            f"{found.critical_difference:.2f} (Nemenyi, 5 %)"
        )
    else:
        notes.append("no test: it needs at least 3 defenses and 2 settings")
    return notes + left_out(found)


def _lost(found: Ranking) -> str:
    """Return which defenses keep too little BA, and in which settings; what these share is left out."""
    settings: dict[str, list[str]] = {}
    for defense, setting in found.lost:
        settings.setdefault(defense, []).append(setting)
    apart = [name.rpartition(", ") for _, name in found.lost]
    shared = len({place for place, _, _ in apart}) == 1
    told = {name: attack if shared else name for (_, name), (_, _, attack) in zip(found.lost, apart, strict=True)}
    return "; ".join(
        f"{defense} {'everywhere' if len(where) == found.blocks else 'in ' + ', '.join(told[name] for name in where)}"
        for defense, where in settings.items()
    )


def left_out(found: Ranking) -> list[str]:
    """Return which settings have no part in a ranking, and why."""
    notes = []
    if found.failed:
        notes.append(f"left out, the attack failed or its strength is not known: {'; '.join(found.failed)}")
    if found.incomplete:
        notes.append(f"left out, a defense is missing: {'; '.join(found.incomplete)}")
    return notes


def cell(row: dict[str, Any], column: Column) -> str:
    """Return what a merged row shows in a column: of a rate the mean over seeds with its standard deviation."""
    value = row[column.key]
    if column.key == "seeds":
        return str(value[0]) if len(value) == 1 else f"{len(value)}"
    if not column.is_number:
        return str(value)
    if value is None:
        return ""
    if METRICS[column.key].kind == "cost":
        return f"{value / (2**20 if column.key == 'peak_memory_bytes' else 1):,.0f}"
    spread = row[f"{column.key}_sd"]
    # Adding 0.0 takes the sign from a change that rounds to none.
    text = f"{round(value, 3) + 0.0:+.3f}" if METRICS[column.key].kind == "change" else f"{value:.3f}"
    return text + ("" if spread is None else f" ± {spread:.3f}")


class Fitting:
    """A table for a terminal of any width.

    What all rows share stands above it. Where it is too wide, spreads get lines of their own, then columns are left
    out; what is still too wide is printed as wide as it is.

    Args:
        columns, cells: the table, cells as text.
        rows: what the lines are made of, for their emphasis.
        notes: lines below it.
        spared: keys of columns that a narrow terminal does without, first to last.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        cells: list[list[str]],
        rows: list[dict[str, Any]],
        notes: list[str],
        spared: Sequence[str] = (),
    ) -> None:
        texts = {column: [line[place] for line in cells] for place, column in enumerate(columns)}
        shared = [column for column in columns if column.key in SHARED and len(set(texts[column])) == 1]
        self.title = " · ".join(_shared(column, rows[0], texts[column][0]) for column in shared)
        self.columns = {column: texts[column] for column in columns if column not in shared}
        self.rows, self.notes, self.spared = rows, notes, spared

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        """Yield the table for a console of this width."""
        shown, notes = self.columns, list(self.notes)
        if _width(shown) > options.max_width:
            shown = {column: [text.replace(" ± ", "\n± ") for text in texts] for column, texts in shown.items()}
        spared = []
        for key in self.spared:
            if _width(shown) > options.max_width:
                spared += [column.heading for column in shown if column.key == key]
                shown = {column: texts for column, texts in shown.items() if column.key != key}
        if spared:
            notes.append(f"hidden at this width: {', '.join(spared)} (`bdbench table --wide` shows them)")
        if self.title:
            yield Text(self.title)
        yield from console.render(self._table(shown), options.update_width(max(options.max_width, _width(shown))))
        if notes:
            yield Text("\n".join(notes), style="dim italic")

    def _table(self, shown: Mapping[Column, Sequence[str]]) -> Table:
        table = Table(header_style="bold")
        for column, texts in shown.items():
            if column.is_number:
                heading = "\n".join(textwrap.wrap(column.heading, _least(column, texts)))
                table.add_column(heading, justify="right", no_wrap=True)
            else:
                table.add_column(column.heading, overflow="fold")
        for place, row in enumerate(self.rows):
            table.add_row(
                *(texts[place] for texts in shown.values()),
                style="bold" if row["defense"] in UNDEFENDED else "dim" if "r" in row["marks"] else None,
                end_section=any(_setting(after) != _setting(row) for after in self.rows[place + 1 : place + 2]),
            )
        return table


def _width(columns: Mapping[Column, Sequence[str]]) -> int:
    """Return the least width of a table that breaks no word and no number."""
    return 1 + sum(3 + _least(column, texts) for column, texts in columns.items())


def _least(column: Column, texts: Iterable[str]) -> int:
    parts = (part for text in texts for part in (text.splitlines() if column.is_number else text.split()))
    return max(map(len, (*column.heading.split(), *parts)), default=0)


def _shared(column: Column, row: dict[str, Any], text: str) -> str:
    if column.key == "seeds":
        return f"seed {text}" if len(row["seeds"]) == 1 else f"{text} seeds"
    return f"{column.heading} {text}"
