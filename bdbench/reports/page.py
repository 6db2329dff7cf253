"""Evaluations under folders -> one page, self-contained: numbers, charts and code in a single file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

import bdbench
from bdbench.errors import ArtifactError
from bdbench.files import written_file
from bdbench.protocol.metric_list import METRICS
from bdbench.reports import charts, results, tables
from bdbench.reports.matrices import COMPARED, Cell, cells_of, matrices_of
from bdbench.reports.ranking import rank
from bdbench.reports.runs import FALSE_POSITIVE, Picture, Shelf, describe_runs, trigger_gallery

METRIC_NAMES = {"asr": "ASR", "ba": "BA", "lift": "ASR − floor"}


class Written(NamedTuple):
    """What a report covers: evaluations, cells (all seeds of a setting), and the bytes of the page."""

    evaluations: int
    cells: int
    bytes: int


def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Write the report over all evaluations at or under folders.

    Raises:
        ArtifactError: no evaluation is there, or `out` cannot be written.
    """
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder; give a file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent} is not a folder; make it, or choose another --out")
    rows = results.read_rows(folders)
    # A folder that is an evaluation itself has its model and dataset beside it.
    around = {Path(row["path"]).parent for row in rows if Path(row["path"]) in folders}
    cells = cells_of(rows)
    text = render(rows, cells, Shelf.of([*around, *folders]), ", ".join(folder.resolve().name for folder in folders))
    with written_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Written(len(rows), len(cells), len(text.encode()))


def render(rows: Sequence[dict[str, Any]], cells: Sequence[Cell], shelf: Shelf, place: str = "") -> str:
    """Return the page.

    Args:
        rows: from `results.read_rows`.
        cells: from `cells_of`.
        shelf: where datasets and models are found.
        place: name of the folder or folders, for the title.
    """
    matrices = matrices_of(cells)
    ranking = rank(results.merge(rows))
    pictures, missing_pictures = trigger_gallery(_one_data_set_each(rows, cells), shelf)
    defenses = list(dict.fromkeys(defense for matrix in matrices for defense in matrix.defenses))
    data = {
        "rows": rows,
        "cells": [_cell_record(cell) for cell in cells],
        "runs": describe_runs(rows, shelf),
        "fpr": FALSE_POSITIVE,
        "marks": tables.MARKS,
        "charts": charts.specifications(defenses),
    }
    environment = Environment(
        loader=PackageLoader("bdbench.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"rate": rate, "spread": spread}
    return environment.get_template("report.html.j2").render(
        data=script_json(data),
        library=charts.library(),
        style=_source(environment, "report.css"),
        script=_source(environment, "report.js"),
        matrices=matrices,
        sizes=[
            _image_size([rows[run] for place in it.cells.values() for run in cells[place].runs], shelf)
            for it in matrices
        ],
        title=f"{place}: backdoor attacks and defenses" if place else "Backdoor attacks and defenses",
        cells=cells,
        rows=rows,
        ranking=ranking,
        ranking_notes=tables.ranking_notes(ranking),
        pictures=_by_source(pictures),
        missing_pictures=missing_pictures,
        metrics={name: METRIC_NAMES[name] for name in COMPARED},
        marks={mark: text for mark, text in tables.MARKS.items() if any(mark in cell.marks for cell in cells)},
        seeds=sorted({row["seed"] for row in rows}),
        measured=[
            METRICS[name]
            for name in tables.USUAL
            if METRICS[name].kind != "cost" and any(row[name] is not None for row in rows)
        ],
        scored=any(row["auroc"] is not None for row in rows),
        version=bdbench.__version__,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def script_json(value: object) -> str:
    """Return JSON that cannot end the <script> it is put in."""
    text = json.dumps(finite(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: object) -> object:
    """Return JSON values with null for nan and infinity, which browsers do not read."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rate(value: float | None) -> str:
    """Return a share with three digits, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def spread(value: float | None) -> str:
    """Return a standard deviation with its sign, or nothing."""
    return "" if value is None else f"± {value:.3f}"


def _cell_record(cell: Cell) -> dict[str, Any]:
    mean = {key: value for key, value in cell.values.items() if value is not None}
    own = {key: value for key, value in vars(cell).items() if key != "values"}
    return own | mean | {"weak": not cell.counts, "note": ", ".join(cell.notes)}


def _image_size(rows: Sequence[dict[str, Any]], shelf: Shelf) -> str:
    """Return height, width and kind of the images of rows, or nothing where neither their data nor models are here."""
    for row in rows:
        found = shelf.datasets.get(row["dataset_id"]) or shelf.models.get(row["model_id"])
        if found is not None:
            channels, height, width = found.manifest.facts["image_shape"]
            return f"{height}×{width} {'gray' if channels == 1 else 'colour'}"
    return ""


def _one_data_set_each(rows: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """Return one dataset of every source and attack, by id: that of the lowest seed."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        for row in (rows[place] for place in cell.runs):
            known = chosen.setdefault((cell.dataset, cell.attack), row)
            if row["attack_seed"] < known["attack_seed"]:
                chosen[cell.dataset, cell.attack] = row
    return {row["dataset_id"]: names for names, row in chosen.items()}


def _by_source(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    grouped: dict[str, list[Picture]] = {}
    for picture in pictures:
        grouped.setdefault(picture.dataset, []).append(picture)
    return grouped
