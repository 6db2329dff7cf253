"""Artifact folders: manifest, hashes, one sealing rename. Knows no tensor."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from bdbench.artifacts.manifests import MANIFEST, Ask, Manifest, is_artifact, read_manifest
from bdbench.errors import ArtifactError, BusyError, DamageWarning, OccupiedError, SourceWarning
from bdbench.files import cannot_write, exchange, file_sha256, flush, lock_alone, lock_shared

REPLACED = "replaced-"
"""How the folder of an artifact is called that its follower is about to replace, where the two cannot be exchanged."""
LEFT = re.compile(rf"lock|(draft|{REPLACED[:-1]})-[0-9a-f]{{8}}|[0-9a-f]{{16}}")
"""What `create` writes into its hidden folder: the lock, drafts, and checkpoints under the id of what was asked."""


@dataclass
class Draft:
    """An artifact that is being written.

    Attributes:
        folder: where its files go.
        work: where checkpoints go; after an interruption the same ask finds them again.
        facts, made: see `Manifest`; the writer fills them in.
    """

    folder: Path
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


@contextmanager
def create(path: Path, ask: Ask) -> Iterator[Draft]:
    """Write an artifact in a hidden sibling folder and seal it by one rename when the block ends well.

    Whatever was at `path` is replaced at that moment (callers look first: see `existing`). Killed at any time, a
    reader never sees half an artifact; leftovers go when the same path is written next.

    Raises:
        ArtifactError: another process writes this path, or there is no permission or no space.
    """
    hidden = path.parent / f".{path.name}.work"
    done = hidden.with_name(f".{path.name}.done-{uuid.uuid4().hex[:8]}")
    with contextlib.ExitStack() as ending:
        ending.callback(shutil.rmtree, done, ignore_errors=True)
        ending.enter_context(_locked(hidden, path))
        _put_back(hidden, path)
        done_before = filter(is_leftover, path.parent.glob(f".{glob.escape(path.name)}.done-*"))
        for leftover in (*hidden.glob("draft-*"), *hidden.glob(f"{REPLACED}*"), *done_before):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Draft(hidden / f"draft-{uuid.uuid4().hex[:8]}", hidden / ask.id)
        sealed = False
        try:
            draft.folder.mkdir()
            draft.work.mkdir(exist_ok=True)
            yield draft
            _seal(draft, path, ask)
            sealed = True
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                draft.work.rmdir()
            # Moved while locked: whoever begins on this path from now on has a folder of its own.
            with contextlib.suppress(OSError):
                if sealed or {file.name for file in hidden.iterdir()} <= {"lock"}:
                    hidden.rename(done)


@contextmanager
def _locked(hidden: Path, path: Path) -> Iterator[None]:
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        if any(hidden.iterdir()) and not is_leftover(hidden):
            raise ArtifactError(f"{hidden} is in the way and is not of bdbench; choose another --out, or move it")
        lock = FileLock(hidden / "lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"another process is making {path} right now; wait for it, or choose another --out") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _seal(draft: Draft, path: Path, ask: Ask) -> None:
    written = sorted(draft.folder.iterdir())
    with ThreadPoolExecutor() as pool:  # the disk writes while the CPU hashes
        flushed = [pool.submit(flush, file) for file in written]
        files = dict(zip((file.name for file in written), pool.map(_describe, written), strict=True))
        for future in flushed:
            future.result()
    manifest = Manifest(ask.id, ask, files, draft.facts, draft.made)
    manifest = replace(manifest, seal=manifest.expected_seal)
    with (draft.folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    if path.exists() and not exchange(draft.folder, path):
        path.rename(draft.folder.with_name(f"{REPLACED}{uuid.uuid4().hex[:8]}"))
    if draft.folder.exists() and not path.exists():
        draft.folder.rename(path)


def _put_back(hidden: Path, path: Path) -> None:
    """Put a whole artifact back that was taken away to be replaced, where its follower did not come to its place."""
    for replaced in hidden.glob(f"{REPLACED}*"):
        if not path.exists() and is_artifact(replaced):
            replaced.rename(path)


def is_leftover(folder: Path) -> bool:
    """Say whether a hidden folder is what `create` leaves of interrupted work: it holds nothing but what it writes."""
    return folder.is_dir() and all(LEFT.fullmatch(item.name) for item in folder.iterdir())


@contextmanager
def held(*folders: Path) -> Iterator[None]:
    """Keep artifacts from being removed by `gc` while the block reads them, where the system has such a lock.

    Raises:
        ArtifactError: one is not there any more.
    """
    with contextlib.ExitStack() as ending:
        for folder in folders:
            try:
                file = ending.enter_context((folder / MANIFEST).open("rb"))
            except OSError as error:
                raise ArtifactError(f"cannot read {folder}: {error.strerror or error}") from error
            lock_shared(file)
        yield


def is_held(folder: Path) -> bool:
    """Say whether a process reads an artifact, see `held`."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return not lock_alone(file)
    except FileNotFoundError:
        return False


def unknown_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the files of an artifact's folder that its manifest does not name: they are somebody else's."""
    return sorted({file.name for file in folder.iterdir()} - {MANIFEST, *manifest.files})


def _describe(file: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def existing(path: Path, ask: Ask, *, force: bool, facts: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Say whether the artifact that is asked for is at `path` already and need not be made.

    One that lacks a file, or has one of another size, has to be made again; it is there until then.

    Args:
        path: where it is to be.
        ask: what is asked.
        force: make it again in any case.
        facts: those of its facts that are known now: `source_options`, to say what differs, and `plugins`, whose code
            may have changed since.

    Raises:
        ArtifactError: something else is at `path`.
    """
    if not path.exists():
        return False
    if not is_artifact(path):
        raise ArtifactError(f"{path} exists and is not an artifact of bdbench; choose another --out")
    try:
        found = read_manifest(path)
    except ArtifactError:
        if force:
            return False
        raise
    if found.id == ask.id:
        lost = [name for name, said in found.files.items() if not _has_size(path / name, said["bytes"])]
        if lost and not force:
            warnings.warn(f"{path} is made again: {', '.join(lost)} missing or cut short", DamageWarning, stacklevel=2)
        if lost or force:
            _check_replaceable(path, found)
        there = not lost and not force
        if there and (changed := _changed_plugins(found.facts, facts)):
            message = (
                f"{path} is kept as it is, but was made by other code of {changed}; --force makes it again (a new "
                "`version` of the method gives it another id)"
            )
            warnings.warn(message, SourceWarning, stacklevel=2)
        return there
    if found.ask.kind != ask.kind:
        raise ArtifactError(f"{path} is a {found.ask.kind} artifact ({found.id}), no {ask.kind}; choose another --out")
    if force:
        _check_replaceable(path, found)
        return False
    raise OccupiedError(
        f"{path} is another {ask.kind} ({differences(found.ask, ask, found.facts, facts)}); give another --out, or no "
        "--out: default names say what differs. --force replaces it (in a sweep: --replace)"
    )


def _check_replaceable(path: Path, manifest: Manifest) -> None:
    """Refuse to replace a folder that holds files of somebody else."""
    if strange := unknown_files(path, manifest):
        raise ArtifactError(
            f"{path} holds files that are not of the artifact and would be lost ({', '.join(strange[:5])}); move them, "
            "or choose another --out"
        )


def _changed_plugins(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the plugins whose code is another than the one that made an artifact; what 0.1 made does not say it."""
    before = old.get("plugins", {})
    return " and ".join(
        f"{name} ({told['package']} {told['version']})"
        for name, told in new.get("plugins", {}).items()
        if name in before and before[name]["source"] != told["source"]
    )


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


NAMED = {"source": "other images", "dataset": "another dataset", "suspect": "another suspect", "files": "other files"}
"""What other hashes of an artifact's inputs mean."""


def differences(
    old: Ask,
    new: Ask,
    old_facts: Mapping[str, Any] = MappingProxyType({}),
    new_facts: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Say in words in what two asks differ, such as ``rate 0.1 -> 0.2, seed 0 -> 5``.

    Args:
        old, new: the two asks.
        old_facts, new_facts: facts of the artifacts; their `source_options` say why images are others.
    """
    parts = [
        f"{name} {getattr(old, name)} -> {getattr(new, name)}"
        for name in ("kind", "method", "version", "seed")
        if getattr(old, name) != getattr(new, name)
    ]
    chosen = _changes(old_facts.get("source_options", {}), new_facts.get("source_options", {}))
    parts += chosen + _changes(old.config, new.config)
    inputs = [key for key in sorted({*old.inputs, *new.inputs}) if old.inputs.get(key) != new.inputs.get(key)]
    parts += [NAMED.get(key, f"another {key}") for key in inputs if key != "source" or not chosen]
    return ", ".join(parts)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``name old -> new`` of every setting that differs; what is not set is ``none``."""
    return [
        " -> ".join([f"{key} {_shown(old.get(key))}", _shown(new.get(key))])
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
