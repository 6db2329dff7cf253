"""What became of images that were decoded: which are refused, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from bdbench.data import MIN_SIDE
from bdbench.datasets.fit import Fit
from bdbench.errors import DataError
from bdbench.wording import counted, were

LISTED = 10
"""Unreadable images that an error names."""


class Unreadable(NamedTuple):
    """An image that cannot be read: where it lies, and why."""

    where: str
    reason: str


class Decoded(NamedTuple):
    """What became of some images.

    Attributes:
        images: (n, C, H, W) uint8, contiguous, of those that can be read; C is 1 when all are gray, else 3. Empty where
            sizes differ and no fit was asked for.
        rows: (n,) int64, ascending, which of all images these are.
        unreadable: the others.
        sizes: (width, height) before any fit, upright, and where the first image of this size lies.
        warned: what Pillow warned of: its message and the images.
    """

    images: Tensor
    rows: Tensor
    unreadable: tuple[Unreadable, ...]
    sizes: dict[tuple[int, int], str]
    warned: dict[str, list[str]]


def check_decoded(splits: Sequence[Decoded], count: int, fit: Fit | None, *, skip_unreadable: bool | None) -> None:
    """Refuse images that cannot be used, all of them in one message.

    Args:
        splits: what was decoded of each split.
        count: images of all splits, for the message.
        fit: as it was decoded with.
        skip_unreadable: images that cannot be read are left out; None if nobody can ask for that.

    Raises:
        DataError: images cannot be read, are too small, or differ in size without a fit.
    """
    unreadable = [] if skip_unreadable else [item for split in splits for item in split.unreadable]
    wrong = [_unreadable_message(unreadable, count, skippable=skip_unreadable is not None)] if unreadable else []
    if fit is None:
        wrong += _wrong_sizes(splits, has_unreadable=bool(unreadable))
    if wrong:
        raise DataError("\n".join(wrong))
    if not all(split.sizes for split in splits):
        raise DataError("none of the images of a split can be read; give others")


def _wrong_sizes(splits: Sequence[Decoded], *, has_unreadable: bool) -> Iterator[str]:
    """Say what is wrong with the sizes of images that nobody asked to resize."""
    sizes: dict[tuple[int, int], str] = {}
    for split in splits:
        for size, where in split.sizes.items():
            sizes.setdefault(size, where)
    shown = [f"{where} is {width}x{height}" for (width, height), where in sizes.items()]
    if len(sizes) > 1:
        count = "" if len(sizes) == 2 else f" ({len(sizes):,} of them)"
        more = "; from the second size on only headers were read: more may be unreadable" if has_unreadable else ""
        advice = "pass --image-size to bring them to one size"
        yield f"sizes differ{count}: {shown[0]}, {shown[1]} pixels; {advice}{more}"
        return
    for (width, height), where in sizes.items():
        if min(width, height) < MIN_SIDE:
            needed = f"at least {MIN_SIDE}x{MIN_SIDE} are needed"
            yield f"{where}: {width}x{height} pixels, {needed}; pass --image-size to resize"


def _unreadable_message(unreadable: Sequence[Unreadable], count: int, *, skippable: bool) -> str:
    skip = ", or leave {} out with --skip-unreadable" if skippable else ""
    if len(unreadable) == 1:
        where, reason = unreadable[0]
        return f"{where}: cannot be read as an image ({reason}); replace or remove it{skip.format('it')}"
    listed = [f"  {where}: {reason}" for where, reason in unreadable[:LISTED]]
    if len(unreadable) > LISTED:
        listed.append(f"  and {len(unreadable) - LISTED:,} more")
    head = f"{len(unreadable):,} of {count:,} images cannot be read; replace or remove them{skip.format('them')}:"
    return "\n".join([head, *listed])


def remarks_on(splits: Sequence[Decoded], fit: Fit | None) -> tuple[str, ...]:
    """Return what a user should know of decoded images, one line each: left out, resized, warned of."""
    remarks = []
    unreadable = [item for split in splits for item in split.unreadable]
    if unreadable:
        first = unreadable[0]
        why = f"since {'it' if len(unreadable) == 1 else 'they'} cannot be read"
        remarks.append(f"{were(len(unreadable), 'image')} left out {why}, such as {first.where} ({first.reason})")
    sizes = {size for split in splits for size in split.sizes}
    if fit is not None and len(sizes) > 1:
        small, large = (chosen(sizes, key=lambda size: size[0] * size[1]) for chosen in (min, max))
        remarks.append(
            f"images have {len(sizes):,} sizes, from {small[0]}x{small[1]} to {large[0]}x{large[1]} pixels; all were "
            f"{fit.description}"
        )
    for split in splits:
        for message, places in split.warned.items():
            remarks.append(f"Pillow warns of {counted(len(places), 'image')}, such as {places[0]}: {message}")
    return tuple(remarks)
