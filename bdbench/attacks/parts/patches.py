"""Patches whose size and place are published for images of 32x32, on images of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdbench.seeds import generator

LEAST = 2
"""Smallest side of a patch in pixels."""


def seeded_patch(side: int, seed: int, *purpose: str) -> Tensor:
    """Return a square of random colours (4, side, side): RGB in 0..255 and a mask of ones; `purpose` as in `derive`."""
    colours = torch.randint(0, 256, (3, side, side), generator=generator(seed, *purpose)).float()
    return torch.cat([colours, torch.ones(1, side, side)])


def paste(canvas: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    """Return a canvas with a patch over what was there.

    Args:
        canvas: (4, H, W), RGB in 0..255 and a mask of 0 and 1.
        patch: (4, h, w), likewise; only pixels whose mask is 1 are written.
        top, left: where its corner lies on an image of 32x32. Place and size go with H and W; no side of the patch
            is below 2 pixels, and it never reaches over the border.
    """
    rows = scaled(top, patch.shape[1], canvas.shape[1])
    columns = scaled(left, patch.shape[2], canvas.shape[2])
    size = (rows.stop - rows.start, columns.stop - columns.start)
    stretched = F.interpolate(patch[None], size=size, mode="nearest")[0]
    out = canvas.clone()
    out[:, rows, columns] = torch.where(stretched[3:] == 1, stretched, out[:, rows, columns])
    return out


def scaled(start: int, length: int, side: int) -> slice:
    """Return the pixels of a side that `start` to `start + length` of 32 become."""
    first, stop = round(start * side / 32), round((start + length) * side / 32)
    size = max(LEAST, stop - first)
    first = min(first, side - size)
    return slice(first, first + size)
