"""Which artifacts are under a folder, by path or id, and which of them nothing needs."""

from __future__ import annotations

import shutil
import uuid
import warnings
from pathlib import Path

from bdbench.artifacts.manifests import MANIFEST, Kind, Manifest, read_manifest
from bdbench.artifacts.store import is_held, is_leftover, unknown_files
from bdbench.errors import ArtifactError, BusyError, DamageWarning
from bdbench.files import is_locked, lock_alone

ROOT = Path("runs")
"""Where artifacts lie when no place is given."""
SWEEP = ".sweep"
"""Folder of what a sweep knows of its cells: records, logs, locks."""


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
    """Return the datasets under a folder that no model or evaluation was made from, and leftovers of interrupted work.

    Left out is what another process reads or writes now, and a folder with files that are not of its artifact.

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
    # An attacker's own model belongs to its dataset.
    needed |= {
        path
        for path, manifest in found
        if manifest.ask.method == "victim"
        and not needed.isdisjoint(by_id.get(manifest.ask.inputs.get("dataset", ""), []))
    }
    hidden = filter(is_leftover, (*root.glob("**/.*.work"), *root.glob("**/.*.done-*")))
    leftovers = [path for path in hidden if not is_locked(path / "lock")]
    unread = (path for path, manifest in found if path not in needed and not unknown_files(path, manifest))
    return sorted([*(path for path in unread if not is_held(path)), *leftovers])


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


def remove(folder: Path) -> bool:
    """Remove an artifact or a leftover that no process reads or writes; say whether it was removed.

    An artifact disappears by one rename, so that nobody meets half of it; killed after that, a leftover stays.
    """
    number = uuid.uuid4().hex[:8]
    gone = folder if is_leftover(folder) else folder.with_name(f".{folder.name}.done-{number}")
    try:
        if gone is folder:
            if is_locked(folder / "lock"):
                return False
        else:
            with (folder / MANIFEST).open("rb") as file:
                if not lock_alone(file):
                    return False
                gone.mkdir()
                folder.rename(gone / f"draft-{number}")
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
