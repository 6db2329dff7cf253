"""Where an artifact lies when no place is given: a plain name, and what differs from the defaults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdbench.artifacts import store
from bdbench.artifacts.made import plain
from bdbench.artifacts.manifests import Ask, is_artifact, read_manifest
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact
from bdbench.attacks.base import Attack
from bdbench.attacks.none import NoAttack
from bdbench.errors import ArtifactError, OptionError
from bdbench.progress import Progress
from bdbench.protocol.poisoning import TRUSTED, PerClass, trusted_config

LONGEST = 40
"""Characters that may be added to a plain name; more are replaced by four digits of their hash."""
WORD = re.compile(r"[A-Za-z0-9.+_-]{1,16}")


def place(usual: Path, ask: Ask, parts: Sequence[str], *, force: bool, progress: Progress) -> Path:
    """Return the folder of an artifact for which no place was given.

    It depends on the ask alone: the plain name for the defaults, else the plain name and what differs from them, so
    that the same command finds the same artifact again. Two cases make exceptions: an equal artifact that has the plain
    name already (as version 0.1 named all of them) is taken, and where another artifact has the name, such as one of
    other images, four digits of the ask's id are added.

    Args:
        usual: the plain name, for the defaults.
        ask: of the artifact.
        parts: what differs, from `differing`.
        force: make it again, in place of what has its name.
        progress: told where another artifact has the name.
    """
    telling = usual.with_name("-".join([usual.name, *parts]))
    numbered = telling.with_name(f"{telling.name}-{ask.id[:4]}")
    for candidate in (usual, telling, numbered):
        if _held(candidate) == ask:
            return candidate
    other = _held(telling)
    if other is None or force:
        return telling
    progress.note(f"{telling} is another {other.kind} ({store.differences(other, ask)}); this one is {numbered}")
    return numbered


def _held(path: Path) -> Ask | None:
    """Return what the artifact at a path was asked for; None if no readable one is there."""
    try:
        return read_manifest(path).ask if is_artifact(path) else None
    except ArtifactError:
        return None


def differing(values: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Return short parts of a folder name for the settings that differ from the usual ones: ``["rate0.05"]``.

    A setting that is none is left out: another one stands in its place.
    """
    changed = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
    parts = [_part(name.replace("_", "-"), value) for name, value in changed.items() if value is not None]
    if all(parts) and len("-".join(parts)) <= LONGEST:
        return parts
    return [hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:4]]


def _part(name: str, value: object) -> str:
    """Return a part of a name, such as ``rate0.05``, ``patch-white`` or ``no-clip``; "" if the value cannot be one."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if isinstance(value, int | float):
        return f"{name}{value}"
    words = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    return "-".join([name, *words]) if all(WORD.fullmatch(word) for word in words) else ""


def dataset_parts(attack: Attack | NoAttack, trusted: float | PerClass, source_options: Mapping[str, Any]) -> list[str]:
    """Return the parts of a dataset's folder name after the source's, the attack's and the seed.

    Args:
        attack: with its options.
    source = {name: value for name, value in source_options.items() if name not in ("images", "test_images")}
    values = {**trusted_config(trusted), **source, **plain(attack.model_dump())}
    """
    try:
        usual = type(attack).parse({}).model_dump()
    except OptionError:  # an option of a plugin has no default
        usual = {}
    source = {name: value for name, value in source_options.items() if name not in ("images", "test_images")}
    values = {**trusted_config(trusted), **source, **plain(attack.model_dump())}
    return differing(values, {"trusted": TRUSTED, **plain(usual)})


def scan_parts(data: Path, scanned: ScanArtifact) -> list[str]:
    """Return the parts of a model's folder name that say which scan it goes by."""
    own = scanned.path.name.removeprefix(f"{data.name}-scan-")
    return [own if own != scanned.path.name and len(own) <= LONGEST else scanned.id[:4]]


def model_parts(
    data: Path,
    *,
    preset: tuple[str, str],
    seed: tuple[int, int],
    model: tuple[str, str],
    suspect: ModelArtifact | None,
    changed: Sequence[str],
) -> list[str]:
    """Return the parts of a model's folder name after the dataset's and the method's.

    Args:
        data: folder of its dataset.
        preset, seed, model: each as it is, and as it would be by default.
        suspect: the model that is repaired.
        changed: from `differing`, of the options.
    """
    parts = [preset[0]] if preset[0] != preset[1] else []
    parts += [model[0].replace(":", ".")] if model[0] != model[1] else []
    parts += [f"s{seed[0]}"] if seed[0] != seed[1] else []
    if suspect is not None:
        name = suspect.path.name
        rest = name.removeprefix(f"{data.name}-none")
        for part in parts:
            rest = rest.replace(f"-{part}", "", 1)
        if rest:
            own = name.removeprefix(f"{data.name}-")
            parts.append(f"of-{own}" if own != name and len(own) <= LONGEST else f"of-{suspect.id[:4]}")
    return [*parts, *changed]
