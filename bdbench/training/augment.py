"""Random crops, flips, holes and affine moves: per sample, in batches, wherever the images are."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bdbench.errors import OptionError, unknown_name
from bdbench.training.devices import sent

OPERATIONS = ("crop", "crop-reflect", "flip", "cutout", "affine")


def parse_augment(text: str) -> tuple[str, ...]:
    """Return the operations that a setting such as ``"crop,flip"`` names; ``"none"`` gives ().

    Raises:
        OptionError: an operation that is not one of `OPERATIONS`, one twice, or both kinds of crop.
    """
    if text == "none":
        return ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in OPERATIONS:
            raise unknown_name("augmentation", name, (*OPERATIONS, "none", "auto"))
    if len(set(names)) < len(names):
        raise OptionError(f"augment '{text}' names an operation twice")
    if {"crop", "crop-reflect"} <= set(names):
        raise OptionError(f"augment '{text}' names both crop and crop-reflect; choose one border")
    return names


def augmented(batch: Tensor, operations: tuple[str, ...], rng: torch.Generator) -> Tensor:
    """Return a batch, augmented anew.

    Crop (padding of an eighth of the side, as 4 of 32, with zeros; ``crop-reflect`` mirrors the image), horizontal
    flip, then cutout (one zero hole of a sixteenth of the side, 2x2 of 32: what "length 3" means in the code of ABL and
    CBD), then affine.

    Args:
        batch: (B, C, H, W), of 0 to 255.
        operations: of `OPERATIONS`.
        rng: a CPU generator; equal states give equal batches.

    Returns:
        (B, C, H, W) float in [0, 1], on the batch's device.
    """
    border: Literal["zero", "reflect"] | None = (
        "zero" if "crop" in operations else "reflect" if "crop-reflect" in operations else None
    )
    if border or "flip" in operations:
        batch = _crop_and_flip(batch, border, "flip" in operations, rng)
    batch = batch.to(torch.float32, copy=True).div_(255)
    if "cutout" in operations:
        batch = _cutout(batch, rng)
    if "affine" in operations:
        batch = _affine(batch, rng)
    return batch


def _crop_and_flip(
    batch: Tensor, border: Literal["zero", "reflect"] | None, flip: bool, rng: torch.Generator
) -> Tensor:
    """Return a window of each image, shifted where there is a border to show, some mirrored."""
    count, _, height, width = batch.shape
    mirrored = torch.zeros(count, dtype=torch.int64)
    if flip:
        mirrored = (torch.rand(count, 1, generator=rng) < 0.5).flatten().long()
    pad_y, pad_x = (max(1, round(height / 8)), max(1, round(width / 8))) if border else (0, 0)
    down, right = mirrored * 0, mirrored * 0
    if border:
        down = torch.randint(-pad_y, pad_y + 1, (count, 1), generator=rng).flatten()
        right = torch.randint(-pad_x, pad_x + 1, (count, 1), generator=rng).flatten()
    if border == "reflect":
        batch = batch[:, :, _reflected(height, pad_y, batch.device)][..., _reflected(width, pad_x, batch.device)]
    else:
        batch = F.pad(batch, (pad_x, pad_x, pad_y, pad_y))
    windows = batch.unfold(2, height, 1).unfold(3, width, 1)
    places = torch.stack([torch.arange(count), pad_y + down, pad_x + right, mirrored])
    return _windows_by_numpy(windows, places) if batch.device.type == "cpu" else _windows(windows, places)


def _windows_by_numpy(windows: Tensor, places: Tensor) -> Tensor:
    """Do what `_windows` does, on a CPU: numpy copies whole windows there, torch value by value."""
    image, top, left, turned = places.numpy()
    taken = windows.numpy()[image, :, top, left]
    taken[turned > 0] = taken[turned > 0][..., ::-1]
    return torch.from_numpy(taken)


def _windows(windows: Tensor, places: Tensor) -> Tensor:
    """Take windows (B, C, y, x, H, W) at places (4, B): image, top, left, and 1 where it is mirrored."""
    image, top, left, turned = sent(places, windows.device)
    taken = windows[image, :, top, left]
    return torch.where(turned.view(-1, 1, 1, 1) > 0, taken.flip(3), taken)


def _reflected(length: int, pad: int, device: torch.device) -> Tensor:
    """Return the places (length + 2 pad,) that are seen when a mirror stands on the first and the last of `length`."""
    places = torch.arange(-pad, length + pad, device=device)
    return length - 1 - (length - 1 - places.abs()).abs()


def _cutout(batch: Tensor, rng: torch.Generator) -> Tensor:
    count, _, height, width = batch.shape
    keep = torch.ones(count, 1, height, width, dtype=torch.bool)
    for axis, side in ((2, height), (3, width)):
        hole = max(2, round(side / 16))
        start = torch.randint(0, side, (count, 1), generator=rng) - hole // 2
        place = torch.arange(side)
        covered = (place >= start) & (place < start + hole)
        shape = [count, 1, 1, 1]
        shape[axis] = side
        keep = keep & ~covered.view(shape) if axis == 2 else keep | ~covered.view(shape)
    return batch * sent(keep, batch.device)


def _affine(batch: Tensor, rng: torch.Generator) -> Tensor:
    """Turn by up to 15 degrees, scale by up to 15 %, shear by up to 0.2 and shift by up to a tenth of the side."""
    count = len(batch)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=rng) - 1) * limit

    angle, scale, shear = uniform(math.radians(15)), 1 + uniform(0.15), uniform(0.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [torch.stack([cos, -sin + shear, uniform(0.2)], 1), torch.stack([sin, cos, uniform(0.2)], 1)], 1
    )
    grid = F.affine_grid(sent(matrix, batch.device), list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
