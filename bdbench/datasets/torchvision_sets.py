"""The usual benchmarks by name: torchvision's downloads and checksums, or a local copy."""

from __future__ import annotations

import csv
import socket
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from pydantic import Field

from bdbench.data import ImageDataset, SourceData
from bdbench.datasets.base import Source
from bdbench.datasets.cache import Plan, cache_folder, load_cached
from bdbench.datasets.fit import Fit
from bdbench.datasets.images import decode_images, in_chunks, resize_images
from bdbench.datasets.npz import channels_first
from bdbench.datasets.parquet import plan_parquet, shard_folder
from bdbench.datasets.splits import Splits
from bdbench.datasets.tree import class_folders, list_images
from bdbench.errors import DataError
from bdbench.files import expanded
from bdbench.progress import Progress

DIGIT_NAMES = tuple("0123456789")

STALLED_SECONDS = 60
"""A download that brings nothing for so long is given up."""


class TorchvisionSource(Source):
    """A benchmark that torchvision can download, in torchvision's layout or as Parquet shards.

    `<root>/<name>/` with Hugging Face shards comes first, then torchvision's own layout under `<root>`, then shards in
    `<root>` itself where that is called `<name>`; root is `data_root`, or ``data`` in the cache folder.
    """

    name: ClassVar[str]
    augment: ClassVar[str] = "crop"
    torchvision_class: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    """Files that make up the set, in torchvision's layout: each pattern has to match."""

    def load(self, progress: Progress) -> SourceData:
        """Return both splits in the sizes of the published set.

        Raises:
            DataError: it is not there and cannot be downloaded, or what is there is damaged or incomplete.
        """
        root = expanded(self.data_root or cache_folder() / "data")
        shards = self._shards(root)
        if shards is not None:
            plan = plan_parquet(shards, self.name, self.augment, self._fit(), self.test_fraction)
            return load_cached(plan, progress)
        if not self._files(root):
            self._check_no_shards(root)
            self._download(root, progress)
        return load_cached(self._plan(root), progress)

    def _shards(self, root: Path) -> Path | None:
        """Return the folder of the set's Parquet shards, if there is one."""
        if (root / self.name).is_dir() and (found := shard_folder(root / self.name)):
            return found
        if not self._files(root) and root.is_dir() and root.resolve().name == self.name:
            return shard_folder(root)
        return None

    def _check_no_shards(self, root: Path) -> None:
        """Refuse to download beside shards that may be another set's."""
        found = next((folder for folder in (root, root / "data") if any(folder.glob("*.parquet"))), None)
        if found is not None:
            raise DataError(
                f"{found} holds Parquet shards, but --data-root names the folder above {self.name}/; move them to "
                f"{root / self.name}, or read them by their path: --dataset {root}"
            )

    @abstractmethod
    def _read(self, root: Path, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
        """Read both splits in torchvision's layout."""

    def _fit(self) -> Fit | None:
        return None if self.image_size is None else Fit(self.image_size)

    def _plan(self, root: Path) -> Plan:
        options = {"layout": "torchvision", "fit": str(self._fit())}
        return Plan(self.name, self.augment, root, tuple(self._files(root)), options, partial(self._splits, root))

    def _splits(self, root: Path, progress: Progress) -> Splits:
        return Splits(*self._read(root, progress))

    def _dataset(
        self, images: np.ndarray, labels: npt.ArrayLike, class_names: Sequence[str], progress: Progress
    ) -> ImageDataset:
        """Make a split of arrays (see `channels_first`), resized where that is asked."""
        pixels, fit = channels_first(images, "images"), self._fit()
        if fit is not None:
            pixels = resize_images(pixels, fit, progress)
        return ImageDataset(pixels, _int64(labels), tuple(class_names))

    def _files(self, root: Path) -> list[Path]:
        """Return all files of the set, or none if some are absent."""
        found = [sorted(root.glob(pattern)) for pattern in self.patterns]
        return [file for files in found for file in files] if all(found) else []

    def _download(self, root: Path, progress: Progress) -> None:
        """Fetch the set into a folder of its own and move it to its place when it is complete."""
        copies = f"{self.patterns[0]} or {self.name}/train-*.parquet"
        local_copy = f"point --data-root at a folder with a copy ({copies})"
        if not self.download:
            raise DataError(f"{self.name} is not in {root}; drop --no-download, or {local_copy}")
        if self.data_root is not None and not root.is_dir():
            raise DataError(f"--data-root {root} is not a folder; make it to download {self.name} there")
        torchvision = import_torchvision()
        progress.note(f"downloading {self.name} to {root}")
        try:
            lock = cache_folder() / "downloads" / f"{self.name}.lock"  # leaves nothing in a folder of the user's
            for folder in (root, lock.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if self._files(root):
                    return
                with TemporaryDirectory(dir=root, prefix=f".{self.name}-") as unfinished, _giving_up():
                    self._fetch(torchvision, Path(unfinished))
                    _move_files(Path(unfinished), root)
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.name} cannot be downloaded to {root} ({reason}); check the network, or {local_copy}"
            ) from None

    def _fetch(self, torchvision: ModuleType, root: Path) -> None:
        """Let torchvision download and check both splits."""
        dataset = getattr(torchvision.datasets, self.torchvision_class)
        for is_train in (True, False):
            dataset(root, train=is_train, download=True)


class Mnist(TorchvisionSource):
    """Handwritten digits, 28x28 gray: 60,000 and 10,000."""

    name: ClassVar[str] = "mnist"
    torchvision_class: ClassVar[str] = "MNIST"
    patterns: ClassVar[tuple[str, ...]] = tuple(
        f"MNIST/raw/{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
    )
    class_names: ClassVar[tuple[str, ...]] = DIGIT_NAMES
    counts: ClassVar[tuple[int, int]] = (60_000, 10_000)

    def _read(self, root: Path, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
        arrays = [_read_idx(root / pattern, root) for pattern in self.patterns]
        for images, count in zip(arrays[::2], self.counts, strict=True):
            _check_count(len(images), count)
        return (
            self._dataset(arrays[0], arrays[1], self.class_names, progress),
            self._dataset(arrays[2], arrays[3], self.class_names, progress),
        )


class FashionMnist(Mnist):
    """Articles of clothing, 28x28 gray: 60,000 and 10,000."""

    name: ClassVar[str] = "fashion-mnist"
    augment: ClassVar[str] = "crop,flip"
    torchvision_class: ClassVar[str] = "FashionMNIST"
    patterns: ClassVar[tuple[str, ...]] = tuple("Fashion" + pattern for pattern in Mnist.patterns)
    class_names: ClassVar[tuple[str, ...]] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )


class Cifar10(TorchvisionSource):
    """Photographs of 10 things, 32x32 colour: 50,000 and 10,000."""

    name: ClassVar[str] = "cifar10"
    augment: ClassVar[str] = "crop,flip"
    torchvision_class: ClassVar[str] = "CIFAR10"
    patterns: ClassVar[tuple[str, ...]] = (
        "cifar-10-batches-py/data_batch_[1-5]",
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
    )

    def _read(self, root: Path, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
        dataset = getattr(import_torchvision().datasets, self.torchvision_class)
        with _explained(self.patterns[0]):
            splits = [dataset(root, train=is_train, download=False) for is_train in (True, False)]
        train, test = (self._dataset(split.data, split.targets, split.classes, progress) for split in splits)
        return train, test


class Cifar100(Cifar10):
    """Photographs of 100 things, 32x32 colour: 50,000 and 10,000."""

    name: ClassVar[str] = "cifar100"
    torchvision_class: ClassVar[str] = "CIFAR100"
    patterns: ClassVar[tuple[str, ...]] = tuple(f"cifar-100-python/{part}" for part in ("train", "test", "meta"))


class Svhn(TorchvisionSource):
    """House numbers, digits in 32x32 colour: 73,257 and 26,032."""

    name: ClassVar[str] = "svhn"
    torchvision_class: ClassVar[str] = "SVHN"
    patterns: ClassVar[tuple[str, ...]] = ("train_32x32.mat", "test_32x32.mat")

    def _read(self, root: Path, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
        dataset = import_torchvision().datasets.SVHN
        with _explained(self.patterns[0]):
            splits = [dataset(root, split=split, download=False) for split in ("train", "test")]
        train, test = (self._dataset(split.data, split.labels, DIGIT_NAMES, progress) for split in splits)
        return train, test

    def _fetch(self, torchvision: ModuleType, root: Path) -> None:
        for split in ("train", "test"):
            torchvision.datasets.SVHN(root, split=split, download=True)


class Gtsrb(TorchvisionSource):
    """German traffic signs in colour, whole images of many sizes resized to squares: 26,640 and 12,630."""

    name: ClassVar[str] = "gtsrb"
    torchvision_class: ClassVar[str] = "GTSRB"
    patterns: ClassVar[tuple[str, ...]] = (
        "gtsrb/GTSRB/Training/*/*.ppm",
        "gtsrb/GTSRB/Final_Test/Images/*.ppm",
        "gtsrb/GT-final_test.csv",
    )
    counts: ClassVar[tuple[tuple[int, ...], int]] = ((26_640, 39_209), 12_630)
    """What torchvision downloads, or the whole training set of the challenge; and the test set."""

    image_size: int | None = Field(32, ge=8, le=1024, description="Resize whole images to squares of this many pixels.")

    def _fit(self) -> Fit | None:
        return Fit(self.image_size or 32, "squash")

    def _read(self, root: Path, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
        training = root / "gtsrb" / "GTSRB" / "Training"
        folders = class_folders(training)
        if len(folders) != len(SIGN_NAMES):
            raise DataError(f"Training has {len(folders)} of {len(SIGN_NAMES)} classes; remove {training.parent}")
        train = list_images(training, folders)
        _check_count(len(train.files), *self.counts[0])
        test_files, test_labels = self._list_test(root / "gtsrb")
        _check_count(len(test_files), self.counts[1])
        return (
            self._decode(root, train.files, train.labels.tolist(), progress),
            self._decode(root, test_files, test_labels, progress),
        )

    def _list_test(self, folder: Path) -> tuple[list[Path], list[int]]:
        try:
            with (folder / "GT-final_test.csv").open(newline="") as file:
                rows = [(row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";")]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"GT-final_test.csv: cannot be read ({error}); remove it and download again") from None
        return [folder / "GTSRB" / "Final_Test" / "Images" / name for name, _ in rows], [label for _, label in rows]

    def _decode(self, root: Path, files: list[Path], labels: list[int], progress: Progress) -> ImageDataset:
        images = decode_images(in_chunks(files, root), len(files), self._fit(), "reading signs", progress)
        return ImageDataset(images, _int64(labels), SIGN_NAMES)

    def _fetch(self, torchvision: ModuleType, root: Path) -> None:
        for split in ("train", "test"):
            torchvision.datasets.GTSRB(root, split=split, download=True)


def import_torchvision() -> ModuleType:
    """Import torchvision where it is needed: it takes longer than all else here.

    Raises:
        DataError: it is not installed, or does not fit the installed torch.
    """
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(
            f"this dataset needs torchvision, which cannot be imported ({error}); pip install torchvision"
        ) from None
    module: ModuleType = torchvision
    return module


@contextmanager
def _explained(pattern: str) -> Iterator[None]:
    """Turn what torchvision says about a damaged local copy into an error with a way out."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{pattern}: the local copy is damaged or incomplete ({error}); remove it to download it again"
        ) from None


@contextmanager
def _giving_up() -> Iterator[None]:
    """Let a stalled connection fail: torchvision's downloader would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _move_files(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def _read_idx(path: Path, root: Path) -> np.ndarray:
    """Read MNIST's own format: 00 00 08, the number of dimensions, their sizes as big-endian int32, bytes."""
    content = path.read_bytes()
    start = 4 + 4 * content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4:start], ">i4") if len(content) >= start else np.empty(0)
    if content[:3] != b"\0\0\x08" or len(content) - start != shape.prod():
        raise DataError(f"{path.relative_to(root)}: damaged or half a file; remove it to download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _check_count(found: int, *expected: int) -> None:
    """Refuse half an archive: a benchmark's numbers mean nothing on a part of it."""
    if found not in expected:
        raise DataError(
            f"holds {found} images, not {' or '.join(map(str, expected))}; "
            "remove the local copy to download it again, or read a subset of your own by its path"
        )


def _int64(labels: npt.ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.asarray(labels).astype(np.int64))


SIGN_NAMES = (
    "Speed limit (20km/h)",
    "Speed limit (30km/h)",
    "Speed limit (50km/h)",
    "Speed limit (60km/h)",
    "Speed limit (70km/h)",
    "Speed limit (80km/h)",
    "End of speed limit (80km/h)",
    "Speed limit (100km/h)",
    "Speed limit (120km/h)",
    "No passing",
    "No passing for vehicles over 3.5 t",
    "Right-of-way at next intersection",
    "Priority road",
    "Yield",
    "Stop",
    "No vehicles",
    "Vehicles over 3.5 t prohibited",
    "No entry",
    "General caution",
    "Dangerous curve left",
    "Dangerous curve right",
    "Double curve",
    "Bumpy road",
    "Slippery road",
    "Road narrows on the right",
    "Road work",
    "Traffic signals",
    "Pedestrians",
    "Children crossing",
    "Bicycles crossing",
    "Beware of ice/snow",
    "Wild animals crossing",
    "End of all speed and passing limits",
    "Turn right ahead",
    "Turn left ahead",
    "Ahead only",
    "Go straight or right",
    "Go straight or left",
    "Keep right",
    "Keep left",
    "Roundabout mandatory",
    "End of no passing",
    "End of no passing by vehicles over 3.5 t",
)
"""The 43 signs in the order of the challenge's class numbers."""
