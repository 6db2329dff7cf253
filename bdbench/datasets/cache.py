"""Decoded sources in the user's cache folder: opened at once, verified, never trusted when damaged."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bdbench.data import ImageDataset, SourceData
from bdbench.datasets.splits import Splits
from bdbench.errors import DataError
from bdbench.files import expanded
from bdbench.machine import cores
from bdbench.progress import Progress, Silent

DECODER = 1
"""Number of the decoding rules: raised when the same files give other pixels, so that old copies rest."""

LOCK_SECONDS = 900
"""How long to wait for another process that decodes the same source."""


@dataclass(frozen=True)
class Plan:
    """Source files and how they become images.

    Attributes:
        name, augment: as in `SourceData`.
        root: what the user named: a file, or the folder that `files` are named from.
        files: everything that is read.
        options: what changes the result besides the files' content.
        decode: reads both splits; its messages name files relative to `root`.
        remarks: what finding the files left out or guessed, for the user.
    """

    name: str
    augment: str
    root: Path
    files: tuple[Path, ...]
    options: Mapping[str, str | int | float | None]
    decode: Callable[[Progress], Splits]
    remarks: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Return the folder for downloads and decoded sources: `BDBENCH_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("BDBENCH_CACHE")
    return expanded(Path(chosen)) if chosen else user_cache_path("bdbench")


def load_cached(plan: Plan, progress: Progress) -> SourceData:
    """Return the source of a plan, from the cache where it holds these files decoded in this way.

    Two processes that need the same source decode it once. Without a usable cache folder, or on a full disk,
    the source is decoded and a note says why it was not stored.

    Raises:
        DataError: the source cannot be read; the message names it.
    """
    key = _key(plan)
    file = cache_folder() / "decoded" / f"{plan.name}-{key[:20]}.safetensors"
    found = _read(file, key, plan, Silent())
    if found is not None:
        return found
    with _locked(file, progress) as usable:
        found = _read(file, key, plan, progress) if usable else None
        if found is not None:
            return found
        for left in file.parent.glob(f".{glob.escape(file.name)}.*") if usable else ():  # of processes that were killed
            left.unlink(missing_ok=True)
        source = _decode(plan, progress)
        if usable:
            _write(file, key, source, len(plan.remarks), progress)
    return source


def _decode(plan: Plan, progress: Progress) -> SourceData:
    try:
        found = plan.decode(progress)
        return SourceData(
            plan.name, found.train, found.test, plan.augment, (*plan.remarks, *found.remarks), tuple(found.unreadable)
        )
    except DataError as error:
        raise DataError(f"{plan.root}: {error}") from None


def _key(plan: Plan) -> str:
    """SHA-256 over the names and the content of the files, the options and the decoder's number."""
    with ThreadPoolExecutor(min(cores(), 8)) as pool:
        contents = list(pool.map(_file_digest, plan.files))
    names = [file.relative_to(plan.root).as_posix() for file in plan.files]
    asked = [
        DECODER,
        plan.name,
        plan.augment,
        sorted(plan.options.items()),
        sorted(zip(names, contents, strict=True)),
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a file: a pipe or a device has no end; give a file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _locked(file: Path, progress: Progress) -> Iterator[bool]:
    """Hold the lock of a cache file; give False where the folder cannot be used."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except (OSError, NotImplementedError) as error:
        progress.note(f"cannot use the cache folder {file.parent} ({error}); set BDBENCH_CACHE to another folder")
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read(file: Path, key: str, plan: Plan, progress: Progress) -> SourceData | None:
    """Return what a cache file holds if it is sound; say so if it is not."""
    try:
        with safe_open(file, framework="pt") as stored:
            described = stored.metadata()
            names = tuple(json.loads(described["class_names"]))
            train, test = (
                ImageDataset(stored.get_tensor(f"{split}.images"), stored.get_tensor(f"{split}.labels"), names)
                for split in ("train", "test")
            )
            remarks, unreadable = (tuple(json.loads(described.get(name, "[]"))) for name in ("remarks", "unreadable"))
        source = SourceData(plan.name, train, test, plan.augment, (*plan.remarks, *remarks), unreadable)
        if described["key"] == key and described["fingerprint"] == source.fingerprint:
            return source
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, DataError, KeyError, TypeError, ValueError):
        pass
    progress.note(f"the cached copy {file} is damaged; reading {plan.root} again")
    return None


def _write(file: Path, key: str, source: SourceData, planned: int, progress: Progress) -> None:
    """Store a source, but for its first `planned` remarks: under another name first, so none reads half of it."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    tensors = {
        f"{split}.{part}": tensor
        for split, data in (("train", source.train), ("test", source.test))
        for part, tensor in (("images", data.images), ("labels", data.labels))
    }
    described = {
        "key": key,
        "fingerprint": source.fingerprint,
        "class_names": json.dumps(source.train.class_names),
        "remarks": json.dumps(source.remarks[planned:]),
        "unreadable": json.dumps(source.unreadable),
    }
    try:
        save_file(tensors, unfinished, described)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        progress.note(f"could not store a decoded copy in {file.parent} ({error}); the next command decodes again")
    finally:
        unfinished.unlink(missing_ok=True)
