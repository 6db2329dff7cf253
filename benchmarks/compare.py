"""Set measured rows beside what papers and their repositories report: `python benchmarks/reproduce.py compare`."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdbench import files
from bdbench.artifacts import made
from bdbench.protocol.metric_list import RATES, SCORES
from bdbench.registry import ATTACKS, DEFENSES, Registry
from bdbench.reports.results import KEYS, over_seeds

PAPER = Path(__file__).with_name("paper.toml")
PAGE = Path(__file__).with_name("RESULTS.md")
MARKER = "compare"
PRESETS = ("paper", "code", "fast", "tiny")
HEADINGS = (
    "reported by", "attack", "defense", "reported setting", "measured setting", "BA over",
    "BA reported", "BA measured", "difference", "ASR reported", "ASR measured", "difference",
)  # fmt: skip
FIRST_NUMBER = HEADINGS.index("BA reported")


def key(row: dict[str, Any]) -> str:
    """Return what makes a row: the columns that `bdbench.reports.tables` takes for one setting, variant and seed."""
    return json.dumps([row[name] for name in (*KEYS, "variant", "seed")], sort_keys=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file as `results.mark_rows` gives them; columns that an old file lacks are None.

    Options that a method did not have when a row was made are at their defaults, and unset ones that it no longer has
    are left out, so that the row and one of today are the same setting. No file, no rows.
    """
    if not path.exists():
        return []
    names = (*RATES, *SCORES, "der", "made", "processor", "cores", "command")
    defaults = dict.fromkeys(names) | {"marks": "", "variant": "", "findings": {}}
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        for record in csv.DictReader(stream):
            row = {name: _value(name, text) for name, text in record.items()}
            row |= {name: value for name, value in defaults.items() if row.get(name) is None}
            for column, usual in (("attack_options", ATTACKS), ("defense_options", DEFENSES)):
                row[column] = todays(row[column], usual, row[column.removesuffix("_options")])
            rows.append(row)
    return rows


def todays(options: Mapping[str, Any], registry: Registry, name: str) -> dict[str, Any]:
    """Return the options of a method as they would be given today."""
    if name not in registry.rows:  # the attacker's own model
        return dict(options)
    known: dict[str, Any] = made.plain(registry.load(name)().model_dump())
    return known | {option: value for option, value in options.items() if option in known or value is not None}


def _value(name: str, text: str) -> Any:  # noqa: ANN401 - JSON
    if name.endswith("_id"):
        return text  # hexadecimal digits, which may look like a number
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"": None, "True": True, "False": False}.get(text, text)


def reported(path: Path = PAPER) -> list[dict[str, Any]]:
    """Return the reported entries; an entry has what its source has, and its own values.

    Those of methods that are not in bdbench yet are left out.
    """
    entries = []
    for source in tomllib.loads(path.read_text(encoding="utf-8"))["source"]:
        common = {name: value for name, value in source.items() if name != "entries"}
        entries += [common | entry for entry in source["entries"]]
    return [entry for entry in entries if entry["defense"] in (*DEFENSES.rows, "victim")]


def measured(results: Path, suites: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per measured setting, the mean over its seeds, with its suite and variant."""
    settings: list[dict[str, Any]] = []
    seen: list[tuple[str, Any]] = []
    for suite in suites:
        # Suites share cells: one model is one row, two models of one setting are two.
        rows = [row for row in read_rows(results / f"{suite}.csv") if (key(row), row["made"]) not in seen]
        seen += [(key(row), row["made"]) for row in rows]
        for variant in dict.fromkeys(row["variant"] for row in rows):
            merged = over_seeds([row for row in rows if row["variant"] == variant])
            settings += [row | {"suite": suite, "variant": variant} for row in merged]
    return settings


def comparable(entry: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings of the same data, attack and defense; a variant counts only where the source had it."""
    names = ("dataset", "attack", "defense")
    variants = ("", entry.get("variant", ""))
    return [row for row in settings if row["variant"] in variants and all(row[name] == entry[name] for name in names)]


def distance(entry: Mapping[str, Any], setting: Mapping[str, Any]) -> tuple[Any, ...]:
    """Say how far a measured setting is from the reported one: model, rate, target, budget, variant; never results.

    Rates are as far from each other as their ratio is from 1. The preset that an entry names is the nearest.
    """
    options = setting["attack_options"]
    return (
        setting["model"] != entry["model"],
        abs(math.log(options["rate"] / entry["rate"])) if options["rate"] else math.inf,
        options["target"] != entry["target"],
        setting["preset"] != entry.get("preset", setting["preset"]),
        PRESETS.index(setting["preset"]) if setting["preset"] in PRESETS else len(PRESETS),
        setting["variant"] != entry.get("variant", ""),
    )


def agrees(entry: Mapping[str, Any], setting: Mapping[str, Any]) -> bool:
    """Say whether a difference means something: model, rate, target and budget are the reported ones.

    An entry whose budget is that of a preset names it; others agree with none.
    """
    options, variant = setting["attack_options"], entry.get("variant", "")
    is_preset = setting["preset"] == entry.get("preset") and (variant or "c" not in setting["marks"])
    is_attack = all(options[name] == entry[name] for name in ("rate", "target"))
    return bool(setting["model"] == entry["model"] and is_attack and is_preset and setting["variant"] == variant)


def ba_column(entry: dict[str, Any]) -> str:
    """Return the measured column over the same images as the reported BA."""
    return {"all": "ba", "non-target": "ba_non_target"}[entry["ba_over"]]


def line(entry: dict[str, Any], setting: dict[str, Any], count: int) -> list[str]:
    """Return the cells of one line of the table; `count` settings were comparable."""
    seeds = setting["seeds"]
    budget = f"{setting['preset']} {setting['variant']}".strip()
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    nearest = f"; nearest of {count}" if count > 1 else ""
    options = setting["defense_options"]
    if "oracle_target" in options:
        told = "inferred" if options["oracle_target"] is None else "told"
        budget += f", the target {told}, form {options['form']}"
    cells = [
        f"[{entry['title']}]({entry['url']})",
        f"{entry['attack']} ({entry['trigger']})",
        entry["defense"],
        f"{_setting(entry, entry['model'])}, {entry['budget']}",
        f"{_setting(setting['attack_options'], setting['model'])}, {budget}, {which} (`{setting['suite']}`{nearest})",
        entry["ba_over"],
    ]
    for said, found in ((entry["ba"], setting[ba_column(entry)]), (entry["asr"], setting["asr"])):
        cells += [f"{100 * said:.1f}", "" if found is None else f"{100 * found:.1f}"]
        # Adding 0.0 takes the sign from a difference that rounds to none.
        is_told = found is not None and agrees(entry, setting)
        cells.append(f"{round(100 * (found - said), 1) + 0.0:+.1f}" if is_told else "")
    return cells


def _setting(options: dict[str, Any], model: str) -> str:
    return f"{model}, rate {options['rate']}, target {options['target']}"


def markdown(entries: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> str:
    """Return the table of all entries with a comparable measured row, the list of those without, and their notes."""
    notes: list[str] = list(dict.fromkeys(entry["note"] for entry in entries if "note" in entry))
    lines, missing = [], []
    for entry in entries:
        mark = f" [{notes.index(entry['note']) + 1}]" if "note" in entry else ""
        found = comparable(entry, settings)
        least = min((distance(entry, row) for row in found), default=None)
        for row in found:
            if distance(entry, row) == least:
                name, *cells = line(entry, row, len(found))
                lines.append([name + mark, *cells])
        if not found:
            missing.append(
                f"- {entry['title']}{mark}: {entry['attack']} ({entry['trigger']}), {entry['defense']}, "
                f"{_setting(entry, entry['model'])}: BA {100 * entry['ba']:.1f} ({entry['ba_over']}), "
                f"ASR {100 * entry['asr']:.1f}"
            )
    parts = []
    if lines:
        parts.append(table(HEADINGS, lines, FIRST_NUMBER))
    if missing:
        parts.append("\n".join(["Reported, with no comparable measured row yet:", "", *missing]))
    if notes:
        parts.append("\n".join(f"[{number}] {note}  " for number, note in enumerate(notes, 1)).rstrip())
    return "\n\n".join(parts)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], first_number: int) -> str:
    """Return a Markdown table; columns from `first_number` on are set to the right."""
    rule = "|".join("---:" if place >= first_number else "---" for place in range(len(headings)))
    shown = ["| " + " | ".join(cells) + " |" for cells in (headings, *lines)]
    return "\n".join([shown[0], f"|{rule}|", *shown[1:]])


def fill(text: str, name: str, content: str) -> str:
    """Return a text with new content between the markers of a name.

    Raises:
        ValueError: the text lacks them.
    """
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise ValueError(f"no lines <!-- {name} --> and <!-- /{name} --> around the place of the table")
    return f"{before}{begin}{content}\n{end}{after}"


def compare(results: Path, suites: Sequence[str], page: Path = PAGE) -> int:
    """Write the comparison between the markers of its page; return the exit code."""
    settings = measured(results, suites)
    try:
        text = fill(page.read_text(encoding="utf-8"), MARKER, markdown(reported(), settings))
    except ValueError as error:
        print(f"{page}: {error}")
        return 1
    with files.replace_file(page) as path:
        path.write_text(text, encoding="utf-8")
    print(f"wrote {page}: {len(settings)} measured settings of {', '.join(suites)}")
    return 0
