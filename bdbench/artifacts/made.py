"""How an artifact was made: seconds, peak memory, versions, hardware, plugins."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

import bdbench
from bdbench.artifacts.manifests import Manifest
from bdbench.registry import Registry, plugin_sources
from bdbench.training.devices import peak_memory_bytes


def arithmetic(made: Mapping[str, Any]) -> str:
    """Say how a run computed: in which precision, and whether its networks were compiled."""
    return f"{made['precision']}, compiled" if made.get("compiled") else str(made["precision"])


class Stopwatch:
    """Measures how an artifact is made: seconds and peak memory, with versions and hardware."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def made(self, device: torch.device | None = None, *, bf16: bool = False) -> dict[str, Any]:
        """Return the `made` part of a manifest."""
        device = device or torch.device("cpu")
        return {
            "bdbench": bdbench.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if bf16 else "fp32",
            "seconds": round(time.perf_counter() - self._begun, 3),
            "peak_memory_bytes": peak_memory_bytes(device),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def plugins_of(*used: tuple[Registry, str], made_from: Iterable[Manifest] = ()) -> dict[str, Any]:
    """Return the fact `plugins` of an artifact, or nothing where no plugin took part.

    Args:
        used: registries and names, of which some may be plugins.
        made_from: manifests of artifacts whose own plugins took part too.
    """
    found = plugin_sources(*used)
    for manifest in made_from:
        found |= manifest.facts.get("plugins", {})
    return {"plugins": found} if found else {}


def plain(value: object) -> Any:  # noqa: ANN401 - JSON
    """Return a value as JSON would give it back (tuples become lists, paths text)."""
    return json.loads(json.dumps(value, default=str))
