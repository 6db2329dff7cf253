"""Where long work says how far it is; the command line draws it, libraries stay silent by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: `start` it, `advance` it as work is done, `finish` it; `note` says one line."""

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Begin a bar of `total` units."""

    def advance(self, amount: int, status: str = "") -> None:
        """Move the bar by `amount`; `status` (a loss, say) is shown beside it where there is room."""

    def finish(self) -> None:
        """End the bar."""

    def note(self, message: str) -> None:
        """Say one line that a user should see."""


class Silent:
    """The progress of a library call: nothing."""

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Do nothing."""

    def advance(self, amount: int, status: str = "") -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""


def duration(seconds: float) -> str:
    """Return a time as people say it: 70 s, 4 min 05 s, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
