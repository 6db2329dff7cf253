"""Encoded images to one uint8 tensor, decoded in parallel: modes, sizes and damage handled in one place."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.datasets.decoded import Decoded, Unreadable, check_decoded
from bdbench.datasets.fit import Fit
from bdbench.datasets.opening import DECODING_ERRORS, open_image
from bdbench.errors import DataError
from bdbench.limits import LARGE_PIXELS, WAITING_BYTES
from bdbench.machine import cores, memory_bytes
from bdbench.progress import Progress

CHUNK = 256
"""Images that a thread decodes at a time."""

SMALL_FILE = 4096
"""Bytes of an encoded image; up to this mean, one thread decodes as fast as several."""

_reading = threading.local()
"""Its `where` is the place of the image that a thread decodes, for warnings."""

_large = threading.Lock()
"""Held while an image of more than `LARGE_PIXELS` is decoded: several at a time could need too much memory."""


class Encoded(NamedTuple):
    """An image before decoding, and where it lies, for messages."""

    where: str
    content: bytes | Path | np.ndarray | None
    """A file's bytes, its path, pixels (H, W) or (H, W, C) uint8, or None where there is nothing."""


class _Block(NamedTuple):
    length: int
    images: np.ndarray | None
    """(n, C, H, W) uint8 of the images that can be read; None where sizes differ or only headers were read."""
    offsets: list[int]
    unreadable: list[Unreadable]
    sizes: dict[tuple[int, int], str]


def decode_images(
    chunks: Iterable[Sequence[Encoded]], count: int, fit: Fit | None, label: str, progress: Progress
) -> Tensor:
    """Decode `count` images, every one of which has to be readable; see `decode_readable`.

    Returns:
        (N, C, H, W) uint8, contiguous; C is 1 when all images are gray, else 3.

    Raises:
        DataError: images cannot be read, are too small, or differ in size; the message says which.
    """
    decoded = decode_readable(chunks, count, fit, label, progress)
    check_decoded([decoded], count, fit, skip_unreadable=None)
    return decoded.images


def decode_readable(
    chunks: Iterable[Sequence[Encoded]], count: int, fit: Fit | None, label: str, progress: Progress
) -> Decoded:
    """Decode what can be read of `count` images. After a second size, without a fit, only headers are read.

    Args:
        chunks: the images in order, some hundred at a time.
        count: N, of all chunks together.
        fit: how to bring images to one size; None requires that they have it.
        label: what the progress bar says.

    Raises:
        DataError: decoded, the images would need more memory than there is.
    """
    room = memory_bytes() // 2 // max(count, 1)
    if fit is not None and 3 * fit.side**2 > room:
        raise _too_large(count, fit.side, fit.side)
    images = torch.empty((0, 1, 1, 1), dtype=torch.uint8)
    rows: list[int] = []
    unreadable: list[Unreadable] = []
    sizes: dict[tuple[int, int], str] = {}
    seen, mixed = 0, threading.Event()
    progress.start(label, count)
    try:
        with _warnings_of_pillow() as warned:
            for block in _decode_in_order(chunks, fit, room, mixed):
                unreadable += block.unreadable
                for size, where in block.sizes.items():
                    sizes.setdefault(size, where)
                if fit is None and len(sizes) > 1:
                    mixed.set()
                elif block.images is not None:
                    images = _put(torch.from_numpy(block.images), images, len(rows), count)
                    rows += [seen + offset for offset in block.offsets]
                seen += block.length
                progress.advance(block.length)
    finally:
        progress.finish()
    if not mixed.is_set() and len(rows) + len(unreadable) < count:
        raise _too_large(count, *next(iter(sizes)))
    kept = 0 if mixed.is_set() else len(rows)
    images = images if kept == len(images) else images[:kept].clone()
    return Decoded(images, torch.tensor(rows[:kept], dtype=torch.int64), tuple(unreadable), sizes, warned)


def _put(pixels: Tensor, images: Tensor, done: int, count: int) -> Tensor:
    """Write a block behind the first `done` images and return them all; gray ones are repeated beside coloured ones."""
    if not done:
        images = torch.empty((count, *pixels.shape[1:]), dtype=torch.uint8)
    if len(pixels[0]) > len(images[0]):
        images = images.expand(-1, len(pixels[0]), -1, -1).contiguous()
    images[done : done + len(pixels)] = pixels
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


def _decode_in_order(
    chunks: Iterable[Sequence[Encoded]], fit: Fit | None, room: int, mixed: threading.Event
) -> Iterator[_Block]:
    """Decode ahead of the reader, but only so far that few undecoded chunks are in memory at a time.

    Small images take one thread: most of the work on them is Python's, and threads would wait for each other.
    """
    rest = iter(chunks)
    first = next(rest, ())
    if sum(map(_encoded_bytes, first)) <= SMALL_FILE * len(first):
        for chunk in itertools.chain([first], rest):
            yield _decode_chunk(chunk, fit, room, mixed)
        return
    threads = min(cores(), 16)
    waiting: deque[tuple[Future[_Block], int]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in itertools.chain([first], rest):
            held = sum(len(item.content) for item in chunk if isinstance(item.content, bytes))
            waiting.append((pool.submit(_decode_chunk, chunk, fit, room, mixed), held))
            while len(waiting) > 2 * threads or sum(size for _, size in waiting) > WAITING_BYTES:
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()


def _encoded_bytes(item: Encoded) -> int:
    content = item.content
    if isinstance(content, Path):
        return content.stat().st_size if content.exists() else 0
    return content.nbytes if isinstance(content, np.ndarray) else len(content or b"")


def _decode_chunk(chunk: Sequence[Encoded], fit: Fit | None, room: int, mixed: threading.Event) -> _Block:
    """Decode some images; read only the headers of larger ones than `room` bytes, and of all once sizes are `mixed`."""
    arrays: list[np.ndarray] = []
    offsets: list[int] = []
    unreadable: list[Unreadable] = []
    sizes: dict[tuple[int, int], str] = {}
    for offset, (where, content) in enumerate(chunk):
        _reading.where = where
        try:
            with _open(content) as image:
                if mixed.is_set() or (fit is None and _decoded_bytes(image) > room):
                    sizes.setdefault(_upright_size(image), where)
                    continue
                with _large if image.width * image.height > LARGE_PIXELS else nullcontext():
                    plain = _plain(image)
                    array = np.asarray(plain if fit is None else fit.apply(plain))
        except DECODING_ERRORS as error:
            unreadable.append(Unreadable(where, _reason(error)))
            continue
        arrays.append(array)
        offsets.append(offset)
        sizes.setdefault(plain.size, where)
        if fit is None and len(sizes) > 1:
            mixed.set()
    _reading.where = None
    images = None if mixed.is_set() or not arrays else _stacked(arrays)
    return _Block(len(chunk), images, offsets, unreadable, sizes)


def _decoded_bytes(image: Image.Image) -> int:
    return image.width * image.height * (1 if image.mode in ("1", "L", "LA", "I;16") else 3)


def _too_large(count: int, width: int, height: int) -> DataError:
    have, needed = memory_bytes() / 1e9, 3 * count * width * height / 1e9
    return DataError(
        f"{count:,} images of {width}x{height} pixels need up to {needed:,.1f} GB, more than half of this machine's "
        f"{have:,.1f} GB of memory; pass a smaller --image-size"
    )


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Return images (H, W) or (H, W, 3) of one size as (n, C, H, W)."""
    if len({array.ndim for array in arrays}) > 1:
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in arrays]
    stacked = np.stack(arrays)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return str(error) or type(error).__name__


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that `_plain` gives, by the header alone."""
    if image.format == "PNG" and "exif" not in image.info:
        return image.size  # `getexif` would decode the pixels to look behind them
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


@contextmanager
def _warnings_of_pillow() -> Iterator[dict[str, list[str]]]:
    """Collect what Pillow warns of while images are decoded, by message, with where they lie."""
    warned: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *rest: Any, **named: Any) -> None:  # noqa: ANN401 - as in `warnings`
            where = getattr(_reading, "where", None)
            if where is None:
                show(message, *rest, **named)
            else:
                warned.setdefault(str(message), []).append(where)

        for kind in (UserWarning, Image.DecompressionBombWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = note
        yield warned


def _open(content: bytes | Path | np.ndarray | None) -> Image.Image:
    if content is None or (isinstance(content, bytes) and not content):
        raise ValueError("no image bytes; store the images inside the file")
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return open_image(content)


def _plain(image: Image.Image) -> Image.Image:
    """Return an image in mode L or RGB, turned as its EXIF orientation says."""
    image.load()
    kind = image.format
    # Most PNG files say nothing about themselves: looking it up would take longer than decoding them.
    upright = ImageOps.exif_transpose(image) if image.info or kind not in (None, "PNG") else image
    return upright if upright.mode in ("L", "RGB") else _eight_bit(upright, kind)


def _eight_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert to mode L (gray files of 1, 8 or 16 bits) or RGB (all others; alpha is dropped)."""
    mode = image.mode
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
