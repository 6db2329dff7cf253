"""Artifact folders: manifest, hashes, one sealing rename. Knows no tensor."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bdbench.artifacts.manifests import MANIFEST, Ask, Manifest, is_artifact, read_manifest
from bdbench.errors import ArtifactError, BusyError, DamageWarning, OccupiedError
from bdbench.files import cannot_write, file_sha256, flush


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
        for leftover in (*hidden.glob("draft-*"), *path.parent.glob(f".{glob.escape(path.name)}.done-*")):
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
    if path.exists():
        path.rename(draft.folder.with_name(f"draft-{uuid.uuid4().hex[:8]}"))
    draft.folder.rename(path)


def _describe(file: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def existing(path: Path, ask: Ask, *, force: bool) -> bool:
    """Say whether the artifact that is asked for is at `path` already and need not be made.

    One that lacks a file, or has one of another size, has to be made again; it is there until then.

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
        return not lost and not force
    if found.ask.kind != ask.kind:
        raise ArtifactError(f"{path} is a {found.ask.kind} artifact ({found.id}), no {ask.kind}; choose another --out")
    if force:
        return False
    raise OccupiedError(
        f"{path} holds another {ask.kind} artifact ({found.id}; different: {', '.join(_differences(found.ask, ask))}); "
        "choose another --out, or replace it with --force (a sweep with --replace)"
    )


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _differences(one: Ask, other: Ask) -> Iterator[str]:
    for name in ("kind", "method", "version", "seed"):
        if getattr(one, name) != getattr(other, name):
            yield name
    for old, new in ((one.inputs, other.inputs), (one.config, other.config)):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"{key} {old.get(key)} -> {new.get(key)}"
