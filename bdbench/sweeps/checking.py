"""Every option of a grid is checked before anything runs, in another process, so that this one stays small."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bdbench
from bdbench import files
from bdbench.errors import ArtifactError, OptionError
from bdbench.reading import read_json
from bdbench.registry import all_plugins
from bdbench.sweeps import records
from bdbench.sweeps.grid import Cell, Grid, Named, line_of
from bdbench.sweeps.jobs import start_worker


class Checked(NamedTuple):
    """What `check` found.

    Attributes:
        suspects: labels of the defenses that mend an undefended model.
        gpus: how many are usable.
        methods: from "attack LABEL" and "defense LABEL" to a digest of version, presets and options: another digest
            means another result.
    """

    suspects: tuple[str, ...]
    gpus: int
    methods: Mapping[str, str]


def check(grid: Grid) -> Checked:
    """Check every option of a grid, in another process, so that this one stays small.

    Raises:
        OptionError: an option does not fit; the message has the file, the line and the way out.
    """
    order = {
        "kind": "check",
        "named": [[axis, label, *_checked_named(grid, axis, named)] for (axis, label), named in grid.named.items()],
        "models": sorted({cell.model for cell in grid.cells} - {"auto"}),
    }
    found = _asked(order, f"check of {grid.path}")
    lines = grid.path.read_text(encoding="utf-8").splitlines()
    for axis, label, message in found["errors"]:
        place = line_of(lines, f"{axis}.{label}") or line_of(lines, "recipe" if axis == "defense" else label)
        raise OptionError(f"{grid.path}{place}, {axis} {label}: {message}")
    return Checked(tuple(found["suspects"]), found["gpus"], found["methods"])


def expected_seconds(grid: Grid, cells: Sequence[Cell], device: str, precision: str) -> list[float | None]:
    """Return about how many seconds the trainings of cells would take, by a few steps of each, in another process.

    What attacks train, and the model that a cell mends, do not count. None where it cannot be tried.

    Raises:
        ArtifactError: the process ended with an error.
    """
    settings = [grid.settings(cell) for cell in cells]
    order = {"kind": "plan", "settings": settings, "device": device, "precision": precision}
    found: list[float | None] = _asked(order, f"estimate of {grid.path}")
    return found


def _asked(order: Mapping[str, Any], what: str) -> Any:  # noqa: ANN401 - JSON
    """Return what a worker answers.

    Raises:
        ArtifactError: it ended with an error.
    """
    process = start_worker(json.dumps(order), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, complaint = process.communicate()
    if process.returncode:
        raise ArtifactError(f"the {what} ended with {process.returncode}: {complaint.strip()[-400:]}")
    return json.loads(said.splitlines()[-1])


def checked_once(grid: Grid, folder: Path) -> Checked:
    """Return what `check` found for this grid, machine and releases before, or check now and keep it in the folder.

    Raises:
        OptionError: see `check`.
    """
    machine = [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    plugins = sorted(f"{plugin.target} {plugin.version} {plugin.source}" for plugin in all_plugins())
    releases = [bdbench.__version__, *plugins]
    key = hashlib.sha256("\n".join([grid.path.read_text(encoding="utf-8"), *machine, *releases]).encode()).hexdigest()
    file = records.sweep_file(folder, "checks", f"{key[:16]}.json")
    try:
        suspects, gpus, methods = read_json(file)
        return Checked(tuple(suspects), int(gpus), dict(methods))
    except (OSError, ValueError, TypeError):
        found = check(grid)
    with files.replace_file(file) as path:
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _checked_named(grid: Grid, axis: str, named: Named) -> tuple[str, dict[str, Any]]:
    if axis == "defense":
        return named.use, {**grid.recipe, "preset": grid.preset, **named.options}
    return named.use, dict(named.options)
