"""A source named by its path: image folder, Parquet or NumPy archive, whichever lies there."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from bdbench.data import SourceData
from bdbench.datasets.base import Source
from bdbench.datasets.cache import load_cached
from bdbench.datasets.fit import Fit
from bdbench.errors import DataError, OptionError
from bdbench.files import expanded
from bdbench.progress import Progress
from bdbench.text import printable

AUGMENT = "crop"
"""Nothing is mirrored: of unknown images left and right may be what tells the classes apart."""

AUGMENT_REMARK = (
    f"augmentation in training: {AUGMENT}, nothing mirrored; train and defend --augment crop,flip mirrors too"
)

LONGEST_NAME = 96
"""Bytes of a display name: names of artifacts add to it, and file systems take 255."""

KNOWN = "an image folder with one folder per class, .parquet or .npz"

PICKLES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib"})


class PathSource(Source):
    """Images of your own: a folder with one folder per class, Parquet in the Hugging Face layout, or .npz."""

    deciding: ClassVar[set[str]] = {*Source.deciding, "image_column", "label_column", "skip_unreadable"}

    path: Path = Field(description=f"Where the images lie: {KNOWN}.")
    image_column: str | None = Field(None, description="Image column of Parquet files; default: image or img.")
    label_column: str | None = Field(
        None, description="Label column of Parquet files; default: label, labels or fine_label."
    )
    skip_unreadable: bool = Field(False, description="Leave out images that cannot be read, and name them.")

    def load(self, progress: Progress) -> SourceData:
        """Return both splits; the name is the path's (see `display_name`)."""
        path = expanded(self.path)
        layout = _layout(path)
        self._check_choices(layout)
        fit = None if self.image_size is None else Fit(self.image_size)
        name = display_name(path)
        if layout == "parquet":
            from bdbench.datasets.parquet import Choices, plan_parquet, shard_folder

            place = (shard_folder(path) or path) if path.is_dir() else path
            choices = Choices(self.image_column, self.label_column, self.skip_unreadable)
            plan = plan_parquet(place, name, AUGMENT, fit, self.test_fraction, choices)
        elif layout == "npz":
            from bdbench.datasets.npz import plan_npz

            plan = plan_npz(path, name, AUGMENT, fit, self.test_fraction)
        else:
            from bdbench.datasets.folder import plan_folder

            plan = plan_folder(path, name, AUGMENT, fit, self.test_fraction, skip_unreadable=self.skip_unreadable)
        found = load_cached(plan, progress)
        return replace(found, remarks=(*found.remarks, AUGMENT_REMARK))

    def _check_choices(self, layout: str) -> None:
        """Refuse what has no meaning for files of this kind."""
        if layout != "parquet" and (self.image_column or self.label_column):
            flag = "--image-column" if self.image_column else "--label-column"
            kind = "an image folder" if layout == "folder" else "an .npz file"
            raise OptionError(f"{flag} is for Parquet files; {self.path} is {kind}")
        if layout == "npz" and self.skip_unreadable:
            raise OptionError(
                f"--skip-unreadable is for image files and Parquet; {self.path} is an .npz file of pixels"
            )

    def files(self, source: SourceData) -> list[str] | None:
        """See `Source.files`: an image folder has them, relative to it."""
        path = expanded(self.path)
        if _layout(path) != "folder":
            return None
        from bdbench.datasets.folder import training_files

        names = training_files(path, self.test_fraction, source.unreadable)
        return [printable(names[row]) for row in self.kept(len(names)).tolist()]


def display_name(path: Path) -> str:
    """Return a path's last part without suffix, as a name that every file system takes: ``My Pets.npz``: ``My-Pets``.

    Letters, digits, symbols and marks of all scripts stay, in Unicode's NFC. Spaces, control characters and ASCII
    punctuation but _ and - become -. A name that is too long is cut and ends with a part of its hash.
    """
    full = path.resolve()
    stem = unicodedata.normalize("NFC", full.name if full.is_dir() else full.stem)
    name = "-".join("".join(char if _stays(char) else " " for char in stem).split()).strip("-")
    if not name:
        return f"images-{_hash_of(stem)}" if stem else "images"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    ending = f"-{_hash_of(name)}"
    return name.encode()[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


def _stays(char: str) -> bool:
    if char.isascii():
        return char.isalnum() or char in "_-"
    return unicodedata.category(char)[0] in "LNMS"


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def _layout(path: Path) -> Literal["folder", "parquet", "npz"]:
    """Say what lies at a path."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name {KNOWN}")
    if path.is_dir():
        try:
            entries = list(path.iterdir())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        if not entries:
            raise DataError(f"{path}: the folder is empty; name {KNOWN}")
        from bdbench.datasets.parquet import shard_folder

        return "folder" if shard_folder(path) is None else "parquet"
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(f"{path}: pickles can run code and are never opened; save the images as {KNOWN}")
    if suffix == ".parquet":
        return "parquet"
    if suffix == ".npz":
        return "npz"
    raise DataError(f"{path}: cannot tell what this is; name {KNOWN}")
