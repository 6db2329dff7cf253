"""Checkpoints of unfinished phases: one safetensors file a phase, replaced by one rename, no pickle.

A file carries its key and a checksum of its tensors. One that is damaged, of another key or of other objects counts as
not there, with a note: a number that nobody computed is never taken for a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdbench import files


class Point(NamedTuple):
    """How far a phase is."""

    step: int
    stopped: bool
    rows: list[dict[str, float | int | str]]


def save(folder: Path, key: str, point: Point, objects: Mapping[str, Any]) -> None:
    """Write the state of all objects (modules and optimizers) at a point of a phase, under a key of the folder."""
    tensors: dict[str, Tensor] = {}
    for name, item in objects.items():
        for part, value in _flatten(item.state_dict()).items():
            tensors[f"{name}/{part}"] = value.detach().cpu().contiguous()
    said = json.dumps(point._asdict())
    with files.replace_file(folder / f"{key}.safetensors") as path:
        save_tensors(tensors, path, {"key": key, "point": said, "sha256": _checksum(key, said, tensors)})


def remove_unfinished(folder: Path, key: str) -> None:
    """Remove what killed processes have left of `save`; the caller holds the lock of the key."""
    files.remove_unfinished(folder / f"{key}.safetensors")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: no space or no permission; safetensors itself has an error of its own kind.
    """
    try:
        path.touch()  # the file keeps the mode that the user's other files have
        mode = path.stat().st_mode
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load(folder: Path, key: str, objects: Mapping[str, Any], note: Callable[[str], None]) -> Point | None:
    """Put the saved state back into the objects, and return its point; None when there is none that can be used.

    Args:
        folder, key: as in `save`.
        objects: unchanged where the answer is None.
        note: told why a file that is there cannot be used.
    """
    path = folder / f"{key}.safetensors"
    if not path.exists():
        return None
    try:
        point, tensors = _read(path, key)
        states = {name: _unflatten(item, _own(tensors, name)) for name, item in objects.items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        note(f"{path} is damaged and made again ({str(error) or type(error).__name__})")
        return None
    before = {name: deepcopy(item.state_dict()) for name, item in objects.items()}
    try:
        for name, item in objects.items():
            item.load_state_dict(states[name])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        for name, item in objects.items():
            item.load_state_dict(before[name])
        note(f"{path} is of something else and made again ({str(error).splitlines()[0]})")
        return None
    return point


def _read(path: Path, key: str) -> tuple[Point, dict[str, Tensor]]:
    """Return what a file holds.

    Raises:
        SafetensorError, OSError, KeyError, TypeError, ValueError: it is damaged, or of another key.
    """
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if said.get("key") != key or said.get("sha256") != _checksum(key, said.get("point", ""), tensors):
        raise ValueError("its checksum is another")
    return Point(**json.loads(said["point"])), tensors


def _checksum(key: str, point: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a key, a point and tensors with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps([key, point]).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _own(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _flatten(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state; an optimizer's become `parameter/key`, its settings are not kept (recipes are)."""
    if "param_groups" not in state:
        return dict(state)
    return {
        f"{parameter}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, entry in state["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def _unflatten(item: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:  # noqa: ANN401 - a module or an optimizer
    """Return a state as `load_state_dict` takes it.

    Raises:
        ValueError: an optimizer's tensors belong to other parameters: torch itself would notice in the next step.
    """
    state: dict[str, Any] = item.state_dict()
    if "param_groups" not in state:
        return dict(tensors)
    parameters = [parameter for group in item.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        number, _, key = path.partition("/")
        if not 0 <= int(number) < len(parameters) or value.shape not in ((), parameters[int(number)].shape):
            raise ValueError(f"{path} of shape {tuple(value.shape)} belongs to no parameter")
        entries.setdefault(int(number), {})[key] = value
    return {"state": entries, "param_groups": state["param_groups"]}
