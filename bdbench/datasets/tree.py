"""Where an image folder keeps its splits, its classes and its files; links are followed, and told."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bdbench.errors import DataError
from bdbench.text import printable
from bdbench.wording import counted, were

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".gif"}
    | {".tif", ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".jpx"}
)

PHOTOS_NOT_READ = frozenset({".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".raw", ".svg", ".psd"})
"""Pictures that have to be saved in another format first."""

NOT_DATA = frozenset({"__MACOSX", "@eaDir", "lost+found"})
"""Folders that archives, file servers and file systems add."""

TRAIN = re.compile(r"(?:.*[\W_])?train(?:ing)?(?:set)?\d*(?:[\W_].*)?", re.IGNORECASE)
TESTS = tuple(
    re.compile(rf"(?:.*[\W_])?{name}(?:set)?\d*(?:[\W_].*)?", re.IGNORECASE)
    for name in ("test(?:ing)?", "val(?:id(?:ation)?)?", "eval(?:uation)?", "dev")
)
"""What training and test splits are called; of several test splits the first kind is taken."""

PLAIN_TRAIN = re.compile(r"train(?:ing)?", re.IGNORECASE)
"""A training folder by this name needs no test folder beside it."""


class Roots(NamedTuple):
    """The folders that hold the class folders of each split; without a test folder the first is split."""

    train: Path
    test: Path | None
    remarks: tuple[str, ...] = ()


class Listing(NamedTuple):
    """Image files of one split, class after class."""

    files: list[Path]
    labels: Tensor
    """(N,) int64."""
    ignored: list[Path]
    """Files that are not images by their suffix, and images outside the class folders."""
    followed: list[Path]
    """Links that were followed."""
    broken: list[Path]
    """Links that lead nowhere, or to a folder above them."""


class _Found(NamedTuple):
    files: list[Path]
    followed: list[Path]
    broken: list[Path]


def find_roots(path: Path) -> Roots:
    """Return the folders of the splits of an image folder.

    A split has "train", "test", "val", "eval" or "dev" in its name, in any case, alone or with more (`seg_test`), and
    holds folders; with more, there also has to be a test split of a common class, or nothing but splits. An archive
    that was unpacked into a folder of its own name is entered.

    Raises:
        DataError: there are several training folders, or only test folders.
    """
    path, remarks = _entered(path)
    holding = {folder.name: folder for folder in folders(path) if any(folders(folder))}
    training = [name for name in holding if TRAIN.fullmatch(name)]
    tests = [name for wanted in TESTS for name in holding if wanted.fullmatch(name) and name not in training]
    chosen = [name for name in training if PLAIN_TRAIN.fullmatch(name)]
    if not chosen:
        only_splits = set(holding) == {*training, *tests}
        chosen = [
            name
            for name in training
            if only_splits or any(_share_a_class(holding[name], holding[test]) for test in tests)
        ]
    if len(chosen) > 1:
        raise DataError(
            f"{path}: several folders may be the training split ({', '.join(chosen)}); keep one of them there"
        )
    if not chosen:
        if len(tests) > 1 and len(tests) == len(holding):
            raise DataError(f"{path}: holds {' and '.join(tests)} but no training split; name it train")
        return Roots(path, None, remarks)
    tests = [name for name in tests if any(folders(_entered(holding[name])[0]))]
    names = [chosen[0], *tests[:1]]
    others = sorted(folder.name for folder in folders(path) if folder.name not in names)
    if others:
        remarks += (f"beside {' and '.join(names)}, {were(len(others), 'folder')} left out: {_some(others)}",)
    remarks += _remarks_on_broken(_scan(path, deep=False).broken, path)
    train, more = _entered(holding[chosen[0]])
    remarks += more
    if not tests:
        return Roots(train, None, remarks)
    test, more = _entered(holding[tests[0]])
    said = () if (chosen[0], tests[0]) == ("train", "test") else (f"splits: {chosen[0]} to train, {tests[0]} to test",)
    return Roots(train, test, (*said, *remarks, *more))


def _entered(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the only folder in a folder, where that has the same name or holds splits, and say so."""
    inside = list(folders(path))
    if len(inside) != 1:
        return path, ()
    has_splits = any(TRAIN.fullmatch(folder.name) and any(folders(folder)) for folder in folders(inside[0]))
    if inside[0].name.casefold() != path.name.casefold() and not has_splits:
        return path, ()
    return inside[0], (f"the images lie in {path.name}/{inside[0].name}",)


def _share_a_class(one: Path, other: Path) -> bool:
    first, second = (_names_in(_entered(root)[0]) for root in (one, other))
    return bool(first & second)


def _names_in(root: Path) -> set[str]:
    """Return the names of the folders in a folder, in one case and one Unicode form."""
    return {unicodedata.normalize("NFC", folder.name).casefold() for folder in folders(root)}


def class_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the classes by their names, in the order of their labels; names are in Unicode's NFC.

    Raises:
        DataError: there is none, two have one name, or they look like splits or versions of one set.
    """
    found = list(folders(root))
    if not found:
        raise DataError(f"{root}: holds no class folders; put the images of each class into a folder of their own")
    named: dict[str, Path] = {}
    for folder in found:
        other = named.setdefault(printable(unicodedata.normalize("NFC", folder.name)), folder)
        if other != folder:
            raise DataError(f"{root}: two folders are called {folder.name}, in other Unicode forms; rename one of them")
    _check_nesting(root, named)
    if all(name.isdecimal() for name in named):
        return dict(sorted(named.items(), key=lambda item: (int(item[0]), item[0])))
    return dict(sorted(named.items()))


def _check_nesting(root: Path, classes: Mapping[str, Path]) -> None:
    """Refuse folders whose own folders look like the classes."""
    inside = {name: _names_in(path) for name, path in classes.items()}
    first, *others = inside.items()
    if not others and len(first[1]) > 1:
        raise DataError(f"{root}: holds one folder, {first[0]}; if the classes are in it, name {root / first[0]}")
    if others and len(first[1]) > 1 and all(names == first[1] for _, names in others):
        raise DataError(
            f"{root}: all its folders ({_some(list(inside))}) hold the same folders ({_some(sorted(first[1]))}); which "
            f"are the classes? Name a folder that holds class folders, such as {root / first[0]}, or rename two of the "
            "outer ones to train and test; if the outer ones are the classes, put their images into them directly"
        )
    for name, names in inside.items():
        again = sorted(names & {other.casefold() for other in inside if other != name})
        if len(again) > 1:
            raise DataError(
                f"{root / name}: holds folders named as those beside it ({_some(again)}): was an archive unpacked "
                "into itself? Move it away, or name it"
            )


def list_images(root: Path, classes: Mapping[str, Path]) -> Listing:
    """List the images of class folders, folders inside them included; links are followed.

    Args:
        root: the folder above.
        classes: from `class_folders`.

    Raises:
        DataError: a class has no images, or a folder cannot be read.
    """
    beside = _scan(root, deep=False)
    listing = Listing([], torch.empty(0, dtype=torch.int64), [], [], list(beside.broken))
    listing.ignored.extend(file for file in beside.files if _is_image(file))
    listing.followed.extend(folder for folder in classes.values() if folder.is_symlink())
    counts = []
    for folder in classes.values():
        found = _scan(folder)
        images = [file for file in found.files if _is_image(file)]
        if not images:
            raise DataError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); add some or remove it")
        listing.files.extend(images)
        listing.ignored.extend(file for file in found.files if not _is_image(file))
        listing.followed.extend(found.followed)
        listing.broken.extend(found.broken)
        counts.append(len(images))
    return listing._replace(labels=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))


def remarks_on_files(root: Path, listings: Sequence[Listing]) -> tuple[str, ...]:
    """Return what a user should know of the files, one line each: left out, or found through links."""
    remarks = []
    ignored = [file for listing in listings for file in listing.ignored]
    kinds = Counter(file.suffix.lower() or "without a suffix" for file in ignored if not _is_image(file))
    if kinds:
        first = next(file for file in ignored if not _is_image(file))
        count, listed = kinds.total(), _some([f"{count:,} {kind}" for kind, count in kinds.most_common()])
        are = "is not an image" if count == 1 else "are not images"
        photos = sorted(PHOTOS_NOT_READ & set(kinds))
        advice = f"; save {' and '.join(photos)} as JPEG or PNG" if photos else ""
        remarks.append(
            f"{counted(count, 'file')} {are} and {'was' if count == 1 else 'were'} left out ({listed}), such as "
            f"{_shown(first, root)}{advice}"
        )
    outside = [file for file in ignored if _is_image(file)]
    if outside:
        remarks.append(
            f"{were(len(outside), 'image')} left out, outside the class folders, such as {_shown(outside[0], root)}"
        )
    followed = [link for listing in listings for link in listing.followed]
    if followed:
        remarks.append(f"{were(len(followed), 'link')} followed, such as {_shown(followed[0], root)}")
    broken = [link for listing in listings for link in listing.broken]
    return (*remarks, *_remarks_on_broken(broken, root))


def _remarks_on_broken(broken: Sequence[Path], root: Path) -> tuple[str, ...]:
    if not broken:
        return ()
    what = "link that leads nowhere was" if len(broken) == 1 else "links that lead nowhere were"
    return (f"{len(broken):,} {what} left out, such as {_shown(broken[0], root)}",)


def folders(root: Path) -> Iterator[Path]:
    """Return the visible folders in a folder, links to folders included.

    Raises:
        DataError: it cannot be read.
    """
    return (Path(entry.path) for entry in _entries(root) if entry.is_dir() and entry.name not in NOT_DATA)


def _scan(folder: Path, *, deep: bool = True) -> _Found:
    """Return the visible files in a folder, of the folders in it too where `deep`, sorted by their paths."""
    found = _Found([], [], [])
    waiting = [(folder, frozenset({_identity(folder)}))]
    while waiting:
        inside, above = waiting.pop()
        for entry in _entries(inside):
            path = Path(entry.path)
            is_folder, is_link = entry.is_dir(), entry.is_symlink()
            is_file = entry.is_file()
            if is_link and not is_file and (not is_folder or _identity(path) in above):
                found.broken.append(path)
            elif is_folder and deep and entry.name not in NOT_DATA:
                waiting.append((path, above | {_identity(path)}))
                found.followed.extend([path] if is_link else [])
            elif is_file:
                found.files.append(path)
                found.followed.extend([path] if is_link else [])
    for paths in found:
        paths.sort(key=lambda path: path.as_posix())
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from None


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _shown(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
