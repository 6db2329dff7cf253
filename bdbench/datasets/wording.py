"""Counts in messages: "1 file was", "3 files were"."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images", "1 class", "2 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "sh", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def were(count: int, noun: str) -> str:
    """Return "1 image was", "2 images were"."""
    return f"{counted(count, noun)} {'was' if count == 1 else 'were'}"
