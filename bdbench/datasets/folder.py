"""Folders of images: one folder per class, with or without a training and a test folder above."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from bdbench.data import ImageDataset
from bdbench.datasets.cache import Plan
from bdbench.datasets.decoded import Decoded, check_decoded, remarks_on
from bdbench.datasets.fit import Fit
from bdbench.datasets.images import decode_readable, in_chunks, match_channels
from bdbench.datasets.splits import Splits, split_dataset, stratified_split
from bdbench.datasets.tree import Listing, Roots, class_folders, find_roots, list_images, remarks_on_files
from bdbench.errors import DataError
from bdbench.progress import Progress


def plan_folder(
    path: Path, name: str, augment: str, fit: Fit | None, test_fraction: float, *, skip_unreadable: bool = False
) -> Plan:
    """Plan to read a folder; without a test folder beside the training folder, the images are split.

    Classes are numbered in the order of their folders' names, by value where all names are numbers. Hidden
    files and folders, and files without an image's suffix, are left out; so is what cannot be read, where
    `skip_unreadable` says so.

    Raises:
        DataError: see `bdbench.datasets.tree`; a test split has a new class.
    """
    roots = find_roots(path)
    classes = class_folders(roots.train)
    train = list_images(roots.train, classes)
    test = None if roots.test is None else _list_test(roots.test, tuple(classes))
    listings = [train] if test is None else [train, test]
    return Plan(
        name=name,
        augment=augment,
        root=path,
        files=tuple(file for listing in listings for file in listing.files),
        options={
            "layout": "folder",
            "fit": str(fit),
            "test_fraction": None if test else test_fraction,
            "classes": "/".join(classes),
            **({"skip_unreadable": 1} if skip_unreadable else {}),
        },
        decode=partial(_decode, path, listings, tuple(classes), fit, test_fraction, skip_unreadable),
        remarks=(*roots.remarks, *remarks_on_files(path, listings)),
    )


def training_files(path: Path, test_fraction: float, left_out: Collection[str]) -> list[str]:
    """Return the file of every image that `plan_folder` puts into the training split, in its order, relative to `path`.

    Args:
        path, test_fraction: as in `plan_folder`.
        left_out: files that cannot be read, relative to `path`.

    Raises:
        DataError: see `plan_folder`.
    """
    roots: Roots = find_roots(path)
    listing = list_images(roots.train, class_folders(roots.train))
    names = [file.relative_to(path).as_posix() for file in listing.files]
    missing = set(left_out)
    kept = [row for row, name in enumerate(names) if name not in missing]
    if roots.test is None:
        training, _ = stratified_split(listing.labels[kept], test_fraction)
        kept = [kept[row] for row in training.tolist()]
    return [names[row] for row in kept]


def _list_test(root: Path, names: tuple[str, ...]) -> Listing:
    """List a test split, in which classes may be absent but not new."""
    present = class_folders(root)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise DataError(f"{root / unknown[0]}: the training split has no class '{unknown[0]}'; add it or remove this")
    listing = list_images(root, present)
    numbers = torch.tensor([names.index(name) for name in present])
    return listing._replace(labels=numbers[listing.labels])


def _decode(
    root: Path,
    listings: list[Listing],
    names: tuple[str, ...],
    fit: Fit | None,
    test_fraction: float,
    skip_unreadable: bool,
    progress: Progress,
) -> Splits:
    count = sum(len(listing.files) for listing in listings)
    decoded = [
        decode_readable(in_chunks(listing.files, root), len(listing.files), fit, f"reading {split} images", progress)
        for split, listing in zip(("train", "test"), listings, strict=False)
    ]
    check_decoded(decoded, count, fit, skip_unreadable=skip_unreadable)
    splits = [_dataset(*pair, names) for pair in zip(decoded, listings, strict=True)]
    train, test = match_channels(*splits) if len(splits) > 1 else split_dataset(splits[0], test_fraction)
    left_out = [item.where for found in decoded for item in found.unreadable]
    return Splits(train, test, remarks_on(decoded, fit), left_out)


def _dataset(decoded: Decoded, listing: Listing, names: tuple[str, ...]) -> ImageDataset:
    return ImageDataset(decoded.images, listing.labels[decoded.rows], names)
