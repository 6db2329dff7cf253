"""Folders of images: one folder per class, with or without `train/` and `test/` above."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.datasets.cache import Plan
from bdbench.datasets.images import Fit, decode_images, in_chunks, match_channels
from bdbench.datasets.splits import split_dataset, stratified_split
from bdbench.errors import DataError
from bdbench.progress import Progress

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
)
TEST_NAMES = ("test", "val", "valid", "validation")


class Listing(NamedTuple):
    """Image files of one split, class after class."""

    files: list[Path]
    labels: Tensor
    """(N,) int64."""
    ignored: list[Path]
    """Files that are not images by their suffix."""


def plan_folder(path: Path, name: str, augment: str, fit: Fit | None, test_fraction: float) -> Plan:
    """Plan to read a folder; without `test/` (or `val/`) beside `train/`, the images are split.

    Classes are numbered in the order of their folders' names, by value where all names are numbers. Hidden
    files and folders, and files without an image's suffix, are left out.

    Raises:
        DataError: there are no class folders, a class has no images, or the test split has a new class.
    """
    train_root, test_root = _roots(path)
    names = class_folders(train_root)
    train = list_images(train_root, names)
    test = None if test_root is None else _list_test(test_root, names)
    return Plan(
        name=name,
        augment=augment,
        root=path,
        files=(*train.files, *(test.files if test else ())),
        options={
            "layout": "folder",
            "fit": str(fit),
            "test_fraction": None if test else test_fraction,
            "classes": "/".join(names),
        },
        decode=partial(_decode, path, train, test, names, fit, test_fraction),
    )


def training_files(path: Path, test_fraction: float) -> list[str]:
    """Return the file of every image that `plan_folder` puts into the training split, in its order, relative to `path`.

    Raises:
        DataError: see `plan_folder`.
    """
    train_root, test_root = _roots(path)
    listing = list_images(train_root, class_folders(train_root))
    names = [file.relative_to(path).as_posix() for file in listing.files]
    if test_root is not None:
        return names
    return [names[row] for row in stratified_split(listing.labels, test_fraction)[0].tolist()]


def _roots(path: Path) -> tuple[Path, Path | None]:
    """Return the folders of the training and of the test split; without the second, the first is split."""
    train_root = path / "train"
    if not train_root.is_dir() or not any(_folders(train_root)):
        return path, None
    return train_root, next((path / test for test in TEST_NAMES if (path / test).is_dir()), None)


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the names of a folder's class folders, in the order of their labels.

    Raises:
        DataError: there is none.
    """
    names = [folder.name for folder in _folders(root)]
    if not names:
        raise DataError(f"{root}: holds no class folders; put the images of each class into a folder of their own")
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def list_images(root: Path, names: tuple[str, ...]) -> Listing:
    """List the images of each class folder, folders inside it included.

    Raises:
        DataError: a class has no images.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    counts = []
    for name in names:
        found = _files(root / name)
        images = [file for file in found if file.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(f"{root / name}: holds no images ({', '.join(sorted(SUFFIXES))}); add some or remove it")
        files += images
        ignored += [file for file in found if file.suffix.lower() not in SUFFIXES]
        counts.append(len(images))
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(counts))
    return Listing(files, labels, ignored)


def _list_test(root: Path, names: tuple[str, ...]) -> Listing:
    """List a test split, in which classes may be absent but not new."""
    present = class_folders(root)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise DataError(f"{root / unknown[0]}: the training split has no class '{unknown[0]}'; add it or remove this")
    listing = list_images(root, present)
    numbers = torch.tensor([names.index(name) for name in present])
    return listing._replace(labels=numbers[listing.labels])


def _folders(root: Path) -> Iterator[Path]:
    return (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(
        (file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)),
        key=lambda file: file.as_posix(),
    )


def _decode(
    root: Path,
    train: Listing,
    test: Listing | None,
    names: tuple[str, ...],
    fit: Fit | None,
    test_fraction: float,
    progress: Progress,
) -> tuple[ImageDataset, ImageDataset]:
    ignored = [*train.ignored, *(test.ignored if test else ())]
    if ignored:
        progress.note(f"{root}: {len(ignored)} files are not images and left out, such as {ignored[0].name}")
    data = _decode_listing(root, train, names, fit, "train", progress)
    if test is None:
        return split_dataset(data, test_fraction)
    return match_channels(data, _decode_listing(root, test, names, fit, "test", progress))


def _decode_listing(
    root: Path, listing: Listing, names: tuple[str, ...], fit: Fit | None, split: str, progress: Progress
) -> ImageDataset:
    chunks = in_chunks(listing.files, root)
    images = decode_images(chunks, len(listing.files), fit, f"reading {split} images", progress)
    return ImageDataset(images, listing.labels, names)
