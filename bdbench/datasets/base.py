"""What every source of images offers: options in, both splits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from pydantic import Field

from bdbench.data import SourceData
from bdbench.options import Options
from bdbench.progress import Progress


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

    @abstractmethod
    def load(self, progress: Progress) -> SourceData:
        """Return both splits.

        Raises:
            DataError: something is missing, unreadable or does not fit; the message names the file.
        """
