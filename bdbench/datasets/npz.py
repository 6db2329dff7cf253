"""NumPy archives: `images` and `labels`, `x_train` ... `y_test`, or MedMNIST's names; pickles are never opened."""

from __future__ import annotations

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
from bdbench.progress import Progress
from bdbench.wording import were

WHOLE = ("images", "labels")
DIVIDED = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
LAYOUTS = (DIVIDED, MEDMNIST, WHOLE)


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
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError("a single array, not an archive; save it with np.savez(images=..., labels=...)")
        with archive:
            for layout in LAYOUTS:
                if set(layout) <= set(archive.files):
                    others = [name for name in archive.files if name not in layout]
                    return {name: archive[name] for name in layout}, others
            raise DataError(
                f"holds {', '.join(archive.files) or 'nothing'}; needs "
                f"{', or '.join(', '.join(layout) for layout in (WHOLE, DIVIDED, MEDMNIST))}"
            )
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                "holds pickled Python objects, which are never opened; save plain uint8 and integer arrays"
            ) from None
        raise DataError(f"cannot be read as a NumPy archive ({error}); save it again with np.savez") from None


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
