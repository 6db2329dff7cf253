"""Randomness with an address: one stream per purpose, from a hash of its arguments, never the global state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


@contextmanager
def scoped(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run a block whose global torch randomness (module initialisation, dropout) is seeded for `purpose`.

    The global state outside is left as it was, so no caller's numbers depend on this block.
    """
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(derive(seed, *purpose))
        yield
