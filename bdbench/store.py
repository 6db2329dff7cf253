"""Artifact folders: manifest, hashes, one sealing rename. Knows no tensor."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from bdbench.errors import ArtifactError, BusyError, DamageWarning, OccupiedError

SCHEMA = 1
MANIFEST = "manifest.json"
ROOT = Path("runs")
"""Where artifacts lie when no place is given."""
AGAIN = "make the artifact again with --force"
"""What mends a damaged artifact."""
SWEEP = ".sweep"
"""Folder of what a sweep knows of its cells: records, logs, locks."""
PLACE_ERRORS = frozenset({errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS})
"""What another place, or room, mends."""

Kind = Literal["dataset", "model", "evaluation"]


@dataclass(frozen=True)
class Ask:
    """What was asked for; its hash is the artifact's id.

    Attributes:
        kind: of artifact.
        method: attack or defence, or "evaluate".
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
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))
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
            raise _cannot_write(path, error) from error
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
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _seal(draft: Draft, path: Path, ask: Ask) -> None:
    written = sorted(draft.folder.iterdir())
    with ThreadPoolExecutor() as pool:  # the disk writes while the CPU hashes
        flushed = [pool.submit(_flush, file) for file in written]
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


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _describe(file: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    advice = "; choose another --out or make room" if error.errno in PLACE_ERRORS else ""
    return ArtifactError(f"cannot write {path}: {error}{advice}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_artifact(path: Path) -> bool:
    """Say whether a folder has a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: Kind | None = None) -> Manifest:
    """Read the manifest of an artifact, of `kind` if that is given, without looking at its files.

    Raises:
        ArtifactError: no artifact, unreadable manifest, another kind, a newer schema, an id that does not belong
            to what was asked, or other facts than were written.
    """
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
        raw = json.loads(file.read_text(encoding="utf-8"))
        schema = raw["schema"]
        if schema != SCHEMA:
            advice = "upgrade bdbench" if schema > SCHEMA else AGAIN
            raise ArtifactError(f"{path} has schema {schema}, this bdbench reads {SCHEMA}; {advice}")
        manifest = Manifest(**{**raw, "ask": Ask(**raw["ask"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{file} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    if not all(isinstance(part, dict) for part in (manifest.files, manifest.facts, manifest.made)):
        raise ArtifactError(f"{file} is damaged (files, facts and made must be tables); {AGAIN}")
    if manifest.ask.kind not in get_args(Kind) or manifest.id != manifest.ask.id:
        raise ArtifactError(f"{file} was changed: its id does not belong to what it says was asked; {AGAIN}")
    if manifest.seal != manifest.expected_seal:
        raise ArtifactError(f"{file} was changed: it does not say any more what was written; {AGAIN}")
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
        raise ArtifactError(f"{path} has no {name}")
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; {AGAIN}")
    size = file.stat().st_size
    if size != said["bytes"]:
        raise ArtifactError(f"{file} has {size} bytes, its manifest says {said['bytes']}; {AGAIN}")
    if file_sha256(file) != said["sha256"]:
        raise ArtifactError(f"{file} was changed: its SHA-256 is not the manifest's; {AGAIN}")
    return file


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
        raise _cannot_write(place, error) from error
    return place / name


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there replaces `path` by one rename at the end."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def artifacts_under(root: Path) -> list[Path]:
    """Return the folders under a folder that hold a manifest, whole or damaged; hidden ones are being written."""
    files = (file.relative_to(root) for file in root.glob(f"**/{MANIFEST}"))
    return sorted(root / file.parent for file in files if not any(part.startswith(".") for part in file.parts))


def find_artifacts(root: Path, kind: Kind | None = None, *, strict: bool = False) -> list[tuple[Path, Manifest]]:
    """List the readable artifacts under a folder, oldest first; a damaged one is passed over with a warning.

    Raises:
        ArtifactError: `strict`, and one is damaged.
    """
    found = []
    for path in artifacts_under(root):
        try:
            manifest = read_manifest(path)
            age = str(manifest.made.get("at", "")), (path / MANIFEST).stat().st_mtime_ns  # a copy has its own times
        except FileNotFoundError:  # removed meanwhile
            continue
        except ArtifactError as error:
            if strict:
                raise
            warnings.warn(f"passed over: {error}", DamageWarning, stacklevel=2)
            continue
        if kind in (None, manifest.ask.kind):
            found.append((age, path, manifest))
    return [(path, manifest) for _, path, manifest in sorted(found, key=lambda item: item[:2])]


def locate(reference: str | Path, kind: Kind | None = None, root: Path = ROOT) -> Path:
    """Return the folder of an artifact given by path or by id (at least 6 of its digits).

    Raises:
        ArtifactError: nothing is there, or several artifacts share the beginning of the id.
    """
    path = Path(reference)
    text = str(reference)
    if path.exists() or len(text) < 6 or not all(digit in "0123456789abcdef" for digit in text):
        read_manifest(path, kind)
        return path
    matches = [(place, manifest) for place, manifest in find_artifacts(root, kind) if manifest.id.startswith(text)]
    ids = {manifest.id for _, manifest in matches}
    if len(ids) > 1:
        raise ArtifactError(f"id {text} is the beginning of {len(ids)} artifacts: {', '.join(sorted(ids))}")
    if not matches:
        raise ArtifactError(
            f"{text} does not exist, and no {kind or ''} artifact under {root}/ has that id".replace("  ", " ")
        )
    return matches[-1][0]


def unneeded(root: Path, *, strict: bool = False) -> list[Path]:
    """Return the data sets under a folder that no model or evaluation was made from, and leftovers of interrupted work.

    Leftovers that another process is writing now are left out; what it reads is not known here: see `check_idle`.

    Raises:
        ArtifactError: `strict`, and an artifact is damaged: it may be what needs the others.
    """
    found = find_artifacts(root, strict=strict)
    by_id: dict[str, list[Path]] = {}
    for path, manifest in found:
        by_id.setdefault(manifest.id, []).append(path)
    manifests = dict(found)
    needed: set[Path] = set()
    waiting = [path for path, manifest in found if manifest.ask.kind != "dataset" and manifest.ask.method != "victim"]
    while waiting:
        path = waiting.pop()
        if path not in needed:
            needed.add(path)
            waiting += [
                origin for made_from in manifests[path].ask.inputs.values() for origin in by_id.get(made_from, [])
            ]
    # An attacker's own model belongs to its data set.
    needed |= {
        path
        for path, manifest in found
        if manifest.ask.method == "victim" and not needed.isdisjoint(by_id.get(manifest.ask.inputs["dataset"], []))
    }
    leftovers = [path for path in root.glob("**/.*.work") if path.is_dir() and not is_locked(path / "lock")]
    leftovers += root.glob("**/.*.done-*")
    return sorted([*(path for path, _ in found if path not in needed), *leftovers])


def check_idle(root: Path) -> None:
    """Refuse a folder in which an artifact, or a cell of a sweep, is being made: it may need any other one there.

    Raises:
        BusyError: names the lock that is held.
    """
    for lock in (*root.glob("**/.*.work/lock"), *root.glob(f"**/{SWEEP}/locks/*.lock")):
        if is_locked(lock):
            raise BusyError(
                f"something under {root} is being made right now ({lock} is held), and may need what would be removed; "
                "wait for it, or stop it"
            )


def is_locked(lock: Path) -> bool:
    """Say whether a process holds the lock of this file."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def folder_bytes(path: Path) -> int:
    """Return the size of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
