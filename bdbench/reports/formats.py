"""A table as Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Column(NamedTuple):
    """A column of the printed table: key of the row, heading, and whether it is a rate."""

    key: str
    heading: str
    is_rate: bool = True


def markdown(columns: list[Column], cells: list[list[str]], notes: list[str]) -> str:
    """Return a table in Markdown, its notes below."""
    lines = ["| " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.is_rate else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip()


def latex(columns: list[Column], cells: list[list[str]], notes: list[str]) -> str:
    """Return a table in LaTeX (booktabs), its notes above as comments."""

    def escape(text: str) -> str:
        for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("±", r"$\pm$")):
            text = text.replace(plain, escaped)
        return text

    def line(parts: Iterable[str]) -> str:
        return " & ".join(escape(part) for part in parts) + r" \\"

    alignment = "".join("r" if column.is_rate else "l" for column in columns)
    return "\n".join(
        [
            *(f"% {note}" for note in notes),
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line(column.heading for column in columns),
            r"\midrule",
            *(line(cell) for cell in cells),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
