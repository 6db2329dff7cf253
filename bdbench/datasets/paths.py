"""A source named by its path: image folder, Parquet or NumPy archive, whichever lies there."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from bdbench.data import SourceData
from bdbench.datasets.base import Source
from bdbench.datasets.cache import load_cached
from bdbench.datasets.images import Fit
from bdbench.errors import DataError
from bdbench.progress import Progress

AUGMENT = "crop,flip"

KNOWN = "an image folder with one folder per class, .parquet or .npz"

PICKLES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib"})


class PathSource(Source):
    """Images of your own: a folder with one folder per class, Parquet in the Hugging Face layout, or .npz."""

    path: Path = Field(description=f"Where the images lie: {KNOWN}.")

    def load(self, progress: Progress) -> SourceData:
        """Return both splits; the name is the path's, in lower case and safe characters."""
        path = self.path.expanduser()
        layout = _layout(path)
        fit = None if self.image_size is None else Fit(self.image_size)
        arguments = (path, display_name(path), AUGMENT, fit, self.test_fraction)
        if layout == "parquet":
            from bdbench.datasets.parquet import plan_parquet

            return load_cached(plan_parquet(*arguments), progress)
        if layout == "npz":
            from bdbench.datasets.npz import plan_npz

            return load_cached(plan_npz(*arguments), progress)
        from bdbench.datasets.folder import plan_folder

        return load_cached(plan_folder(*arguments), progress)

    def files(self) -> list[str] | None:
        """See `Source.files`: an image folder has them, relative to it."""
        path = self.path.expanduser()
        if _layout(path) != "folder":
            return None
        from bdbench.datasets.folder import training_files

        names = training_files(path, self.test_fraction)
        return [names[row] for row in self.kept(len(names)).tolist()]


def display_name(path: Path) -> str:
    """Return a path's last part without suffix, in a-z, 0-9, _ and -: ``My Pets.npz`` gives ``my-pets``."""
    full = path.resolve()
    stem = full.name if full.is_dir() else full.stem
    return re.sub(r"[^a-z0-9_]+", "-", stem.lower()).strip("-") or "images"


def _layout(path: Path) -> str:
    """Decide between "folder", "parquet" and "npz"."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name {KNOWN}")
    if path.is_dir():
        if not any(path.iterdir()):
            raise DataError(f"{path}: the folder is empty; name {KNOWN}")
        return "parquet" if any(path.glob("*.parquet")) else "folder"
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(f"{path}: pickles can run code and are never opened; save the images as {KNOWN}")
    if suffix not in (".parquet", ".npz"):
        raise DataError(f"{path}: cannot tell what this is; name {KNOWN}")
    return suffix[1:]
