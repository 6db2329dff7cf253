"""What an artifact says of itself: what was asked, the hash of it, the hashes of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bdbench.errors import ArtifactError, DamagedError
from bdbench.files import file_sha256
from bdbench.reading import read_json

SCHEMA = 1
MANIFEST = "manifest.json"
AGAIN = "make the artifact again with --force"
"""What mends a damaged artifact."""

Kind = Literal["dataset", "model", "scan", "evaluation"]


@dataclass(frozen=True)
class Ask:
    """What was asked for; its hash is the artifact's id.

    Attributes:
        kind: of artifact.
        method: attack, defense or detector, or "evaluate".
        version: of the method; raised when what its defaults give changes.
        config: every setting with its value, defaults included, as JSON values.
        seed: the user's.
        inputs: what it was made from: name -> id or fingerprint.
    """

    kind: Kind
    method: str
    version: int
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, str]

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the ask and the schema: equal id, same question."""
        text = json.dumps({"schema": SCHEMA, **vars(self)}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        id: see `Ask.id`.
        ask: what was asked.
        files: name -> {"sha256", "bytes"} of every other file.
        facts: what a reader needs to use the files, such as shapes and class names.
        made: how it was made: versions, device, precision, seconds, peak memory, time.
        seal: SHA-256 of files, facts and made.
    """

    id: str
    ask: Ask
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    made: Mapping[str, Any]
    schema: int = SCHEMA
    seal: str = ""

    @property
    def expected_seal(self) -> str:
        """What `seal` must be."""
        said = json.dumps([self.files, self.facts, self.made], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def is_artifact(path: Path) -> bool:
    """Say whether a folder has a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: Kind | None = None) -> Manifest:
    """Read the manifest of an artifact, of `kind` if that is given, without looking at its files.

    Raises:
        ArtifactError: no artifact, unreadable manifest, another kind, a newer schema, an id that does not belong
            to what was asked, or other facts than were written.
    """
    from bdbench.artifacts.manifest_forms import misfit  # pydantic: not for the help

    file = path / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    if path.is_file():
        raise ArtifactError(
            f"{path} is a file; an artifact is a folder. bdbench opens no pickles (.pt, .pth, .pkl): they can run code"
        )
    if not file.is_file():
        raise ArtifactError(f"{path} is not an artifact of bdbench: it has no {MANIFEST}")
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise DamagedError(path, f"{file} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(f"{path} has schema {schema}, this bdbench reads {SCHEMA}; upgrade bdbench")
    if wrong := misfit(raw):
        raise DamagedError(path, f"{file} is damaged ({wrong}); {AGAIN}")
    if schema != SCHEMA:
        raise DamagedError(path, f"{path} has schema {schema}, this bdbench reads {SCHEMA}; {AGAIN}")
    manifest = Manifest(**{**raw, "ask": Ask(**raw["ask"])})
    if manifest.id != manifest.ask.id:
        raise DamagedError(path, f"{file} was changed: its id does not belong to what it says was asked; {AGAIN}")
    if manifest.seal != manifest.expected_seal:
        raise DamagedError(path, f"{file} was changed: it does not say any more what was written; {AGAIN}")
    if kind is not None and manifest.ask.kind != kind:
        raise ArtifactError(f"{path} is a {manifest.ask.kind} artifact; a {kind} artifact is needed here")
    return manifest


def checked_file(path: Path, manifest: Manifest, name: str) -> Path:
    """Return a file of an artifact after comparing its size and hash with the manifest.

    Raises:
        ArtifactError: the file is missing, cut short or changed.
    """
    file = path / name
    said = manifest.files.get(name)
    if said is None:
        raise DamagedError(path, f"{path} has no {name}; {AGAIN}")
    if not file.is_file():
        raise DamagedError(path, f"{file} is missing; {AGAIN}")
    size = file.stat().st_size
    if size != said["bytes"]:
        raise DamagedError(path, f"{file} has {size} bytes, its manifest says {said['bytes']}; {AGAIN}")
    if file_sha256(file) != said["sha256"]:
        raise DamagedError(path, f"{file} was changed: its SHA-256 is not the manifest's; {AGAIN}")
    return file
