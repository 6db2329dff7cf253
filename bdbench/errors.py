"""What a user can mend: every error names the thing, the limit, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class BdbenchError(Exception):
    """An error that its reader can mend; the command line shows its message without a traceback, exit code 1."""


class OptionError(BdbenchError):
    """An option has a name or a value that cannot be used."""


class DataError(BdbenchError):
    """Images or labels cannot be read or do not fit."""


class ArtifactError(BdbenchError):
    """An artifact is missing, damaged, of another kind, or in the way."""


class DamagedError(ArtifactError):
    """An artifact is damaged and can be made again.

    Attributes:
        path: its folder.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class DamageWarning(UserWarning):
    """An artifact is damaged: it was left out where others are listed, or is being made again."""


class BusyError(ArtifactError):
    """Another process is making the artifact right now."""


class OccupiedError(ArtifactError):
    """Another artifact of the same kind is where this one is to be."""


class DeviceError(BdbenchError):
    """The device that was asked for is absent or out of memory."""


class TrainingError(BdbenchError):
    """Training went wrong in a way that a setting mends (a loss that is not finite, say)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the nearest of `known`, or '' when none is near; swapped letters are nearest."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    near.sort(key=lambda other: sorted(other) != sorted(name.lower()))
    return f" Did you mean '{near[0]}'?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> OptionError:
    """Build the error for a name that no registry row has: the nearest name first, then a hint, then all of them."""
    names = sorted(known)
    return OptionError(f"unknown {kind} '{name}'.{did_you_mean(name, names)}{hint} Known: {', '.join(names)}")
