"""Rows -> cells (one for all seeds of a setting) -> a matrix of attacks and defenses per dataset and model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdbench.registry import ATTACKS, DEFENSES, Registry
from bdbench.reports import results

COMPARED = ("asr", "ba", "lift")
"""What a matrix can show; lift is ASR minus floor."""

SUMMARISED = ("ba", "asr", "lift", "der", "auroc")
DEFENSE_ORDER = (*results.UNDEFENDED, "clean", "oracle")


@dataclass(frozen=True)
class Cell:
    """All runs of one setting.

    Attributes:
        dataset, model: of which matrix it is part.
        attack, defense: as rows and columns call them, with what tells them apart.
        preset: budget of the defense.
        method: registered name of the defense.
        runs: places of its rows among all rows.
        seeds: of the runs.
        failed: runs whose attack failed; unknown: runs without an undefended row to tell, or without any known attack.
        unpoisoned: whether nothing was poisoned, on purpose.
        marks: see `tables.MARKS`.
        values: of every metric the mean, and under `<metric>_sd` and `<metric>_half` the spread, as in `tables`.
    """

    dataset: str
    model: str
    attack: str
    defense: str
    preset: str
    method: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]
    failed: int
    unknown: int
    unpoisoned: bool
    marks: str
    values: dict[str, float | None]

    @property
    def counts(self) -> bool:
        """Whether it may be averaged with other attacks: its attack is known to have worked in every run."""
        return not self.failed and not self.unknown and not self.unpoisoned

    @property
    def is_reference(self) -> bool:
        """Whether its defense reads the truth."""
        return "r" in self.marks

    @property
    def notes(self) -> list[str]:
        """What has to be said beside its numbers, in a few words."""
        notes = []
        if self.failed:
            notes.append("attack failed" if self.failed == len(self.runs) else f"{self.failed}/{len(self.runs)} failed")
        if self.unknown:
            notes.append("attack unproven")
        if self.unpoisoned:
            notes.append("nothing poisoned")
        return notes


@dataclass(frozen=True)
class Summary:
    """One defense over the attacks of a matrix.

    Attributes:
        defense: name of the column.
        counted: attacks in the means.
        left_out: attacks that are not, by reason.
        values: of every metric the mean over the attacks that count, and under `<metric>_sd` the spread; seconds and
            peak memory are means over all attacks.
    """

    defense: str
    counted: int
    left_out: dict[str, int]
    values: dict[str, float | None]


@dataclass(frozen=True)
class Matrix:
    """Attacks x defenses on one dataset and model; `cells` maps (attack, defense) to the place of a cell."""

    dataset: str
    model: str
    attacks: tuple[str, ...]
    defenses: tuple[str, ...]
    references: frozenset[str]
    cells: dict[tuple[str, str], int]
    summaries: tuple[Summary, ...]
    lowest_ba: float

    def shade(self, metric: str, value: float | None) -> float:
        """Return how strongly a cell of this value is coloured, in [0, 1]; BA is spread from the lowest one up."""
        if value is None:
            return 0.0
        low = self.lowest_ba if metric == "ba" else 0.0
        return round(min(1.0, max(0.0, (value - low) / (1 - low))), 3)


def cells_of(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Return a cell per setting, in the order of registries.

    Args:
        rows: from `results.read_rows`.
    """
    place = {id(row): index for index, row in enumerate(rows)}
    merged, groups = results.merge(rows), results.by_setting(rows)
    several = Counter((row["dataset"], row["model"], row["attack"], row["defense"]) for row in merged)
    twice = {(dataset, model, defense) for (dataset, model, _, defense), count in several.items() if count > 1}
    cells = []
    for row, group in zip(merged, groups, strict=True):
        names = ("ba", "asr", "floor", "ra", "target_recall", "der", "auroc", "seconds", "peak_memory_bytes")
        values = {f"{name}{part}": row[f"{name}{part}"] for name in names for part in ("", "_sd", "_half")}
        values |= results.mean_and_spread("lift", [_lift(run) for run in group])
        told_twice = (row["dataset"], row["model"], row["defense"]) in twice
        cells.append(
            Cell(
                dataset=row["dataset"],
                model=row["model"],
                attack=row["attack"],
                defense=f"{row['defense']} ({row['preset']})" if told_twice else row["defense"],
                preset=row["preset"],
                method=group[0]["defense"],
                runs=tuple(place[id(run)] for run in group),
                seeds=tuple(run["seed"] for run in group),
                failed=sum("w" in run["marks"] for run in group),
                unknown=sum("?" in run["marks"] or "n" in run["marks"] for run in group),
                unpoisoned=any("0" in run["marks"] for run in group),
                marks=row["marks"],
                values=values,
            )
        )
    return sorted(cells, key=_order)


def _lift(row: dict[str, Any]) -> float | None:
    return None if row["asr"] is None or row["floor"] is None else row["asr"] - row["floor"]


def _order(cell: Cell) -> tuple[Any, ...]:
    attack = cell.attack.split(" ")[0]
    defense = DEFENSE_ORDER.index(cell.method) if cell.method in DEFENSE_ORDER else len(DEFENSE_ORDER)
    return (
        cell.dataset, cell.model, _rank(ATTACKS, attack), cell.attack, defense, _rank(DEFENSES, cell.method),
        cell.defense,
    )  # fmt: skip


def _rank(registry: Registry, name: str) -> int:
    names = registry.names()
    return names.index(name) if name in names else len(names)


def matrices_of(cells: Sequence[Cell]) -> list[Matrix]:
    """Return a matrix per dataset and model of cells in the order of `cells_of`."""
    places: dict[tuple[str, str], list[int]] = {}
    for place, cell in enumerate(cells):
        places.setdefault((cell.dataset, cell.model), []).append(place)
    return [_matrix(cells, own) for own in places.values()]


def _matrix(cells: Sequence[Cell], places: list[int]) -> Matrix:
    own = [cells[place] for place in places]
    ordered = sorted(own, key=lambda cell: _order(cell)[4:])
    defenses = tuple(dict.fromkeys(cell.defense for cell in ordered))
    lowest = min((cell.values["ba"] for cell in own if cell.values["ba"] is not None), default=0.0)
    return Matrix(
        dataset=own[0].dataset,
        model=own[0].model,
        attacks=tuple(dict.fromkeys(cell.attack for cell in own)),
        defenses=defenses,
        references=frozenset(cell.defense for cell in own if cell.is_reference),
        cells={(cells[place].attack, cells[place].defense): place for place in places},
        summaries=tuple(summarise([cell for cell in own if cell.defense == defense]) for defense in defenses),
        lowest_ba=min(0.9, math.floor(lowest * 10) / 10),
    )


def summarise(cells: Sequence[Cell]) -> Summary:
    """Return one defense over its attacks; attacks that failed or whose strength is unknown are counted, not averaged.

    Args:
        cells: of one defense, one an attack.
    """
    counted = [cell for cell in cells if cell.counts]
    values: dict[str, float | None] = {}
    for name in SUMMARISED:
        values |= results.mean_and_spread(name, [cell.values[name] for cell in counted])
    for name in ("seconds", "peak_memory_bytes"):
        values |= results.mean_and_spread(name, [cell.values[name] for cell in cells])
    left_out = {
        "failed": sum(bool(cell.failed) for cell in cells),
        "unproven": sum(bool(cell.unknown and not cell.failed) for cell in cells),
        "without poison": sum(cell.unpoisoned for cell in cells),
    }
    return Summary(cells[0].defense, len(counted), {why: count for why, count in left_out.items() if count}, values)
