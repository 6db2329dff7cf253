"""Counts and lists in messages: "1 file", "3 classes", "a, b and c"."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images", "1 class", "2 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "sh", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def were(count: int, noun: str) -> str:
    """Return "1 image was", "2 images were"."""
    return f"{counted(count, noun)} {'was' if count == 1 else 'were'}"


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


SPELLINGS = (("defence", "defense"), ("colour", "color"), ("data-set", "dataset"), ("data_set", "dataset"))
"""Words that are written in two ways; both are understood."""


def respelled(name: str, known: Collection[str]) -> str:
    """Return the known name that is this one in another spelling (``defenses`` for ``defences``), else itself."""
    for one, other in SPELLINGS if name not in known else ():
        for swapped in (name.replace(one, other), name.replace(other, one)):
            if swapped in known:
                return swapped
    return name
