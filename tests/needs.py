"""What a defense needs beside a dataset: the model that it repairs, the scan that it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.registry import DEFENSES


def needs_of(name: str, data: DatasetArtifact, folder: Path, **settings: Any) -> dict[str, Path]:
    """Make what a defense needs, once in a folder, and return it as arguments of `stages.defend`."""
    cls, found = DEFENSES.load(name), {}
    if not (cls.needs_suspect or cls.needs_scan):
        return {}
    place = folder / f"{data.path.name}-suspect"
    suspect = stages.defend(data.path, "none", preset="tiny", options={"epochs": 1}, out=place, **settings).path
    if cls.needs_suspect:
        found["suspect"] = suspect
    if cls.needs_scan:
        place = folder / f"{data.path.name}-scan"
        scan = stages.scan(data.path, "spectral", decide="budget:0.1", suspect=suspect, out=place, **settings)
        found["without"] = scan.path
    return found
