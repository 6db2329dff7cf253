"""An opened artifact: its files are checked against the manifest when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from bdbench.artifacts.store import Draft, unknown_files
from bdbench.errors import ArtifactError, DamagedError
from bdbench.limits import ROWS
from bdbench.parquet_files import read_table

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "train.parquet": {"label": "integer"},
    "test.parquet": {"label": "integer"},
    "trusted.parquet": {"label": "integer"},
    "triggered.parquet": {"label": "integer", "test_row": "integer"},
    "truth.parquet": {"clean_label": "integer", "role": "integer", "source_row": "integer"},
    "places.parquet": {"file": "text"},
    "history.parquet": {
        "phase": "text", "epoch": "integer", "loss": "number", "lr": "number", "images_per_second": "number",
        "seconds": "number",
    },
    "samples.parquet": {"row": "integer", "score": "number", "set_aside": "truth"},
    "rounds.parquet": {"phase": "text", "epoch": "integer", "row": "integer"},
    "null.parquet": {"row": "integer", "score": "number"},
    "classes.parquet": {"label": "integer", "statistic": "number", "deviations": "number", "p": "number"},
    "predictions.parquet": {
        "split": "text", "row": "integer", "label": "integer", "clean_label": "integer", "prediction": "integer",
        "confidence": "number",
    },
    "metrics.parquet": {
        "metric": "text", "value": "number", "low": "number", "high": "number", "numerator": "integer",
        "denominator": "integer",
    },
    "epochs.parquet": {
        "phase": "text", "epoch": "integer", "metric": "text", "value": "number", "low": "number", "high": "number",
        "numerator": "integer", "denominator": "integer",
    },
}  # fmt: skip
"""Columns that each Parquet file must have, and of which type."""

LATER: Mapping[str, Mapping[str, str]] = {"history.parquet": {"step": "integer"}}
"""Columns that files of older releases lack."""

TYPES: Mapping[str, Callable[[pa.DataType], bool]] = {
    "integer": pa.types.is_integer,
    "number": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "truth": pa.types.is_boolean,
}


def _check_columns(schema: pa.Schema, file: str) -> None:
    """Refuse a table that lacks a column, has one twice, or holds something else in it."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"it has {schema.names.count(twice[0])} columns '{twice[0]}'")
    needed, later = COLUMNS.get(file, {}), LATER.get(file, {})
    for name, kind in {**needed, **later}.items():
        if name not in schema.names and name in needed:
            raise ValueError(f"it has no column '{name}'")
        if name in schema.names and not TYPES[kind](schema.field(name).type):
            raise ValueError(f"its column '{name}' holds {schema.field(name).type}, not {kind}")


def _check_rows(count: int) -> None:
    if count > ROWS:
        raise ValueError(f"it has {count:,} rows, more than {ROWS:,}")


def _check_gaps(table: pa.Table, name: str) -> None:
    """Refuse a table that lacks in some rows what every row has; a number may be absent where it does not apply."""
    for column, kind in COLUMNS.get(name, {}).items():
        optional = kind == "number" or (name == "metrics.parquet" and kind == "integer")
        if column in table.column_names and not optional and table[column].null_count:
            raise ValueError(f"its column '{column}' has gaps")


class Artifact:
    """A sealed folder; its files are checked against the manifest when they are first read.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        is_new: the stage that returned it made it; what was there already is not new.
    """

    kind: ClassVar[Kind]

    def __init__(self, path: Path, manifest: Manifest, *, is_new: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.is_new = is_new

    def __repr__(self) -> str:
        """Say what it is, where it lies and how it was made."""
        asked = self.manifest.ask
        return f"{type(self).__name__}('{self.path}', {asked.method}, seed {asked.seed}, id {self.id})"

    @classmethod
    def open(cls, path: Path, *, is_new: bool = False) -> Self:
        """Open an artifact of this kind.

        Raises:
            ArtifactError: see `bdbench.artifacts.manifests.read_manifest`.
        """
        return cls(path, manifests.read_manifest(path, cls.kind), is_new=is_new)

    @property
    def id(self) -> str:
        """The hash of what was asked."""
        return self.manifest.id

    def option(self, name: str) -> Any:  # noqa: ANN401 - any option's value
        """Return what was asked of an option.

        Raises:
            DamagedError: the manifest does not say it.
        """
        return self._asked("config", name)

    def made_from(self, name: str) -> str:
        """Return the id of an artifact that it was made from: dataset, model or suspect.

        Raises:
            DamagedError: the manifest does not say it.
        """
        return str(self._asked("inputs", name))

    def _asked(self, part: str, name: str) -> Any:  # noqa: ANN401 - JSON
        try:
            return getattr(self.manifest.ask, part)[name]
        except KeyError:
            message = f"{self.path / manifests.MANIFEST} does not say the {name} that was asked; {AGAIN}"
            raise DamagedError(self.path, message) from None

    def verify(self) -> None:
        """Check every file's hash.

        Raises:
            ArtifactError: a file is missing, changed, or not in the manifest.
        """
        for name in self.manifest.files:
            manifests.checked_file(self.path, self.manifest, name)
        if extra := unknown_files(self.path, self.manifest):
            raise ArtifactError(f"{self.path} holds files that its manifest does not know: {', '.join(extra)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a safetensors file, memory-mapped, after checking its hash."""
        try:
            return load_file(manifests.checked_file(self.path, self.manifest, name))
        except SafetensorError as error:
            message = f"{self.path / name} is not a safetensors file ({error}); {AGAIN}"
            raise DamagedError(self.path, message) from error

    def frame(self, name: str) -> pd.DataFrame:
        """Read a Parquet file after checking its hash."""
        table = self._table(name)
        try:
            return cast("pd.DataFrame", table.to_pandas())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
            # Pandas believes what the file says of columns and index.
            message = f"{self.path / name} does not describe its columns ({type(error).__name__}); {AGAIN}"
            raise DamagedError(self.path, message) from error

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read the rows of a small Parquet file after checking its hash: five times faster than `frame`."""
        return cast("list[dict[str, Any]]", self._table(name).to_pylist())

    def column(self, name: str, column: str) -> Tensor:
        """Read one column of a Parquet file after checking its hash."""
        return torch.from_numpy(self._table(name, [column])[column].to_numpy().copy())

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        try:
            file = pq.ParquetFile(manifests.checked_file(self.path, self.manifest, name))
            _check_columns(file.schema_arrow, name)
            _check_rows(file.metadata.num_rows)
            table = read_table(file, self.manifest.files[name]["bytes"], columns)
            _check_gaps(table, name)
        except (ValueError, OSError, pa.ArrowException) as error:
            message = f"{self.path / name} is not a Parquet file of the form that it should have ({error}); {AGAIN}"
            raise DamagedError(self.path, message) from error
        return table


def checked_samples(artifact: Artifact, count: int) -> pd.DataFrame:
    """Return the scores of an artifact: row, score, set_aside of `count` training samples.

    Raises:
        DamagedError: there are scores of other rows, or one is no number.
    """
    path, samples = artifact.path, artifact.frame("samples.parquet")
    if samples["row"].tolist() != list(range(count)):
        raise DamagedError(path, f"{path} scored {len(samples)} samples, not these {count}; {AGAIN}")
    if not np.isfinite(samples["score"]).all():
        raise DamagedError(path, f"{path} has a score that is no number; {AGAIN}")
    return samples


def write_frame(draft: Draft, name: str, columns: Mapping[str, Tensor]) -> None:
    """Write columns of N values each as a Parquet file of a draft, with the number of each row."""
    count = len(next(iter(columns.values())))
    table = {"row": np.arange(count), **{key: value.numpy() for key, value in columns.items()}}
    pq.write_table(pa.table(table), draft.folder / name)
