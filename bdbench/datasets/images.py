"""Encoded images to one uint8 tensor, decoded in parallel: modes, sizes and damage handled in one place."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bdbench.data import MIN_SIDE, ImageDataset
from bdbench.errors import DataError
from bdbench.machine import cores
from bdbench.progress import Progress

CHUNK = 256
"""Images that a thread decodes at a time."""

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
"""What is decoded; a list, because Pillow also knows formats that start other programs."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files."""


@dataclass(frozen=True)
class Fit:
    """How images are brought to one size, in bilinear resampling.

    Attributes:
        side: pixels of the square that comes out.
        method: "crop" resizes the shorter side and crops the centre; "squash" resizes the whole image.
    """

    side: int
    method: Literal["crop", "squash"] = "crop"

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image as a square."""
        square = (self.side, self.side)
        if self.method == "crop":
            return ImageOps.fit(image, square, Image.Resampling.BILINEAR)
        return image.resize(square, Image.Resampling.BILINEAR)


class Encoded(NamedTuple):
    """An image before decoding, and where it lies, for messages."""

    where: str
    content: bytes | Path | np.ndarray
    """A file's bytes, its path, or pixels (H, W) or (H, W, C) uint8."""


class _Block(NamedTuple):
    first: str
    images: np.ndarray
    """(n, C, H, W) uint8."""


def decode_images(
    chunks: Iterable[Sequence[Encoded]], count: int, fit: Fit | None, label: str, progress: Progress
) -> Tensor:
    """Decode `count` images in a thread pool.

    Args:
        chunks: the images in order, some hundred at a time.
        count: N, of all chunks together.
        fit: how to bring images to one size; None requires that they have it.
        label: what the progress bar says.

    Returns:
        (N, C, H, W) uint8, contiguous; C is 1 when all images are gray, else 3.

    Raises:
        DataError: an image cannot be read, is too small, or differs in size; the message says where it lies.
    """
    images = torch.empty(0)
    first, done = "", 0
    progress.start(label, count)
    try:
        for block in _decode_in_order(chunks, fit):
            pixels = torch.from_numpy(block.images)
            if done == 0:
                first, images = block.first, torch.empty((count, *pixels.shape[1:]), dtype=torch.uint8)
            _check_same_size(first, images.shape, block.first, pixels.shape)
            if len(pixels[0]) > len(images[0]):
                images = images.expand(-1, len(pixels[0]), -1, -1).contiguous()
            images[done : done + len(pixels)] = pixels
            done += len(pixels)
            progress.advance(len(pixels))
    finally:
        progress.finish()
    return images


def resize_images(images: Tensor, fit: Fit, progress: Progress, label: str = "resizing images") -> Tensor:
    """Bring (N, C, H, W) uint8 images to the size of `fit`; the same pixels on every machine."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    if arrays.shape[-1] == 1:
        arrays = arrays[..., 0]
    rows = (range(start, min(start + CHUNK, len(arrays))) for start in range(0, len(arrays), CHUNK))
    chunks = ([Encoded(f"image {row}", arrays[row]) for row in chunk] for chunk in rows)
    return decode_images(chunks, len(arrays), fit, label, progress)


def in_chunks(files: Sequence[Path], root: Path) -> Iterator[list[Encoded]]:
    """Cut image files into chunks for `decode_images`; messages name them relative to `root`."""
    for start in range(0, len(files), CHUNK):
        yield [Encoded(file.relative_to(root).as_posix(), file) for file in files[start : start + CHUNK]]


def match_channels(train: ImageDataset, test: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Repeat a gray split's channel where the other split has colour."""
    channels = max(train.images.shape[1], test.images.shape[1])

    def widen(data: ImageDataset) -> ImageDataset:
        if data.images.shape[1] == channels:
            return data
        return ImageDataset(data.images.expand(-1, channels, -1, -1).contiguous(), data.labels, data.class_names)

    return widen(train), widen(test)


def _decode_in_order(chunks: Iterable[Sequence[Encoded]], fit: Fit | None) -> Iterator[_Block]:
    """Decode ahead of the reader, but only so far that few undecoded chunks are in memory at a time."""
    threads = min(cores(), 16)
    waiting: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(_decode_chunk, chunk, fit))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode_chunk(chunk: Sequence[Encoded], fit: Fit | None) -> _Block:
    arrays = [_decode_image(item, fit) for item in chunk]
    for item, array in zip(chunk, arrays, strict=True):
        _check_same_size(chunk[0].where, arrays[0].shape, item.where, array.shape)
    channels = max(len(array) for array in arrays)
    block = np.empty((len(arrays), channels, *arrays[0].shape[1:]), dtype=np.uint8)
    for row, array in enumerate(arrays):
        block[row] = array
    return _Block(chunk[0].where, block)


def _decode_image(item: Encoded, fit: Fit | None) -> np.ndarray:
    """Return (C, H, W) uint8 with C of 1 or 3."""
    try:
        with _open(item.content) as image:
            plain = _eight_bit(_upright(image), image.format)
            fitted = plain if fit is None else fit.apply(plain)
            pixels = np.asarray(fitted)
    except DECODING_ERRORS as error:
        raise DataError(
            f"{item.where}: cannot be read as an image ({str(error) or type(error).__name__}); replace or remove it"
        ) from None
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise DataError(
            f"{item.where}: {width}x{height} pixels, at least {MIN_SIDE}x{MIN_SIDE} are needed; "
            "pass --image-size to resize"
        )
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _open(content: bytes | Path | np.ndarray) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return Image.open(BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    image.load()
    if image.format in (None, "PNG") and not image.info:
        return image  # nothing to look up: most PNG files, several times faster
    return ImageOps.exif_transpose(image)


def _eight_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert to mode L (gray files of 1, 8 or 16 bits) or RGB (all others; alpha is dropped)."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode in ("1", "LA"):
        return image.convert("L")
    if mode.startswith("I;16") or (mode == "I" and file_format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range: save it with 8 or 16 bits")
    if mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # by way of RGBA: a transparent palette warns otherwise
    return image.convert("RGB")


def _check_same_size(first: str, expected: Sequence[int], second: str, found: Sequence[int]) -> None:
    if expected[-2:] != found[-2:]:
        raise DataError(
            f"sizes differ: {first} is {expected[-1]}x{expected[-2]}, "
            f"{second} is {found[-1]}x{found[-2]} pixels; pass --image-size to bring them to one size"
        )
