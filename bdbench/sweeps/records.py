"""What a sweep keeps of its cells: records, logs, locks, in DIR/.sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bdbench import files
from bdbench.artifacts.finding import SWEEP
from bdbench.files import cannot_write
from bdbench.reading import read_json

TOLD = ("name", "cell", "asked")
"""What a record has from the order."""

PLACES = ("data_root", "download")
"""Options of a dataset that say where its images lie, not which they are."""


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & {"/", "\\", "\0"}


FORM: Mapping[str, Callable[[object], bool]] = {
    "name": _is_name, "cell": _is_table, "asked": _is_table, "state": _is_text, "seconds": _is_count, "pid": _is_count,
    "host": _is_text, "started": _is_count, "phase": _is_text, "unit": _is_text, "total": _is_count, "done": _is_count,
    "status": _is_text, "reason": _is_text, "full": _is_text, "evaluation": _is_name,
}  # fmt: skip
"""What may stand in a record, and what it is."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "running": (), "interrupted": (), "failed": ("reason",), "done": ("evaluation",),
}  # fmt: skip
"""States, and what a record of each needs besides `TOLD` and its seconds."""


def without_places(asked: object) -> object:
    """Return what was asked of a cell but for where its images lie: elsewhere the same ones are the same question."""
    if not isinstance(asked, dict):
        return asked
    return {name: without_places(part) for name, part in asked.items() if name not in PLACES}


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
    if not isinstance(names, list) or not all(map(_is_name, names)):
        return []
    return sorted(set(names) - set(begun))


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a cell, empty if there is none; a damaged one, or one of another form, is none: its cell is
    looked at again.
    """
    path = folder / SWEEP / "cells" / f"{name}.json"
    try:
        found: Any = read_json(path) if path.is_file() else None
    except (OSError, ValueError):
        return {}
    return found if _is_record(found) and found["name"] == name else {}


def _is_record(found: object) -> bool:
    if not isinstance(found, dict) or not {*TOLD, "state", "seconds"} <= found.keys():
        return False
    if not all(FORM[key](value) for key, value in found.items() if key in FORM):
        return False
    needed = NEEDED.get(found["state"])
    return needed is not None and {*needed, *(["done"] if "total" in found else [])} <= found.keys()


def is_locked(folder: Path, name: str) -> bool:
    """Say whether a worker is making a cell."""
    return files.is_locked(sweep_file(folder, "locks", f"{name}.lock"))
