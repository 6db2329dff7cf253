"""What a user can mend: every error names the thing, the limit, the value and the way out.

Exit codes of the command line, of all commands alike:
    0   done
    1   an error about data, artifacts, the machine, a method or training (every `BdbenchError` but `OptionError`)
    2   usage: what was typed, or stands in a TOML file for it, cannot be: an unknown command, flag or name, a value
        that is no number, is out of bounds, or fits neither the data nor the other values (`OptionError`, the parser's)
    3   a condition of `--assert` does not hold
    130 interrupted
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class BdbenchError(Exception):
    """An error that its reader can mend; the command line shows its message without a traceback.

    Attributes:
        exit_code: what the command line ends with.
    """

    exit_code: ClassVar[int] = 1


class OptionError(BdbenchError):
    """An option, or an argument, has a name or a value that cannot be used."""

    exit_code: ClassVar[int] = 2


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


class MethodError(BdbenchError):
    """A method gives what it must not (a plugin's, most likely), or cannot be imported."""


class OriginWarning(Warning):
    """Images are about to be read from a place that an artifact names, outside its own folder."""


class SourceWarning(UserWarning):
    """What is there was made by other code of a plugin."""


class TrainingError(BdbenchError):
    """Training went wrong in a way that a setting mends (a loss that is not finite, say)."""


NEVER_SUGGESTED = frozenset({"oracle", "clean"})
"""Reference rows, which read the truth: who means a defense must not get one of them."""
NEAR = 0.65
"""How alike two names are that are taken for each other: 1 if equal, 0 if nothing fits (difflib's ratio)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the nearest of `known`, or '' when none is near.

    Nearest are names that begin with what was typed, then those with swapped letters, then those that are alike.
    """
    typed, names = name.lower(), [other for other in known if other not in NEVER_SUGGESTED]
    begun = [other for other in names if len(typed) > 1 and other.startswith(typed)]
    near = difflib.get_close_matches(typed, names, n=3, cutoff=NEAR)
    near.sort(key=lambda other: sorted(other) != sorted(typed))
    found = [*begun, *near]
    return f" Did you mean '{found[0]}'?" if found else ""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "", own: Iterable[str] = ()) -> OptionError:
    """Build the error for a name that no registry row has: the nearest name first, then a hint, then all of them.

    Args:
        kind: what it was to be the name of.
        name: as it was typed.
        known: all names.
        hint: what else may be meant, in a sentence that begins with a space.
        own: names that may be meant too but are not listed.
    """
    names = sorted(known)
    near = did_you_mean(name, [*names, *own])
    return OptionError(f"unknown {kind} '{name}'.{near}{hint} Known: {', '.join(names)}")
