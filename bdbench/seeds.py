"""Randomness with an address: one stream per purpose, from a hash of its arguments, never the global state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose; equal arguments give equal seeds on every machine.

    Args:
        seed: the user's seed.
        purpose: what the numbers are for, such as ``"poison", "choose"`` or ``"twin", "epoch", 3``.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator whose stream belongs to `purpose` alone (see `derive`)."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def addressed(rows: Tensor, count: int, seed: int, *purpose: str | int) -> Tensor:
    """Return numbers that belong to rows, whatever batch the rows are asked in: splitmix64 of (stream, row, place).

    Args:
        rows: (B,) int64, not negative.
        count: numbers a row, below 2**32.
        seed, purpose: see `derive`.

    Returns:
        (B, count) float32, uniform in [0, 1), multiples of 2**-24.
    """
    first = np.left_shift(rows.numpy().astype(np.uint64), np.uint64(32), dtype=np.uint64)
    places = first[:, None] + np.arange(1, count + 1, dtype=np.uint64)
    mixed: npt.NDArray[np.uint64] = places * GOLDEN + np.uint64(derive(seed, *purpose))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND
    mixed = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(40)
    return torch.from_numpy(mixed.astype(np.float32) * np.float32(2**-24))


def tie_order(count: int) -> Tensor:
    """Return the rows (count,) of a dataset in an order by which equal scores are told apart, always the same.

    By the rows themselves the first ones would win: in a dataset that lies in order of its classes, the first class.
    """
    return torch.randperm(count, generator=generator(0, "ties"))


@contextmanager
def scoped(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run a block whose global torch randomness (module initialisation, dropout) is seeded for `purpose`.

    The global state outside is left as it was, so no caller's numbers depend on this block.
    """
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(derive(seed, *purpose))
        yield
