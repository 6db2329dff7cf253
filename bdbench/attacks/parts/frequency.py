"""The pattern that FTrojan and CTRL add: two basis functions of the discrete cosine transform, in every window."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(size: int, frequency: int) -> Tensor:
    """Return a basis function of the orthonormal DCT-II (size,) float64: sqrt(2/n) cos(pi (2i + 1) k / 2n), k not 0."""
    angles = math.pi * (2 * torch.arange(size, dtype=torch.float64) + 1) * frequency / (2 * size)
    return math.sqrt(2 / size) * angles.cos()


def window_pattern(height: int, width: int, window: int) -> Tensor:
    """Return what two coefficients of 1 do to the pixels when added to the DCT of every window.

    They lie on the diagonal, just below the middle frequency and at the highest: (15, 15) and (31, 31) of 32,
    (13, 13) and (27, 27) of 28. The transform is linear, so that no image need be transformed: this pattern, times the
    magnitude, is the change.

    Args:
        height, width: of the image, in pixels.
        window: side of a window, at least 4; an image that is smaller is one window. Windows go from the top left,
            and the last ones are cut where they do not fit.

    Returns:
        (H, W) float32.
    """
    tall, wide = min(window, height), min(window, width)
    one = torch.outer(cosine(tall, tall // 2 - 1), cosine(wide, wide // 2 - 1))
    one += torch.outer(cosine(tall, tall - 1), cosine(wide, wide - 1))
    return one[torch.arange(height) % tall][:, torch.arange(width) % wide].float()
