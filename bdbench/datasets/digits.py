"""The embedded default: scikit-learn's 1,797 real 8x8 scans of handwritten digits, no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset, SourceData
from bdbench.datasets.base import Source
from bdbench.datasets.fit import Fit
from bdbench.datasets.images import resize_images
from bdbench.datasets.splits import split_dataset
from bdbench.progress import Progress

CLASS_NAMES = tuple("0123456789")

AUGMENT = "crop"
"""A mirrored digit is no digit."""


class Digits(Source):
    """Handwritten digits in gray, bundled with scikit-learn: scans of 8x8 pixels, brought to 16x16."""

    image_size: int | None = Field(
        16, ge=8, le=1024, description="Pixels of a side. At 8, as scanned, a digit is learned as fast as a patch."
    )

    def load(self, progress: Progress) -> SourceData:
        """Return both splits, (N, 1, 8, 8) or the size asked for; the split is the same for every seed."""
        images, labels = read_scans()
        if self.image_size is not None:
            images = resize_images(images, Fit(self.image_size), progress)
        data = ImageDataset(images, labels, CLASS_NAMES)
        train, test = split_dataset(data, self.test_fraction)
        return SourceData("digits", train, test, augment=AUGMENT)


def read_scans() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 8, 8) uint8, stretched from 0..16 to 0..255, and labels (1797,) int64."""
    table = _read_table()
    pixels = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(pixels).view(-1, 1, 8, 8), torch.from_numpy(table[:, -1].astype(np.int64))


def _read_table() -> np.ndarray:
    """Return (1797, 65): 64 pixels in 0..16 and the digit.

    Read from scikit-learn's own file where it lies as ever: importing the package takes seconds.
    """
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", ndmin=2)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])
