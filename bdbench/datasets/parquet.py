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
from bdbench.datasets.decoded import Decoded, check_decoded, remarks_on
from bdbench.datasets.fit import Fit
from bdbench.datasets.images import CHUNK, Encoded, decode_readable, match_channels
from bdbench.datasets.labels import class_names_of, integer_labels, numbered_names, remark_on
from bdbench.datasets.splits import Splits, split_dataset
from bdbench.errors import DataError
from bdbench.limits import CLASSES, ROWS
from bdbench.parquet_files import batches, read_table
from bdbench.progress import Progress
from bdbench.text import printable
from bdbench.wording import were

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
OTHER_LABEL_COLUMNS = ("coarse_label", "target", "class", "category")
"""What label columns are called too; they have to be asked for."""

TEST_NAMES = ("test", "validation", "valid", "val")


class Choices(NamedTuple):
    """What the user of a path may choose: the columns (None: by their usual names), and what happens to bad images."""

    image_column: str | None = None
    label_column: str | None = None
    skip_unreadable: bool = False


def plan_parquet(
    path: Path, name: str, augment: str, fit: Fit | None, test_fraction: float, choices: Choices | None = None
) -> Plan:
    """Plan to read one file, or a folder of shards; without test shards the training shards are split.

    The image column is `image` or `img`, struct<bytes, path> or binary; the label column is `label`, `labels`
    or `fine_label`: integers, text, true/false or one-hot lists. Class names come from the schema's `huggingface`
    metadata or from text, else they are "0".."K-1".

    Args:
        path, name, augment, fit, test_fraction: as for `bdbench.datasets.folder.plan_folder`.
        choices: of the user; None for a registered set, of which nothing can be chosen.

    Raises:
        DataError: the folder has no training shards, or a shard is missing.
    """
    remarks: tuple[str, ...] = ()
    if path.is_dir():
        train, test = _shards(path, ("train",)), _shards(path, TEST_NAMES)
        if not train:
            raise DataError(f"{path}: holds no train-*.parquet; rename the shards or name one file")
        others = sorted({file.name for file in path.glob("*.parquet")} - {file.name for file in (*train, *test)})
        if others and choices is not None:
            remarks = (f"{were(len(others), 'Parquet file')} left out, such as {others[0]}",)
    else:
        train, test = [path], []
    given = {} if choices is None else {key: value for key, value in choices._asdict().items() if value}
    return Plan(
        name=name,
        augment=augment,
        root=path,
        files=(*train, *test),
        options={"layout": "parquet", "fit": str(fit), "test_fraction": None if test else test_fraction, **given},
        decode=partial(_decode, train, test, fit, test_fraction, choices),
        remarks=remarks,
    )


def has_shards(folder: Path) -> bool:
    """Whether a folder holds Parquet shards of a training split."""
    return bool(_matching(folder, "train"))


def shard_folder(path: Path) -> Path | None:
    """Return the folder of the shards: the path, or as in clones from a hub `data`, or the only one with shards.

    Raises:
        DataError: several folders in it have shards.
    """
    if any(path.glob("*.parquet")) or has_shards(path):
        return path
    inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and has_shards(folder)]
    if len(inside) > 1:
        names = ", ".join(folder.name for folder in inside)
        raise DataError(f"{path}: several folders hold Parquet shards ({names}); name one, such as {inside[0]}")
    return inside[0] if inside else None


def _shards(folder: Path, split_names: Sequence[str]) -> list[Path]:
    """Return the shards of the first split name that has any, complete and in order."""
    files = next((found for name in split_names if (found := _matching(folder, name))), [])
    numbers = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)(?:-\w+)?\.parquet$", file.name))]
    if numbers:
        total = int(numbers[0][2])
        missing = sorted(set(range(total)) - {int(match[1]) for match in numbers})
        if missing or len(files) != total:
            absent = f"shard {missing[0]} is missing" if missing else f"there are {len(files)}"
            raise DataError(f"{folder}: {files[0].name} is one of {total} shards, but {absent}; copy exactly these")
    return files


def _matching(folder: Path, split_name: str) -> list[Path]:
    """Return the files of a split: named after it, or in a folder named after it."""
    return sorted(folder.glob(f"{split_name}[-.]*parquet")) or sorted((folder / split_name).glob("*.parquet"))


class _Shard(NamedTuple):
    file: pq.ParquetFile
    path: Path
    image_column: str
    label_column: str
    labels: np.ndarray
    class_names: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return self.path.name


def _decode(
    train: Sequence[Path],
    test: Sequence[Path],
    fit: Fit | None,
    test_fraction: float,
    choices: Choices | None,
    progress: Progress,
) -> Splits:
    train_shards, test_shards = ([_open(file, choices or Choices()) for file in files] for files in (train, test))
    names = _common_names([*train_shards, *test_shards]) or class_names_of([shard.labels for shard in train_shards])
    train_labels, test_labels = _labels(train_shards, names), _labels(test_shards, names)
    names = names or numbered_names(train_labels, test_labels)
    kinds = {"train": (train_shards, train_labels), "test": (test_shards, test_labels)}
    wanted = {split: pair for split, pair in kinds.items() if pair[0]}
    decoded = [_images(shards, fit, split, progress) for split, (shards, _) in wanted.items()]
    count = len(train_labels) + len(test_labels)
    check_decoded(decoded, count, fit, skip_unreadable=None if choices is None else choices.skip_unreadable)
    splits = [
        ImageDataset(found.images, labels[found.rows], names)
        for found, (_, labels) in zip(decoded, wanted.values(), strict=True)
    ]
    first, second = match_channels(*splits) if test else split_dataset(splits[0], test_fraction)
    remarks = (*_column_remarks(train_shards[0]), *remark_on(train_shards[0].labels)) if choices is not None else ()
    left_out = [item.where for found in decoded for item in found.unreadable]
    return Splits(first, second, (*remarks, *remarks_on(decoded, fit)), left_out)


def _open(path: Path, choices: Choices) -> _Shard:
    """Open a file and read its labels."""
    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > ROWS:
            raise DataError(f"{path.name}: has {file.metadata.num_rows:,} rows, at most {ROWS:,} are read; divide it")
        schema = file.schema_arrow
        image_column = _find(schema, IMAGE_COLUMNS, choices.image_column, "--image-column", path)
        label_column = _find(schema, LABEL_COLUMNS, choices.label_column, "--label-column", path)
        labels = read_table(file, path.stat().st_size, [label_column]).column(label_column)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path.name}: cannot be read as Parquet ({_first_line(error)}); fetch it again") from None
    if len(labels) == 0:
        raise DataError(f"{path.name}: has no rows; remove it or fetch it again")
    if labels.null_count:
        row = pc.index(pc.is_null(labels), True).as_py()
        raise DataError(f"{path.name}, row {row}: no label; remove rows without one")
    array = _label_array(labels, f"{path.name}: column {label_column}")
    return _Shard(file, path, image_column, label_column, array, _class_names(schema, label_column))


def _label_array(labels: pa.ChunkedArray, where: str) -> np.ndarray:
    """Return a column of labels: (N,) of integers, text or truth values, or (N, K) of one-hot lists."""
    kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    plain = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if any(is_kind(kind) for is_kind in plain):
        return np.asarray(labels.to_numpy())
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in lists) and not pa.types.is_nested(kind.value_type):
        rows = labels.to_pylist()
        if len({len(row) for row in rows}) == 1 and not any(value is None for row in rows for value in row):
            return np.array(rows)
    raise DataError(f"{where} holds {labels.type}; integers 0..K-1, text, true/false or one-hot lists are needed")


def _find(schema: pa.Schema, usual: Sequence[str], chosen: str | None, flag: str, path: Path) -> str:
    for name in usual if chosen is None else (chosen,):
        count = schema.names.count(name)
        if count > 1:
            raise DataError(f"{path.name}: has {count} columns {printable(name)}; rename one")
        if count:
            return name
    wanted = " or ".join(usual) if chosen is None else chosen
    raise DataError(f"{path.name}: no column {wanted} among {printable(', '.join(schema.names))}; name it with {flag}")


def _column_remarks(shard: _Shard) -> Iterator[str]:
    """Say which columns were taken where there are several."""
    schema = shard.file.schema_arrow
    described = [name for name in schema.names if _class_names(schema, name) is not None]
    usual = {
        "--label-column": (shard.label_column, {*LABEL_COLUMNS, *OTHER_LABEL_COLUMNS, *described}),
        "--image-column": (
            shard.image_column,
            {name for name in schema.names if _holds_bytes(schema.field(name).type)},
        ),
    }
    for flag, (taken, possible) in usual.items():
        others = [name for name in schema.names if name in possible and name != taken]
        if others:
            what = flag.removeprefix("--").replace("-", " ")
            yield f"{what}: {taken}, not {' or '.join(others)} ({flag} chooses)"


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images: text is none, it might be taken for a file's path."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Read the names that Hugging Face stores beside a class label column, if they are there."""
    try:
        described: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(names, list) and len(names) > CLASSES:
        raise DataError(f"{len(names):,} class names; at most {CLASSES:,} are possible")
    return tuple(printable(str(name)) for name in names) if isinstance(names, list) else None


def _common_names(shards: Sequence[_Shard]) -> tuple[str, ...] | None:
    for shard in shards:
        if shard.class_names != shards[0].class_names:
            raise DataError(f"{shard.name}: its class names differ from those of {shards[0].name}; name one dataset")
    return shards[0].class_names


def _labels(shards: Sequence[_Shard], names: Sequence[str] | None) -> Tensor:
    checked = [integer_labels(shard.labels, shard.name, names) for shard in shards]
    return torch.cat([torch.empty(0, dtype=torch.int64), *checked])


def _images(shards: Sequence[_Shard], fit: Fit | None, split: str, progress: Progress) -> Decoded:
    count = sum(len(shard.labels) for shard in shards)
    chunks = (chunk for shard in shards for chunk in _chunks(shard))
    return decode_readable(chunks, count, fit, f"reading {split} images", progress)


def _chunks(shard: _Shard) -> Iterator[list[Encoded]]:
    """Read a file's image bytes, some hundred rows at a time."""
    column = shard.image_column
    kind = shard.file.schema_arrow.field(column).type
    nested = pa.types.is_struct(kind)
    if not _holds_bytes(kind):
        raise DataError(f"{shard.name}: column {column} holds {kind}; struct<bytes, path> or binary is needed")
    row = 0
    try:
        part = f"{column}.bytes" if nested else column
        for batch in batches(shard.file, shard.path.stat().st_size, [part], CHUNK):
            found = batch.column(column)
            values = pc.struct_field(found, "bytes") if nested else found
            yield [
                Encoded(f"{shard.name}, row {row + offset}", value) for offset, value in enumerate(values.to_pylist())
            ]
            row += len(values)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{shard.name}: damaged after row {row} ({_first_line(error)}); fetch it again") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
