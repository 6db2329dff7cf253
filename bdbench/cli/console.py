"""Where the command line writes: tables and JSON to standard output, all else to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

PLAIN_WIDTH = 150


def _console(*, stderr: bool) -> Console:
    """Return a console as wide as the terminal; a file or pipe gets room for a whole table."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def show(item: object) -> None:
    """Print a table or text to standard output."""
    if isinstance(item, str):
        sys.stdout.write(item if item.endswith("\n") else item + "\n")
    else:
        _console(stderr=False).print(item)


def show_json(value: object) -> None:
    """Print JSON to standard output."""
    show(json.dumps(value, indent=1, default=str))


def say(message: str) -> None:
    """Print a line for people to standard error; `message` may hold rich markup."""
    _console(stderr=True).print(message, soft_wrap=True)


def say_error(message: str) -> None:
    """Print an error to standard error, as it is."""
    console = _console(stderr=True)
    console.print("[bold red]Error:[/bold red]", end=" ")
    console.print(message, markup=False, soft_wrap=True)


def say_made(path: object, artifact_id: str, made: Mapping[str, Any], following: list[str]) -> None:
    """Say what a stage wrote and what to type next."""
    cost = f"{made['seconds']:.1f} s  peak {made['peak_memory_bytes'] / 2**20:,.0f} MiB"
    say(f"wrote [bold]{path}[/bold]  id {artifact_id}  {cost}")
    for index, command in enumerate(following):
        say(f"{'next:' if index == 0 else '  or:'} [cyan]{command}[/cyan]")


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

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Begin a bar."""
        self._bar = self._bars.add_task(label, total=total, unit=unit, status="")

    def advance(self, amount: int, status: str = "") -> None:
        """Move the bar."""
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


@contextmanager
def live_progress() -> Iterator[LiveProgress]:
    """Draw progress while the block runs."""
    columns = [
        TextColumn("{task.description:<12}"), BarColumn(bar_width=24), MofNCompleteColumn(), _Speed(),
        TimeRemainingColumn(), TextColumn("{task.fields[status]}"),
    ]  # fmt: skip
    with Progress(*columns, console=_console(stderr=True)) as bars:
        yield LiveProgress(bars)
