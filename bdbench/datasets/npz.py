"""NumPy archives: `images` and `labels`, or `x_train` ... `y_test`; pickles are never opened."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.datasets.cache import Plan
from bdbench.datasets.images import Fit, match_channels, resize_images
from bdbench.datasets.labels import check_labels, numbered_names
from bdbench.datasets.splits import split_dataset
from bdbench.errors import DataError
from bdbench.progress import Progress

WHOLE = ("images", "labels")
DIVIDED = ("x_train", "y_train", "x_test", "y_test")


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
        raise DataError(
            f"{where}: images must be uint8 in 0..255, got {images.dtype}; "
            "save np.round(images * 255).astype(np.uint8) if they lie in 0..1"
        )
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


def _decode(path: Path, fit: Fit | None, test_fraction: float, progress: Progress) -> tuple[ImageDataset, ImageDataset]:
    arrays = _read(path)
    if set(arrays) == set(WHOLE):
        images, labels = _pair(arrays, *WHOLE, fit, progress)
        return split_dataset(ImageDataset(images, labels, numbered_names(labels)), test_fraction)
    train_images, train_labels = _pair(arrays, *DIVIDED[:2], fit, progress)
    test_images, test_labels = _pair(arrays, *DIVIDED[2:], fit, progress)
    names = numbered_names(train_labels, test_labels)
    return match_channels(
        ImageDataset(train_images, train_labels, names), ImageDataset(test_images, test_labels, names)
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of one of the two layouts."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError("a single array, not an archive; save it with np.savez(images=..., labels=...)")
        with archive:
            for layout in (DIVIDED, WHOLE):
                if set(layout) <= set(archive.files):
                    return {name: archive[name] for name in layout}
            raise DataError(
                f"holds {', '.join(archive.files) or 'nothing'}; needs {', '.join(WHOLE)} or {', '.join(DIVIDED)}"
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
    arrays: dict[str, np.ndarray], images_name: str, labels_name: str, fit: Fit | None, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return images and labels of one split, checked against each other."""
    images = channels_first(arrays[images_name], images_name)
    labels = check_labels(arrays[labels_name], labels_name, None)
    if len(images) != len(labels):
        raise DataError(f"{images_name} has {len(images)} rows, {labels_name} {len(labels)}; they must be as many")
    return (images if fit is None else resize_images(images, fit, progress)), labels
