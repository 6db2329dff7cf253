"""Progress on standard error: bars on a terminal, else a line now and then."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.table import Column
from rich.text import Text

from bdbench.progress import duration


class _Speed(ProgressColumn):
    """Units a second."""

    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


SECONDS = 20.0
"""Between two lines."""


class _Interruptible:
    """Does not lose a Ctrl-C; `task` is what the work is for, such as the name of a defense."""

    def __init__(self, task: str = "") -> None:
        self.task = task
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

    def _raise_what_was_lost(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


class LiveProgress(_Interruptible):
    """Draws one bar at a time: label, bar, count, speed, time left."""

    def __init__(self, bars: Progress, task: str = "") -> None:
        super().__init__(task)
        self._bars = bars
        self._bar: Any = None

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Begin a bar."""
        self._bar = self._bars.add_task(label, total=total, unit=unit, status="")

    def advance(self, amount: int, status: str = "") -> None:
        """Move the bar.

        Raises:
            KeyboardInterrupt: it was asked for, and got lost; see `interruptible`.
        """
        self._raise_what_was_lost()
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


class LineProgress(_Interruptible):
    """Says every 20 s how far the work is, such as ``cbd: clean 41 %, about 70 s left``."""

    def __init__(self, say: Callable[[str], None], task: str = "") -> None:
        super().__init__(task)
        self.note = say
        self._said = time.monotonic()

    def start(self, label: str, total: int, unit: str = "images") -> None:  # noqa: ARG002
        """Begin to count."""
        self._label, self._total, self._done = label, total, 0
        self._from: tuple[float, int] | None = None

    def advance(self, amount: int, status: str = "") -> None:  # noqa: ARG002
        """Count, and say a line when it is due.

        Raises:
            KeyboardInterrupt: see `LiveProgress.advance`.
        """
        self._raise_what_was_lost()
        self._done += amount
        now = time.monotonic()
        if self._from is None:  # what a resumed phase had done before tells nothing of the speed
            self._from = now, self._done
        if now - self._said < SECONDS:
            return
        begun, before = self._from
        text = f"{self.task}: {self._label}" if self.task else self._label
        text += f" {100 * self._done // max(1, self._total)} %"
        if self._done > before:
            left = (now - begun) * (self._total - self._done) / (self._done - before)
            text += f", about {duration(left)} left"
        self.note(text)
        self._said = now

    def finish(self) -> None:
        """Say nothing: the next line is of what comes next."""


def bars(console: Console) -> Progress:
    """Return the bars: label, bar, count, speed, time left, status."""
    return Progress(
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Speed(Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )
