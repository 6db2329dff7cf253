"""Progress bars on standard error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.table import Column
from rich.text import Text


class _Speed(ProgressColumn):
    """Units a second."""

    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


class LiveProgress:
    """Draws one bar at a time on standard error: label, bar, count, speed, time left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._bar: Any = None
        self._interrupted = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Remember a Ctrl-C while the block runs: if what it hit swallowed it, the next advance raises it again.

        Library code that runs under C, such as an import or a destructor, can lose a KeyboardInterrupt.
        """
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Begin a bar."""
        self._bar = self._bars.add_task(label, total=total, unit=unit, status="")

    def advance(self, amount: int, status: str = "") -> None:
        """Move the bar.

        Raises:
            KeyboardInterrupt: it was asked for, and got lost; see `interruptible`.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._bars.update(self._bar, advance=amount)
        if status:
            self._bars.update(self._bar, status=status)

    def finish(self) -> None:
        """Fill the bar."""
        task = next(task for task in self._bars.tasks if task.id == self._bar)
        self._bars.update(self._bar, completed=task.total)

    def note(self, message: str) -> None:
        """Say one line above the bar."""
        self._bars.console.print(message, markup=False)


def bars(console: Console) -> Progress:
    """Return the bars: label, bar, count, speed, time left, status."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Speed(Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
