"""Data that somebody prepared: it starts nothing, opens nothing else, and asks for no more than there is."""

from __future__ import annotations

import io
import json
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image
from test_datasets import LABELS, gray_images, load, picture, png, write_folder, write_npz, write_parquet

from bdbench import parquet_files
from bdbench.datasets import images as decoding
from bdbench.datasets import opening
from bdbench.datasets.opening import open_image
from bdbench.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


# images


def test_postscript_never_reaches_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    Image.init()
    for content in (EPS, tmp_path / "x.png"):
        (tmp_path / "x.png").write_bytes(EPS)
        with pytest.raises(opening.DECODING_ERRORS), open_image(content) as image:
            image.load()


def test_what_is_no_file_is_not_opened_as_an_image() -> None:
    with pytest.raises(ValueError, match="not a file"):
        open_image(Path("/dev/zero"))


def huge_png(side: int) -> bytes:
    """A PNG of few bytes that claims `side` x `side` gray pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_an_image_of_too_many_pixels_is_named_before_it_is_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", each=6)
    (root / "cat" / "0.png").write_bytes(huge_png(12_000))
    with pytest.raises(DataError, match=r"cat/0\.png: .*12000x12000 pixels; at most 134,217,728 are decoded"):
        load(root)


def test_many_large_images_are_refused_by_their_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "memory_bytes", lambda: 10**9)
    root = tmp_path / "set"
    for row in range(10):
        place = root / "ab"[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.png").write_bytes(huge_png(11_000))
    with pytest.raises(DataError, match=r"10 images of 11000x11000 pixels need up to 3\.6 GB.* 1\.0 GB of memory"):
        load(root)


def test_encoded_images_wait_in_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    content, taken = png(picture(size=(64, 64))) + bytes(5000), []

    def chunks() -> Iterator[list[decoding.Encoded]]:
        for row in range(20):
            taken.append(row)
            yield [decoding.Encoded(f"row {row}", content)]

    monkeypatch.setattr(decoding, "cores", lambda: 16)
    monkeypatch.setattr(decoding, "WAITING_BYTES", 3 * len(content))
    next(decoding._decode_in_order(chunks(), None, 10**6, threading.Event()))
    assert taken == [0, 1, 2, 3]


def test_an_image_size_that_needs_more_memory_than_there_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "memory_bytes", lambda: 10**7)
    with pytest.raises(DataError, match=r"set: 6 images of 1024x1024 pixels need up to 0\.0 GB"):
        load(write_folder(tmp_path / "set"), image_size=1024)


def test_text_in_a_png_cannot_fill_the_memory(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", each=6)
    content = (root / "cat" / "0.png").read_bytes()
    body = b"a\0\0" + zlib.compress(b"A" * 2**24)
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    (root / "cat" / "0.png").write_bytes(content[:33] + text + content[33:])
    with pytest.raises(DataError, match=r"cat/0\.png: cannot be read as an image \(.*too large"):
        load(root)


# npz


def npy(header: str, body: bytes = b"\1" * 384) -> bytes:
    """An array file whose header says what it likes."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


def write_members(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


SAID = "{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "header",
    [
        *(SAID.format(descr="'|u1'", shape=shape) for shape in ("(10**12,)", "(1000000000000,)", "(-1, 8, 8)")),
        *(SAID.format(descr="'|u1'", shape=shape) for shape in ("(6, 100000, 100000)", "(4611686018427387904, 8, 8)")),
        SAID.format(descr="'|u1'", shape="(" + "9" * 5000 + ",)"),
        SAID.format(descr="[('a', '|u1', (1000000, 1000000))]", shape="(6, 8, 8)"),
        SAID.format(descr="[" * 100 + "]" * 100, shape="(6, 8, 8)"),
        "((((",
        "(" * 5000,
        "{",
        "__import__('os').system('id')",
        "0" * 9000,
    ],
    ids=lambda header: header[:60],
)
def test_npz_headers_ask_for_no_more_than_the_archive_holds(tmp_path: Path, header: str) -> None:
    labels = io.BytesIO()
    np.save(labels, np.array(LABELS))
    with pytest.raises(DataError, match=r"set\.npz: "):
        load(write_members(tmp_path / "set.npz", images=npy(header), labels=labels.getvalue()))


def test_an_npz_that_asks_for_more_than_it_holds_says_so(tmp_path: Path) -> None:
    archive = write_members(tmp_path / "set.npz", images=npy(SAID.format(descr="'|u1'", shape="(7, 8, 8)")), labels=b"")
    with pytest.raises(DataError, match=r"images asks for 448 bytes, the archive holds 384"):
        load(archive)


def test_npz_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdbench.datasets.npz.ARCHIVE_BYTES", 2**20)
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((20_000, 28, 28), np.uint8), labels=np.arange(20_000) % 2)
    with pytest.raises(DataError, match=r"its arrays have .* times the bytes of the file"):
        load(tmp_path / "set.npz")


def test_an_encrypted_npz_is_an_error(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=gray_images(), labels=LABELS)
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[start] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="encrypted"):
        load(path)


# Parquet


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ("secret.png", pa.struct([("bytes", pa.string()), ("path", pa.string())])),
        ("secret.png", pa.struct([("path", pa.string())])),
        ("secret.png", pa.string()),
    ],
)
def test_text_in_a_parquet_file_is_never_a_path(tmp_path: Path, values: str, kind: pa.DataType) -> None:
    secret = tmp_path / values
    secret.write_bytes(png(picture(7)))
    value = {field.name: str(secret) for field in kind} if pa.types.is_struct(kind) else str(secret)
    table = pa.table({"image": pa.array([value] * 6, kind), "label": pa.array(LABELS)})
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(DataError, match=r"column image holds .*; struct<bytes, path> or binary is needed"):
        load(tmp_path / "set.parquet")


def test_the_path_of_a_parquet_image_is_only_a_name(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(picture(200)))
    images = [{"bytes": png(picture(row)), "path": str(tmp_path / "secret.png")} for row in range(6)]
    source = load(write_parquet(tmp_path / "set.parquet", images=images))
    assert sorted(torch.cat([source.train.images, source.test.images])[:, 0, 0, 0].tolist()) == list(range(6))
    images[0]["bytes"] = None
    with pytest.raises(DataError, match=r"row 0: .*no image bytes"):
        load(write_parquet(tmp_path / "other.parquet", images=images))


@pytest.mark.parametrize("twice", ["image", "label"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, twice: str) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    table = pq.ParquetFile(path).read()
    pq.write_table(table.append_column(twice, table.column(twice)), path)
    with pytest.raises(DataError, match=rf"set\.parquet: has 2 columns {twice}; rename one"):
        load(path)


def test_columns_whose_names_look_like_parts_of_others_are_told_apart(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    table = pq.ParquetFile(path).read().add_column(0, "image.bytes", pa.array([png(picture(99))] * 6))
    pq.write_table(table.add_column(0, "label.x", pa.array([0] * 6)), path)
    source = load(path)
    assert 99 not in source.train.images


def test_rows_that_cost_nothing_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdbench.datasets.parquet.ROWS", 5)
    with pytest.raises(DataError, match=r"set\.parquet: has 6 rows, at most 5 are read"):
        load(write_parquet(tmp_path / "set.parquet"))


@pytest.mark.parametrize("described", ["[" * 100_000, '{"info": ' * 3000, "9" * 5000, "\ud800"])
def test_odd_notes_beside_a_parquet_table_name_no_classes(tmp_path: Path, described: str) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    table = pq.ParquetFile(path).read()
    pq.write_table(table.replace_schema_metadata({"huggingface": described.encode(errors="surrogatepass")}), path)
    assert load(path).train.class_names == ("0", "1")


def test_more_class_names_than_an_artifact_takes_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    table = pq.ParquetFile(path).read()
    said = json.dumps({"info": {"features": {"label": {"names": ["x"] * 100_001}}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), path)
    with pytest.raises(DataError, match="100,001 class names; at most 100,000"):
        load(path)


@pytest.mark.parametrize("name", ["set.npz", "set.parquet"])
def test_what_is_no_file_is_never_read_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(DataError, match=r"is not a file"):
        load(tmp_path / name)


# values that many rows share


def shared_parquet(path: Path, column: str, kind: pa.DataType, stored: bool = False) -> Path:
    """A table of 400 rows, in one column of which all share one value of 50 KB, packed to nothing."""
    columns = {"image": pa.array([png(picture())] * 400, pa.binary()), "label": pa.array(["a", "b"] * 200)}
    value = b"x" * 50_000 if column == "image" else "x" * 50_000
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array([value], kind))
    pq.write_table(pa.table(columns | {column: shared}), path, compression="zstd", store_schema=stored)
    return path


@pytest.mark.parametrize(
    ("column", "kind", "stored"),
    [("image", pa.binary(), False), ("label", pa.string(), False), ("label", pa.string(), True)],
)
def test_values_that_many_rows_share_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, kind: pa.DataType, stored: bool
) -> None:
    path = shared_parquet(tmp_path / "x.parquet", column, kind, stored)
    read: list[int] = []
    whole = parquet_files._bytes
    monkeypatch.setattr(parquet_files, "_bytes", lambda values: (read.append(len(values)), whole(values))[1])
    monkeypatch.setattr(parquet_files, "ARCHIVE_BYTES", 10**6)
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 10**6)
    with pytest.raises(DataError, match=r"its values have [\d,]+ times the bytes of the file, at most 200"):
        load(path)
    assert max(read) * 50_000 <= 10**6
    assert sum(read) < 100


def test_a_table_of_many_parts_is_read_as_one_of_a_single_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_parquet(tmp_path / "x.parquet", "label", pa.string())
    file = pq.ParquetFile(path)
    usual = parquet_files.read_table(file, path.stat().st_size)
    monkeypatch.setattr(parquet_files, "ARCHIVE_RATIO", 10**6)
    monkeypatch.setattr(parquet_files, "ARCHIVE_BYTES", 10**4)
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 10**6)
    assert parquet_files.read_table(file, path.stat().st_size).equals(usual)
