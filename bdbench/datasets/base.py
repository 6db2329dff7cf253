"""What every source of images offers: options in, both splits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import SourceData
from bdbench.errors import OptionError
from bdbench.options import Options
from bdbench.progress import Progress
from bdbench.seeds import generator


class Source(Options, ABC):
    """A source of labelled images; `load` gives both splits, decoded."""

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

    def open(self, progress: Progress) -> SourceData:
        """Return both splits, the training split cut to `images`; the name then says so.

        Classes without a training image, such as gaps in an archive's labels, are named.

        Raises:
            OptionError: there are fewer.
            DataError: see `load`.
        """
        data = self._cut(self.load(progress))
        counts = torch.bincount(data.train.labels, minlength=data.train.num_classes).tolist()
        empty = [name for name, count in zip(data.train.class_names, counts, strict=True) if not count]
        if empty:
            named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            progress.note(f"{len(empty)} of the {len(counts)} classes have no training image: {named}")
        return data

    def _cut(self, data: SourceData) -> SourceData:
        if self.images is None:
            return data
        count = len(data.train)
        if self.images > count:
            raise OptionError(f"images {self.images} is more than the {count} training images of {data.name}")
        return replace(data, name=f"{data.name}-{self.images}", train=data.train.take(self.kept(count)))

    def files(self) -> list[str] | None:
        """Return the file of every training image that `open` returns, where each image has its own."""
        return None

    def kept(self, count: int) -> Tensor:
        """Return which of `count` training images `images` keeps, ascending."""
        if self.images is None:
            return torch.arange(count)
        return torch.randperm(count, generator=generator(0, "images"))[: self.images].sort().values

    def chosen(self) -> dict[str, Any]:
        """Return the options that decide which images there are, where they are not the defaults."""
        return self.model_dump(include={"image_size", "test_fraction", "images"}, exclude_defaults=True)

    @abstractmethod
    def load(self, progress: Progress) -> SourceData:
        """Return both splits.

        Raises:
            DataError: something is missing, unreadable or does not fit; the message names the file.
        """
