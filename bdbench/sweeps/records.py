"""What a sweep keeps of its cells: records, logs, locks, in DIR/.sweep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bdbench import files
from bdbench.artifacts.finding import SWEEP
from bdbench.files import cannot_write
from bdbench.reading import read_json

TOLD = ("name", "cell", "asked")
"""What a record has from the order."""


def sweep_file(folder: Path, kind: str, name: str) -> Path:
    """Return the path of a file that a sweep keeps of a cell, in a folder that exists.

    Args:
        folder: of the sweep.
        kind: cells, logs, locks, checks or grid.
        name: of the file.

    Raises:
        ArtifactError: no permission, or no space.
    """
    place = folder / SWEEP / kind
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(place, error) from error
    return place / name


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records under a sweep's folder, by the name of the cell; one that says running without a worker is
    said to be interrupted.
    """
    records = {}
    for path in sorted((folder / SWEEP / "cells").glob("[!.]*.json")):
        record = read_record(folder, path.stem)
        if not record:
            continue
        if record["state"] == "running" and not is_locked(folder, record["name"]):
            record["state"] = "interrupted"
        records[record["name"]] = record
    return records


def sweeps_under(root: Path) -> list[Path]:
    """Return the folders of all sweeps under a folder, the one that was last worked on last."""
    found = [place for place in root.glob(f"**/{SWEEP}") if place.is_dir()]

    def age(place: Path) -> float:
        return max(part.stat().st_mtime for part in (place, place / "grid", place / "cells") if part.is_dir())

    return [place.parent for place in sorted(found, key=age)]


def read_waiting(folder: Path, begun: Iterable[str]) -> list[str]:
    """Return the cells of the grid that was last made in a folder, but for those of which there is a record."""
    try:
        names = read_json(folder / SWEEP / "grid" / "names.json")
    except (OSError, ValueError):
        return []
    return sorted({str(name) for name in names} - set(begun))


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a cell, empty if there is none; a damaged one is none: its cell is looked at again."""
    path = folder / SWEEP / "cells" / f"{name}.json"
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if set(TOLD) <= found.keys() else {}


def is_locked(folder: Path, name: str) -> bool:
    """Say whether a worker is making a cell."""
    return files.is_locked(sweep_file(folder, "locks", f"{name}.lock"))
