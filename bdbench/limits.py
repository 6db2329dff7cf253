"""How much a file or a flag from outside may ask for. Beyond a limit is an error that names it, never a long wait."""

from __future__ import annotations

TEXT_BYTES = 16 * 2**20
"""Bytes of a JSON or TOML file."""
SEEDS = 10_000
"""Seeds of a sweep."""
CELLS = 100_000
"""Runs of a sweep."""
IMAGE_SIDE = 16_384
"""Pixels of a side of an image in an artifact."""
IMAGE_VALUES = 3 * 4096 * 4096
"""Values (channels times height times width) of an image in an artifact."""
CLASSES = 100_000
"""Classes of a dataset; a label above it is taken for damage."""
PIXELS = 2**27
"""Pixels of an encoded image; cameras of today reach 108 million."""
LARGE_PIXELS = 2**24
"""Pixels of an encoded image above which images are decoded one at a time."""
WAITING_BYTES = 2**29
"""Bytes of encoded images in memory that wait to be decoded."""
ROWS = 20_000_000
"""Rows of a Parquet file."""
ARCHIVE_BYTES = 2**28
"""Bytes of the arrays of an npz archive, or of the columns of a Parquet file, that may be packed as tightly as they can
be.
"""
ARCHIVE_RATIO = 200
"""Bytes of larger arrays or columns for each byte of the file."""
BATCH_BYTES = 2**30
"""Bytes that the rows of a Parquet file may become that are read at once."""
MEMORY_GB = 1_000_000
"""Gigabytes of memory that a flag may speak of."""
