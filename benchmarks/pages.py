"""Tables of measured rows in README.md and RESULTS.md: `python benchmarks/reproduce.py compare` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import compare

from bdbench import files
from bdbench.registry import DEFENSES
from bdbench.reports import results, tables

README = Path(__file__).parents[1] / "README.md"
Row = Mapping[str, Any]


def attacks(rows: Sequence[Row]) -> str:
    """Return what each attack reaches undefended, beside what its source reports for that rate."""
    said = [entry for entry in compare.reported() if entry["defense"] in ("none", "victim")]
    order, lines = list(dict.fromkeys(row["attack"] for row in rows)), []
    for row in sorted(rows, key=lambda row: order.index(row["attack"])):
        options, training = row["attack_options"], row["defense_options"]
        special = re.sub(r"^\d+-epochs-?", "", row["variant"]).replace("-", " ")
        name = "the attacker's own model" if row["defense"] == "victim" else special
        mine = (row["attack"], row["defense"], options["rate"])
        like = [entry for entry in said if (entry["attack"], entry["defense"], entry["rate"]) == mine and not special]
        near = min(like, key=lambda entry: compare.distance(entry, row), default=None)
        cells = [
            f"`{row['attack']}`" + (f", {name}" if name else ""),
            f"{100 * options['rate']:g} %",
            str(training.get("epochs", options.get("victim_epochs"))),
            rate(row, "ba"),
            interval(row),
            rate(row, "floor"),
            "" if near is None else f"[{near['asr']:.3f}]({near['url']})",
        ]
        lines.append(cells)
    headings = ("attack", "poison rate", "epochs", "BA", "ASR (95 % interval)", "floor", "ASR reported elsewhere")
    return compare.table(headings, lines, first_number=1)


def cifar(rows: Sequence[Row]) -> str:
    """Return attacks and defenses on CIFAR-10, a line a run, with the marks that not all of them have."""
    names = ("floor", "ra", "target_recall", "detection_precision", "auroc")
    shown = [row for row in rows if not row["variant"]]
    own = [mark for mark in tables.MARKS if any(mark in row["marks"] for row in shown)]
    own = [mark for mark in own if not all(mark in row["marks"] for row in shown)]
    lines = [
        [
            row["attack"], row["defense"], rate(row, "ba"), interval(row), *(rate(row, name) for name in names),
            "".join(mark for mark in own if mark in row["marks"]),
        ]
        for row in shown
    ]  # fmt: skip
    headings = (
        "attack", "defense", "BA", "ASR (95 % interval)", "floor", "RA", "target recall", "set aside: precision",
        "AUROC", "",
    )  # fmt: skip
    legend = "  \n".join(f"{mark}: {tables.MARKS[mark]}" for mark in own)
    return "\n\n".join(filter(None, [compare.table(headings, lines, first_number=2), legend]))


SEEDS = ("none", "cbd", "abl", "dbd", "mcldef")


def overview(rows: Sequence[Row]) -> str:
    """Return BA / ASR of the undefended model and of each defense, a line an attack."""
    shown = {(row["attack"], row["defense"]): row for row in rows if not row["variant"]}
    lines = [
        [f"`{attack}`", *(f"{rate(row, 'ba')} / {rate(row, 'asr')}" for row in (shown[attack, name] for name in SEEDS))]
        for attack in dict.fromkeys(row["attack"] for row in rows)
    ]
    return compare.table(("BA / ASR", *SEEDS), lines, first_number=1)


def quickstart(rows: Sequence[Row]) -> str:
    """Return BA / ASR of every defense of the quickstart over its seeds, with the median."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["defense"] for row in rows):
        own = {row["seed"]: row for row in rows if row["defense"] == name}
        middle = {key: median(row[key] for row in own.values()) for key in ("ba", "asr")}
        lines.append([name, *(f"{rate(row, 'ba')} / {rate(row, 'asr')}" for row in (*map(own.get, seeds), middle))])
    headings = ("defense, BA / ASR", "seed 0", *map(str, seeds[1:]), "median")
    return compare.table(headings, lines, first_number=len(headings))


GRID = [column for column in tables.COLUMNS if column.key in ("ba", "asr")]


def grid(rows: Sequence[Row]) -> str:
    """Return BA and ASR over seeds, a line an attack, a column a defense; failed attacks are marked."""
    merged = results.over_seeds([dict(row) for row in rows])
    defenses = [name for name in DEFENSES.rows if any(row["defense"] == name for row in merged)]
    lines = []
    for name in dict.fromkeys(row["attack"] for row in merged):
        own = {row["defense"]: row for row in merged if row["attack"] == name}
        failed = any("w" in row["marks"] for row in own.values())
        cells = [
            "<br>".join(f"{column.heading} {tables.cell(own[defense], column)}" for column in GRID)
            if defense in own
            else ""
            for defense in defenses
        ]
        lines.append([f"`{name}`" + (" (failed)" if failed else ""), *cells])
    return compare.table(("attack", *defenses), lines, first_number=1)


def repairs(rows: Sequence[Row]) -> str:
    """Return BA / ASR in percent, means over seeds, a line a defense, a column an attack; then ranks by DER."""
    if not rows:
        return "The sweep has not been run."
    merged = results.merge([dict(row) for row in rows])
    attacks = list(dict.fromkeys(row["attack"] for row in merged))
    shown = {(row["defense"], row["attack"]): row for row in merged}
    lines = [
        [f"`{name}`", *(percent(shown.get((name, attack))) for attack in attacks)]
        for name in sorted({name for name, _ in shown}, key=list(DEFENSES.rows).index)
    ]
    ranks = str(tables.render_ranking([dict(row) for row in rows], "der", "markdown"))
    return "\n\n".join([compare.table(("BA / ASR, %", *attacks), lines, first_number=1), ranks])


def percent(row: Row | None) -> str:
    """Return BA / ASR in percent, or nothing; the marks that matter for a rank beside them."""
    if row is None:
        return ""
    marks = "".join(mark for mark in "wlu" if mark in row["marks"])
    return f"{100 * row['ba']:.1f} / {100 * row['asr']:.1f}{f' ({marks})' if marks else ''}"


def rate(row: Row | None, name: str) -> str:
    """Return a share with three digits, or nothing."""
    return "" if row is None or row[name] is None else f"{row[name]:.3f}"


def interval(row: Row) -> str:
    """Return an ASR with its interval."""
    return f"{row['asr']:.3f} ({row['asr_low']:.3f} to {row['asr_high']:.3f})"


TABLES: Mapping[str, tuple[Path, str, Callable[[Sequence[Row]], str]]] = MappingProxyType(
    {
        "overview": (README, "cifar10-cpu", overview),
        "cifar": (compare.PAGE, "cifar10-cpu", cifar),
        "grid": (compare.PAGE, "grid", grid),
        "repairs": (compare.PAGE, "repairs", repairs),
        "quickstart": (compare.PAGE, "quickstart", quickstart),
        "attacks": (compare.PAGE, "attacks", attacks),
        "budget": (compare.PAGE, "cifar10-budget", cifar),
    }
)
"""Marker -> page that has it, suite, and what makes its table."""


def write(results: Path) -> None:
    """Write every table between its markers."""
    for name, (page, suite, shown) in TABLES.items():
        text = compare.fill(page.read_text(encoding="utf-8"), name, shown(compare.read_rows(results / f"{suite}.csv")))
        with files.replace_file(page) as path:
            path.write_text(text, encoding="utf-8")
