"""Files on disk: replaced by one rename, hashed, flushed, locked. Knows no artifact."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bdbench.errors import ArtifactError

PLACE_ERRORS = frozenset({errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR, errno.EROFS})
"""What another place, or room, mends."""


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
    """Give a temporary path beside `path`; what is written there replaces `path` by one rename at the end."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
