"""What every source of images offers: options in, both splits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset, SourceData
from bdbench.errors import OptionError
from bdbench.options import Options
from bdbench.progress import Progress
from bdbench.seeds import generator
from bdbench.text import printable

DARK = 64
"""A set whose brightest pixel is at most this is nearly black; 14 bits in a 16-bit file end there."""


class Source(Options, ABC):
    """A source of labelled images; `load` gives both splits, decoded."""

    deciding: ClassVar[set[str]] = {"image_size", "test_fraction", "images", "test_images"}
    """Options that decide which images there are."""

    data_root: Path | None = Field(None, description="Folder of a local copy; else the user's cache folder.")
    download: bool = Field(True, description="Download what is missing (with the source's checksums).")
    image_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="Resize the shorter side to this many pixels and crop the centre square.",
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of images that become the test split where the source has none."
    )

    images: int | None = Field(
        None, ge=20, description="Keep so many training images, chosen at random, the same for every seed."
    )

    test_images: int | None = Field(
        None, ge=20, description="Keep so many test images, chosen at random, the same for every seed."
    )

    def open(self, progress: Progress) -> SourceData:
        """Return both splits, cut to `images` and `test_images`; the name then says so.

        What was left out, guessed or changed is told, and kept in `SourceData.remarks`: so are classes without a
        training image, and pixels of a strange range.

        Raises:
            OptionError: there are fewer.
            DataError: see `load`.
        """
        data = self._cut(self.load(progress))
        remarks = tuple(map(printable, (*data.remarks, *_empty_classes(data.train), *_strange_range(data))))
        for remark in remarks:
            progress.note(remark)
        return replace(data, remarks=remarks)

    def _cut(self, data: SourceData) -> SourceData:
        if self.images is not None:
            rows = self.kept(_checked_count(self.images, len(data.train), "images", f"training images of {data.name}"))
            data = replace(data, name=f"{data.name}-{self.images}", train=data.train.take(rows))
        if self.test_images is not None:
            total = _checked_count(self.test_images, len(data.test), "test_images", f"test images of {data.name}")
            rows = _chosen_rows(total, self.test_images, "test_images")
            data = replace(data, name=f"{data.name}-test{self.test_images}", test=data.test.take(rows))
        return data

    def files(self, source: SourceData) -> list[str] | None:  # noqa: ARG002 - for those who have files
        """Return the file of every training image of `source`, which `open` returned, where each has its own."""
        return None

    def kept(self, count: int) -> Tensor:
        """Return which of `count` training images `images` keeps, ascending."""
        return torch.arange(count) if self.images is None else _chosen_rows(count, self.images, "images")

    def chosen(self) -> dict[str, Any]:
        """Return the options that decide which images there are, where they are not the defaults."""
        return self.model_dump(include=self.deciding, exclude_defaults=True)

    @abstractmethod
    def load(self, progress: Progress) -> SourceData:
        """Return both splits.

        Raises:
            DataError: something is missing, unreadable or does not fit; the message names the file.
        """


def _checked_count(asked: int, there: int, option: str, what: str) -> int:
    if asked > there:
        raise OptionError(f"{option} {asked} is more than the {there} {what}")
    return there


def _chosen_rows(count: int, kept: int, purpose: str) -> Tensor:
    """Draw `kept` of `count` rows, ascending, the same for every seed."""
    return torch.randperm(count, generator=generator(0, purpose))[:kept].sort().values


def _empty_classes(data: ImageDataset) -> Iterator[str]:
    counts = torch.bincount(data.labels, minlength=data.num_classes).tolist()
    empty = [name for name, count in zip(data.class_names, counts, strict=True) if not count]
    if empty:
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        verb = "has" if len(empty) == 1 else "have"
        yield f"{len(empty):,} of the {len(counts):,} classes {verb} no training image: {named}"


def _strange_range(data: SourceData) -> Iterator[str]:
    """Say so where all pixels of a split are nearly black or nearly white: often they were saved in another range."""
    for name, split in (("training", data.train), ("test", data.test)):
        if not len(split):
            continue
        low, high = (int(value) for value in torch.aminmax(split.images))
        if high <= DARK or low >= 255 - DARK:
            yield (
                f"all pixels of the {name} images lie in {low} to {high} of 0 to 255: were they saved in another "
                "range, such as 0/1 or 12 of 16 bits? Scale them to the full range"
            )
