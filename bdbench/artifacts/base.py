"""An opened artifact: its files are checked against the manifest when they are first read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bdbench.artifacts import manifests
from bdbench.artifacts.manifests import AGAIN, Kind, Manifest
from bdbench.artifacts.store import Draft
from bdbench.errors import ArtifactError


class Artifact:
    """A sealed folder; its files are checked against the manifest when they are first read.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
    """

    kind: ClassVar[Kind]

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an artifact of this kind.

        Raises:
            ArtifactError: see `bdbench.artifacts.manifests.read_manifest`.
        """
        return cls(path, manifests.read_manifest(path, cls.kind))

    @property
    def id(self) -> str:
        """The hash of what was asked."""
        return self.manifest.id

    def verify(self) -> None:
        """Check every file's hash.

        Raises:
            ArtifactError: a file is missing, changed, or not in the manifest.
        """
        for name in self.manifest.files:
            manifests.checked_file(self.path, self.manifest, name)
        extra = sorted({file.name for file in self.path.iterdir()} - {manifests.MANIFEST, *self.manifest.files})
        if extra:
            raise ArtifactError(f"{self.path} holds files that its manifest does not know: {', '.join(extra)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a safetensors file, memory-mapped, after checking its hash."""
        try:
            return load_file(manifests.checked_file(self.path, self.manifest, name))
        except SafetensorError as error:
            raise ArtifactError(f"{self.path / name} is not a safetensors file ({error}); {AGAIN}") from error

    def frame(self, name: str) -> pd.DataFrame:
        """Read a Parquet file after checking its hash."""
        return cast("pd.DataFrame", self._table(name).to_pandas())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read the rows of a small Parquet file after checking its hash: five times faster than `frame`."""
        return cast("list[dict[str, Any]]", self._table(name).to_pylist())

    def column(self, name: str, column: str) -> Tensor:
        """Read one column of a Parquet file after checking its hash."""
        return torch.from_numpy(self._table(name, [column])[column].to_numpy().copy())

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.ParquetFile(manifests.checked_file(self.path, self.manifest, name)).read(columns)
        except (ValueError, OSError) as error:
            raise ArtifactError(f"{self.path / name} is not a Parquet file ({error}); {AGAIN}") from error


def write_frame(draft: Draft, name: str, columns: Mapping[str, Tensor]) -> None:
    """Write columns of N values each as a Parquet file of a draft, with the number of each row."""
    count = len(next(iter(columns.values())))
    table = {"row": np.arange(count), **{key: value.numpy() for key, value in columns.items()}}
    pq.write_table(pa.table(table), draft.folder / name)
