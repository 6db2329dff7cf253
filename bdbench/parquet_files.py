"""Parquet files from outside: read in parts, within what their few bytes may become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bdbench.limits import ARCHIVE_BYTES, ARCHIVE_RATIO, BATCH_BYTES

BATCH_ROWS = 65_536
EXPANDING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}
"""Encodings in which many values share the bytes of one."""
SHARED = {"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"}
"""Types whose values may be of any length."""


def read_table(file: pq.ParquetFile, packed: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Return columns of a file.

    Args:
        file: from outside.
        packed: its bytes.
        columns: their names; None for all.

    Raises:
        ValueError: see `batches`.
    """
    rows = file.metadata.num_rows
    if rows * _largest_value(file, columns) + 8 * _values(file, columns) <= ARCHIVE_BYTES:
        return file.read(columns)
    found = list(batches(file, packed, columns))
    return pa.Table.from_batches(found) if found else file.read(columns)


def batches(
    file: pq.ParquetFile, packed: int, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Read columns some rows at a time, fewer where the file says that a value may be large.

    Args:
        file, packed, columns: as for `read_table`; of a column of structs also a part of it, such as ``image.bytes``.
        rows: at once, at the most.

    Raises:
        ValueError: they become much larger than the file.
    """
    at_once = max(1, min(rows, BATCH_BYTES // max(1, _largest_value(file, columns))))
    unpacked = 0
    for batch in file.iter_batches(at_once, columns=columns):
        unpacked += sum(map(_bytes, batch.columns))
        if unpacked > ARCHIVE_BYTES and unpacked > ARCHIVE_RATIO * packed:
            raise ValueError(
                f"its values have {unpacked // max(packed, 1):,} times the bytes of the file, at most "
                f"{ARCHIVE_RATIO} times are read"
            )
        yield batch


def _bytes(column: pa.Array) -> int:
    """Return the bytes of a column where every row has its own."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    shared = column.dictionary
    if not (pa.types.is_string(shared.type) or pa.types.is_binary(shared.type)):
        return 8 * len(column)
    return int(pc.sum(pc.binary_length(shared).take(column.indices)).as_py() or 0)


def _largest_value(file: pq.ParquetFile, columns: Sequence[str] | None) -> int:
    """Return the most bytes that one of many values may have, by what the file says."""
    sizes = (
        chunk.total_uncompressed_size
        for chunk in _chunks(file, columns)
        if chunk.physical_type in SHARED and EXPANDING & set(chunk.encodings)
    )
    return max(sizes, default=0)


def _values(file: pq.ParquetFile, columns: Sequence[str] | None) -> int:
    """Return how many values columns have, those in lists too, by what the file says."""
    return sum(chunk.num_values for chunk in _chunks(file, columns))


def _chunks(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[pq.ColumnChunkMetaData]:
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        for place in range(described.num_columns):
            chunk = described.column(place)
            path = chunk.path_in_schema
            if columns is None or any(path == name or path.startswith(f"{name}.") for name in columns):
                yield chunk
