"""Parquet files in the Hugging Face image layout: one file, or a folder of `train-*` and `test-*` shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.datasets.cache import Plan
from bdbench.datasets.images import CHUNK, Encoded, Fit, decode_images, match_channels
from bdbench.datasets.labels import check_labels, numbered_names
from bdbench.datasets.splits import split_dataset
from bdbench.errors import DataError
from bdbench.progress import Progress

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_NAMES = ("test", "validation", "valid", "val")


def plan_parquet(path: Path, name: str, augment: str, fit: Fit | None, test_fraction: float) -> Plan:
    """Plan to read one file, or a folder of shards; without test shards the training shards are split.

    The image column is `image` or `img`, struct<bytes, path> or binary; the label column is `label`, `labels`
    or `fine_label`, integers. Class names come from the schema's `huggingface` metadata, else "0".."K-1".

    Raises:
        DataError: the folder has no training shards, or a shard is missing.
    """
    if path.is_dir():
        train, test = _shards(path, ("train",)), _shards(path, TEST_NAMES)
        if not train:
            raise DataError(f"{path}: holds no train-*.parquet; rename the shards or name one file")
    else:
        train, test = [path], []
    return Plan(
        name=name,
        augment=augment,
        root=path,
        files=(*train, *test),
        options={"layout": "parquet", "fit": str(fit), "test_fraction": None if test else test_fraction},
        decode=partial(_decode, train, test, fit, test_fraction),
    )


def has_shards(folder: Path) -> bool:
    """Whether a folder holds Parquet shards of a training split."""
    return bool(_matching(folder, "train"))


def _shards(folder: Path, split_names: Sequence[str]) -> list[Path]:
    """Return the shards of the first split name that has any, complete and in order."""
    files = next((found for name in split_names if (found := _matching(folder, name))), [])
    numbers = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name))]
    if numbers:
        total = int(numbers[0][2])
        missing = sorted(set(range(total)) - {int(match[1]) for match in numbers})
        if missing or len(files) != total:
            absent = f"shard {missing[0]} is missing" if missing else f"there are {len(files)}"
            raise DataError(f"{folder}: {files[0].name} is one of {total} shards, but {absent}; copy exactly these")
    return files


def _matching(folder: Path, split_name: str) -> list[Path]:
    return sorted(folder.glob(f"{split_name}[-.]*parquet"))


class _Shard(NamedTuple):
    file: pq.ParquetFile
    name: str
    image_column: str
    labels: np.ndarray
    class_names: tuple[str, ...] | None


def _decode(
    train: Sequence[Path], test: Sequence[Path], fit: Fit | None, test_fraction: float, progress: Progress
) -> tuple[ImageDataset, ImageDataset]:
    train_shards, test_shards = [_open(file) for file in train], [_open(file) for file in test]
    names = _common_names([*train_shards, *test_shards])
    train_labels, test_labels = _labels(train_shards, names), _labels(test_shards, names)
    names = names or numbered_names(train_labels, test_labels)
    data = ImageDataset(_images(train_shards, fit, "train", progress), train_labels, names)
    if not test:
        return split_dataset(data, test_fraction)
    return match_channels(data, ImageDataset(_images(test_shards, fit, "test", progress), test_labels, names))


def _open(path: Path) -> _Shard:
    """Open a file and read its labels."""
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        image_column = _find(schema, IMAGE_COLUMNS, path)
        label_column = _find(schema, LABEL_COLUMNS, path)
        labels = file.read(columns=[label_column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name}: cannot be read as Parquet ({_first_line(error)}); fetch it again") from None
    if len(labels) == 0:
        raise DataError(f"{path.name}: has no rows; remove it or fetch it again")
    if not pa.types.is_integer(labels.type):
        raise DataError(f"{path.name}: column {label_column} holds {labels.type}; integers 0..K-1 are needed")
    if labels.null_count:
        row = pc.index(pc.is_null(labels), True).as_py()
        raise DataError(f"{path.name}, row {row}: no label; remove rows without one")
    return _Shard(file, path.name, image_column, labels.to_numpy(), _class_names(schema, label_column))


def _find(schema: pa.Schema, wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in schema.names:
            return name
    raise DataError(f"{path.name}: no column {' or '.join(wanted)} among {', '.join(schema.names)}; rename the column")


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Read the names that Hugging Face stores beside a class label column, if they are there."""
    try:
        described: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) else None


def _common_names(shards: Sequence[_Shard]) -> tuple[str, ...] | None:
    for shard in shards:
        if shard.class_names != shards[0].class_names:
            raise DataError(f"{shard.name}: its class names differ from those of {shards[0].name}; name one dataset")
    return shards[0].class_names


def _labels(shards: Sequence[_Shard], names: Sequence[str] | None) -> Tensor:
    checked = [check_labels(shard.labels, shard.name, names) for shard in shards]
    return torch.cat([torch.empty(0, dtype=torch.int64), *checked])


def _images(shards: Sequence[_Shard], fit: Fit | None, split: str, progress: Progress) -> Tensor:
    count = sum(len(shard.labels) for shard in shards)
    chunks = (chunk for shard in shards for chunk in _chunks(shard))
    return decode_images(chunks, count, fit, f"reading {split} images", progress)


def _chunks(shard: _Shard) -> Iterator[list[Encoded]]:
    """Read a file's image bytes, some hundred rows at a time."""
    column = shard.image_column
    kind = shard.file.schema_arrow.field(column).type
    nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not nested and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        raise DataError(f"{shard.name}: column {column} holds {kind}; struct<bytes, path> or binary is needed")
    row = 0
    try:
        for batch in shard.file.iter_batches(CHUNK, columns=[f"{column}.bytes" if nested else column]):
            values = pc.struct_field(batch.column(0), "bytes") if nested else batch.column(0)
            yield [_encoded(value, shard.name, row + offset) for offset, value in enumerate(values.to_pylist())]
            row += len(values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shard.name}: damaged after row {row} ({_first_line(error)}); fetch it again") from None


def _encoded(content: bytes | None, name: str, row: int) -> Encoded:
    where = f"{name}, row {row}"
    if not content:
        raise DataError(f"{where}: no image bytes; store the images inside the Parquet file")
    return Encoded(where, content)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
