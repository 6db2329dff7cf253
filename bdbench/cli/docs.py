"""bdbench docs: the documents that come with the package, in the terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdbench.cli import console
from bdbench.errors import OptionError, did_you_mean

FOLDER = Path(__file__).parents[1] / "docs"


def topics() -> dict[str, str]:
    """Return the topics, each with the first sentence of its page."""
    return {file.stem: _summary(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.md"))}


def _complete(incomplete: str) -> list[tuple[str, str]]:
    return [item for item in topics().items() if item[0].startswith(incomplete)]


def docs(
    topic: Annotated[
        str | None,
        typer.Argument(help="Page to show; default: list all pages.", show_default=False, autocompletion=_complete),
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Print where the page lies instead of its text.")] = False,
) -> None:
    """Show a page of the documentation, or list the pages.

    In a file or a pipe the page is plain Markdown.

    Examples:
      bdbench docs

      bdbench docs metrics

      bdbench docs plugins --path
    """
    if topic is None:
        if path:
            console.show(str(FOLDER))
            return
        _list()
        return
    name = topic.lower().removesuffix(".md")
    if name not in topics():
        raise OptionError(f"no page '{topic}'.{did_you_mean(name, topics())} Pages: {', '.join(topics())}")
    file = FOLDER / f"{name}.md"
    if path:
        console.show(str(file))
        return
    text = file.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        console.show(text)
        return
    from rich.markdown import Markdown

    console.show(Markdown(for_terminal(text), code_theme="ansi_dark"))


def _list() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, summary in topics().items():
        table.add_row(Text(name, style="bold"), summary)
    console.show(table)
    console.say("more: [cyan]bdbench docs TOPIC[/cyan]")


def _summary(text: str) -> str:
    """Return the first sentence below the heading of a page."""
    _, paragraph, *_ = text.split("\n\n")
    first = re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]
    return " ".join(first.split())


def for_terminal(text: str) -> str:
    """Return a page whose links to other pages are commands, and whose links into the repository are paths."""
    text = re.sub(r"\[([^]]*)\]\((\w+)\.md(?:#[^)]*)?\)", r"\1 (`bdbench docs \2`)", text)
    return re.sub(r"!?\[([^]]*)\]\((?:\.\./)+([^)#]*)(?:#[^)]*)?\)", _path, text)


def _path(link: re.Match[str]) -> str:
    return link[2] if link[1] == link[2] else f"{link[1]} ({link[2]})"
