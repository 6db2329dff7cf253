"""NumPy archives: `images` and `labels`, `x_train` ... `y_test`, or MedMNIST's names; pickles are never opened."""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.datasets.cache import Plan
from bdbench.datasets.fit import Fit
from bdbench.datasets.images import match_channels, resize_images
from bdbench.datasets.labels import class_names_of, integer_labels, numbered_names, remark_on
from bdbench.datasets.splits import Splits, split_dataset
from bdbench.errors import DataError
from bdbench.limits import ARCHIVE_BYTES, ARCHIVE_RATIO
from bdbench.machine import memory_bytes
from bdbench.progress import Progress
from bdbench.text import printable
from bdbench.wording import were

WHOLE = ("images", "labels")
DIVIDED = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
LAYOUTS = (DIVIDED, MEDMNIST, WHOLE)

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""What reads the header of an array of each version of the format."""

READING_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    RuntimeError,  # encrypted
    NotImplementedError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What a damaged archive raises."""


def plan_npz(path: Path, name: str, augment: str, fit: Fit | None, test_fraction: float) -> Plan:
    """Plan to read an archive of uint8 images (see `channels_first`) and integer labels."""
    return Plan(
        name=name,
        augment=augment,
        root=path,
        files=(path,),
        options={"layout": "npz", "fit": str(fit), "test_fraction": test_fraction},
        decode=partial(_decode, path, fit, test_fraction),
    )


def channels_first(images: np.ndarray, where: str) -> Tensor:
    """Return images as (N, C, H, W) uint8, contiguous.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 with C of 1 or 3.
        where: the array, for messages.

    Raises:
        DataError: another shape or type, or no images.
    """
    if images.dtype != np.uint8:
        way_out = "save np.round(images * 255).astype(np.uint8) if they lie in 0..1"
        if images.dtype.kind in "iu" and len(images):
            way_out = (
                f"they lie in {images.min()}..{images.max()}: scale that range to 0..255 and save .astype(np.uint8)"
            )
        raise DataError(f"{where}: images must be uint8 in 0..255, got {images.dtype}; {way_out}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"{where}: images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3, got {images.shape}"
        )
    if len(images) == 0:
        raise DataError(f"{where}: holds no images")
    return torch.from_numpy(np.ascontiguousarray(images))


def _decode(path: Path, fit: Fit | None, test_fraction: float, progress: Progress) -> Splits:
    arrays, others = _read(path)
    layout = tuple(arrays)
    given = class_names_of([arrays[layout[1]]])
    pairs = [
        _pair(arrays, images, labels, given, fit, progress)
        for images, labels in zip(layout[::2], layout[1::2], strict=True)
    ]
    names = given or numbered_names(*(labels for _, labels in pairs))
    splits = [ImageDataset(images, labels, names) for images, labels in pairs]
    train, test = match_channels(*splits) if len(splits) > 1 else split_dataset(splits[0], test_fraction)
    left_out = (f"{were(len(others), 'array')} left out: {', '.join(others)}",) if others else ()
    return Splits(train, test, (*left_out, *remark_on(arrays[layout[1]])))


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the arrays of one of the layouts, images and labels in turn; name the others."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            layout = next((layout for layout in LAYOUTS if set(layout) <= set(members)), None)
            if layout is None:
                raise DataError(
                    f"holds {printable(', '.join(members)) or 'nothing'}; needs "
                    f"{', or '.join(', '.join(layout) for layout in (WHOLE, DIVIDED, MEDMNIST))}"
                )
            _check_sizes(sum(members[name].file_size for name in layout), path.stat().st_size)
            arrays = {name: _read_array(archive, members[name], name) for name in layout}
            return arrays, [printable(name) for name in members if name not in layout]
    except READING_ERRORS as error:
        kind = "a NumPy archive" if zipfile.is_zipfile(path) else "a NumPy archive (several arrays with names)"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot be read as {kind}: {printable(reason[:200])}; save it again with np.savez") from None


def _check_sizes(asked: int, packed: int) -> None:
    """Refuse arrays of `asked` bytes in a file of `packed` bytes where few bytes ask for much."""
    if asked > ARCHIVE_BYTES and asked > ARCHIVE_RATIO * packed:
        raise DataError(
            f"its arrays have {asked // max(packed, 1):,} times the bytes of the file, at most {ARCHIVE_RATIO} are "
            "unpacked; save it with np.savez, without compression"
        )
    if asked > memory_bytes():
        raise DataError(
            f"its arrays need {asked / 1e9:,.1f} GB, this machine has {memory_bytes() / 1e9:,.1f} GB of memory; save "
            "smaller images, or fewer"
        )


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    """Read an array whose header asks for exactly the bytes that follow it.

    Raises:
        DataError: it asks for others, or holds Python objects.
        READING_ERRORS: it is damaged.
    """
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"{name} has version {version} of the format")
        shape, _, dtype = HEADERS[version](file)
        if dtype.hasobject:
            raise DataError("holds pickled Python objects, which are never opened; save plain uint8 and integer arrays")
        asked, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if min(shape, default=0) < 0 or asked != held:
            raise DataError(f"{name} asks for {asked} bytes, the archive holds {held}; save it again with np.savez")
    with archive.open(member) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _pair(
    arrays: Mapping[str, np.ndarray],
    images_name: str,
    labels_name: str,
    class_names: Sequence[str] | None,
    fit: Fit | None,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Return images and labels of one split, checked against each other."""
    images = channels_first(arrays[images_name], images_name)
    labels = integer_labels(arrays[labels_name], labels_name, class_names)
    if len(images) != len(labels):
        raise DataError(f"{images_name} has {len(images)} rows, {labels_name} {len(labels)}; they must be as many")
    return (images if fit is None else resize_images(images, fit, progress)), labels
