"""Where the command line writes: tables and JSON to standard output, all else to standard error."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bdbench.text import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from bdbench.artifacts.base import Artifact
    from bdbench.cli.live import LineProgress, LiveProgress

PLAIN_WIDTH = 150


def _console(*, stderr: bool) -> Console:
    """Return a console as wide as the terminal; a file or pipe gets room for a whole table.

    Whatever text comes from outside, a terminal obeys nothing of it, and its brackets are no markup.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Safe(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable_lines(segment.text))

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Safe(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def flowing(text: str) -> str:
    """Join the lines of each paragraph, so that it wraps where the terminal ends; indented lines stay lines."""
    return "\n\n".join(re.sub(r"\n(?! )", " ", paragraph) for paragraph in text.split("\n\n"))


def show(item: object) -> None:
    """Print a table or text to standard output; what is wider than the terminal is not cut."""
    if isinstance(item, str):
        sys.stdout.write(printable_lines(item.removesuffix("\n")) + "\n")
    else:
        _console(stderr=False).print(item, crop=False)


def show_wrapped(text: str) -> None:
    """Print a sentence to standard output as it is, broken at words where the terminal ends."""
    _console(stderr=False).print(text)


def show_json(value: object) -> None:
    """Print JSON to standard output; numbers that JSON does not know are null."""
    show(json.dumps(finite(json.loads(json.dumps(value, default=str))), indent=1))


def finite(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return JSON with null in place of nan and infinity."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(message: str) -> None:
    """Print a line for people to standard error; `message` may hold rich markup."""
    _console(stderr=True).print(message, markup=True, soft_wrap=True)


def say_plainly(message: str) -> None:
    """Print a line to standard error as it is, whatever brackets it has; a terminal breaks it between words."""
    console = _console(stderr=True)
    if sys.stderr.isatty():
        words = textwrap.TextWrapper(console.width, break_long_words=False, break_on_hyphens=False)
        message = "\n".join(words.fill(line) for line in message.split("\n"))
    console.print(message, soft_wrap=True)


def say_error(message: str) -> None:
    """Print an error to standard error, as it is."""
    _say_after("[bold red]Error:[/bold red]", message)


def say_warning(message: str) -> None:
    """Print a warning to standard error, as it is."""
    _say_after("[bold yellow]Warning:[/bold yellow]", message)


def _say_after(heading: str, message: str) -> None:
    _console(stderr=True).print(heading, end=" ", markup=True)
    say_plainly(message)


def say_made(made: Artifact, following: Sequence[str]) -> None:
    """Say what a stage wrote, if it was not there already, and what to type next."""
    if made.is_new:
        cost = made.manifest.made
        spent = f"{cost['seconds']:.1f} s  peak {cost['peak_memory_bytes'] / 2**20:,.0f} MiB"
        say_wrote(made.path, f"id {made.id}", spent)
    say_next(*following)


def say_wrote(path: object, *facts: str) -> None:
    """Say what was written, and facts about it."""
    from rich.markup import escape

    say("  ".join([f"wrote [bold]{escape(str(path))}[/bold]", *facts]))


def say_next(*commands: str) -> None:
    """Say what to type next, or else."""
    from rich.markup import escape

    for index, command in enumerate(commands):
        say(f"{'  or:' if index else 'next:'} [cyan]{escape(command)}[/cyan]")


@contextmanager
def live_progress(task: str = "") -> Iterator[LiveProgress | LineProgress]:
    """Draw progress while the block runs: bars on a terminal, else a line now and then that names the task."""
    from bdbench.cli import live

    if not sys.stderr.isatty():
        lines = live.LineProgress(say_plainly, task)
        with lines.interruptible():
            yield lines
        return
    with live.bars(_console(stderr=True)) as bars:
        progress = live.LiveProgress(bars, task)
        with progress.interruptible():
            yield progress
