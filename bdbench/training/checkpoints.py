"""Checkpoints of unfinished phases: one safetensors file a phase, replaced by one rename, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdbench.files import replace_file


class Point(NamedTuple):
    """How far a phase is."""

    step: int
    stopped: bool
    rows: list[dict[str, float | int | str]]


def save(folder: Path, phase: str, point: Point, objects: Mapping[str, Any]) -> None:
    """Write the state of all objects (modules and optimisers) at a point of a phase."""
    tensors: dict[str, Tensor] = {}
    for name, item in objects.items():
        for key, value in _flatten(item.state_dict()).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    with replace_file(folder / f"{phase}.safetensors") as path:
        save_tensors(tensors, path, {"point": json.dumps(point._asdict())})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: no space or no permission; safetensors itself has an error of its own kind.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load(folder: Path, phase: str, objects: Mapping[str, Any]) -> Point | None:
    """Put the saved state back into the objects; None when there is none, or none that can be read."""
    path = folder / f"{phase}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            point = Point(**json.loads(file.metadata()["point"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    for name, item in objects.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        item.load_state_dict(_unflatten(item, own))
    return point


def _flatten(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state; an optimiser's become `parameter/key`, its settings are not kept (recipes are)."""
    if "param_groups" not in state:
        return dict(state)
    return {
        f"{parameter}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, entry in state["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def _unflatten(item: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:  # noqa: ANN401 - a module or an optimiser
    state: dict[str, Any] = item.state_dict()
    if "param_groups" not in state:
        return dict(tensors)
    entries: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        parameter, _, key = path.partition("/")
        entries.setdefault(int(parameter), {})[key] = value
    return {"state": entries, "param_groups": state["param_groups"]}
