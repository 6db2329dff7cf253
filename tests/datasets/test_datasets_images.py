"""Decoding: modes, orientation, sizes and damage."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdbench.datasets.fit import Fit
from bdbench.datasets.images import CHUNK, Encoded, decode_images, resize_images
from bdbench.errors import DataError
from bdbench.progress import Silent


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(*contents: bytes | Path, fit: Fit | None = None) -> Tensor:
    items = [Encoded(f"row {row}", content) for row, content in enumerate(contents)]
    return decode_images([items], len(items), fit, "reading", Silent())


def colour(image: bytes) -> list[int]:
    """The first pixel of a decoded image."""
    return decode(image)[0, :, 0, 0].tolist()


def test_modes_become_gray_or_rgb() -> None:
    red = Image.new("RGB", (8, 8), (200, 10, 30))
    gray = Image.new("L", (8, 8), 77)
    assert colour(encode(red)) == [200, 10, 30]
    assert colour(encode(red.convert("RGBA"))) == [200, 10, 30]
    assert colour(encode(red.convert("P", palette=Image.Palette.ADAPTIVE))) == [200, 10, 30]
    assert colour(encode(red.convert("P", palette=Image.Palette.ADAPTIVE), transparency=b"\0")) == [
        200,
        10,
        30,
    ]
    assert len(colour(encode(red.convert("CMYK"), "JPEG"))) == 3
    assert colour(encode(gray)) == [77]
    assert colour(encode(gray.convert("LA"))) == [77]
    assert colour(encode(Image.new("1", (8, 8), 1))) == [255]


@pytest.mark.parametrize(("wide", "expected"), [(0, 0), (257, 1), (128 * 257, 128), (65535, 255)])
def test_sixteen_bit_gray_is_scaled_not_clipped(wide: int, expected: int) -> None:
    assert colour(encode(Image.fromarray(np.full((8, 8), wide, np.uint16)))) == [expected]


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 0: .*32-bit pixels have no agreed range"):
        decode(encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"))


def test_exif_orientation_is_honoured() -> None:
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 255
    lying = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    for file_format in ("JPEG", "PNG"):
        shown = decode(encode(lying, file_format, exif=exif))[0, 0]
        assert shown.shape == (16, 8)
        assert shown[2, 4] > 250
        assert shown[13, 4] < 5


def test_gray_becomes_rgb_as_soon_as_one_image_is_coloured_wherever_it_lies() -> None:
    gray, red = encode(Image.new("L", (8, 8), 9)), encode(Image.new("RGB", (8, 8), (200, 0, 0)))
    for coloured in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK):
        contents = [red if row == coloured else gray for row in range(2 * CHUNK + 1)]
        items = [Encoded("", content) for content in contents]
        chunks = [items[:CHUNK], items[CHUNK : 2 * CHUNK], items[2 * CHUNK :]]
        images = decode_images(chunks, len(items), None, "", Silent())
        assert images.shape == (2 * CHUNK + 1, 3, 8, 8)
        assert images[coloured, :, 0, 0].tolist() == [200, 0, 0]
        assert (images[:, 0] == 9).flatten(1).all(1).sum() == 2 * CHUNK


def test_sizes_that_differ_between_chunks_are_named() -> None:
    small, large = (encode(Image.new("L", (side, side))) for side in (8, 9))
    chunks = [[Encoded("a.png", small)], [Encoded("b.png", large)]]
    with pytest.raises(DataError, match=r"a.png is 8x8, b.png is 9x9 pixels; pass --image-size"):
        decode_images(chunks, 2, None, "", Silent())


def test_crop_keeps_the_centre_and_squash_the_whole() -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    content = encode(Image.fromarray(wide))
    assert (decode(content, fit=Fit(8)) == 255).all()
    squashed = decode(content, fit=Fit(8, "squash"))[0, 0, 0]
    assert squashed[0] == 0
    assert squashed[4] > 200
    assert squashed[7] == 0


def test_resizing_to_the_same_size_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 3, 9, 9), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(resize_images(images, Fit(9), Silent()), images)
    assert torch.equal(resize_images(images[:, :1], Fit(9, "squash"), Silent()), images[:, :1])


def test_formats_outside_the_list_are_not_opened() -> None:
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode(encode(Image.new("RGB", (8, 8)), "PCX"))


def damaged_files() -> Iterator[bytes]:
    rng = random.Random(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP"):
        content = (
            encode(image, file_format, exif=exif) if file_format in ("PNG", "JPEG") else encode(image, file_format)
        )
        for _ in range(60):
            changed = bytearray(content)
            for _ in range(rng.choice([1, 4, 20])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            yield bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_are_read_or_refused_but_raise_nothing_else() -> None:
    refused = 0
    for content in damaged_files():
        try:
            decode(content, fit=Fit(8))
        except DataError:
            refused += 1
    assert refused > 100
