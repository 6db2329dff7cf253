"""Files on disk: replaced by one rename, hashed, flushed, locked. Knows no artifact."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from bdbench.errors import ArtifactError, OptionError

PLACE_ERRORS = frozenset({errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS})
"""What another place, or room, mends."""

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
"""Constants of the system calls that swap two names."""


def expanded(path: Path) -> Path:
    """Return a path with its ``~`` replaced.

    Raises:
        OptionError: this machine has no such user, or the user no home.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise OptionError(f"{path}: this machine has no such user; write ./{path} for a folder of that name") from None


def flush(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def cannot_write(path: Path, error: OSError) -> ArtifactError:
    """Return the error of a path that cannot be written, with the way out where another place or room mends it."""
    advice = "; choose another --out or make room" if error.errno in PLACE_ERRORS else ""
    return ArtifactError(f"cannot write {path}: {error}{advice}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there replaces `path` by one rename at the end.

    A process that is killed meanwhile leaves it; see `remove_unfinished`.
    """
    temporary = path.with_name(f"{_unfinished(path)}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of `replace_file`; the caller holds the lock under which `path` is
    written.
    """
    for left in path.parent.glob(f"{glob.escape(_unfinished(path))}.????????.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def _unfinished(path: Path) -> str:
    """Return how a file that will replace another begins: with its name, or as much of it as always fits."""
    return f".{path.name[:40]}.{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}"


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Give where to write a file that the user named, so that half of one never stands there.

    What is there already stays until the whole file takes its place; a device or a pipe is written to itself, and a
    link stays a link.

    Raises:
        ArtifactError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        try:
            yield path
        except OSError as error:
            raise cannot_write(path, error) from error
    else:
        with replace_file(path.resolve()) as temporary:
            yield temporary


def exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for at once, so that neither is ever absent; False where the system cannot."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if swap := getattr(library, "renameat2", None):  # Linux
        return bool(swap(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)
    if swap := getattr(library, "renamex_np", None):  # macOS
        return bool(swap(*names, RENAME_SWAP) == 0)
    return False


def lock_shared(file: BinaryIO) -> None:
    """Hold a file against `lock_alone` until it is closed; do nothing where the system has no such lock."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def lock_alone(file: BinaryIO) -> bool:
    """Try to hold a file that nobody else holds, until it is closed; True also where the system has no such lock."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def is_locked(lock: Path) -> bool:
    """Say whether a process holds the lock of this file."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # nobody can hold it where it cannot be made
        return False


def folder_bytes(path: Path) -> int:
    """Return the size of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
