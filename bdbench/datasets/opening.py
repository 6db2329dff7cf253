"""How every encoded image is opened: formats that are safe, regular files, pixels within limits."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

from bdbench.limits import PIXELS

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000")
"""What is decoded; a list, because Pillow also knows formats that start other programs."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files."""


def open_image(content: bytes | Path) -> Image.Image:
    """Open an encoded image; its pixels are decoded when they are asked for.

    Args:
        content: the bytes of a file, or its path.

    Raises:
        FileNotFoundError: nothing is at the path.
        DECODING_ERRORS: it is no image of `FORMATS`, or has more than `PIXELS` pixels.
    """
    if isinstance(content, Path) and content.exists() and not content.is_file():
        raise ValueError("not a file")
    image = Image.open(BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    if image.width * image.height > PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels; at most {PIXELS:,} are decoded: make it smaller")
    return image
