"""A table as Markdown, LaTeX, or cells that a spreadsheet does not compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import pandas as pd

from bdbench.text import csv_cell, latex_text, markdown_cell


class Column(NamedTuple):
    """A column of the printed table: key of the row, heading, and whether it holds numbers, which stand right."""

    key: str
    heading: str
    is_number: bool = True


def safe_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts are safe in a spreadsheet; numbers stay as they are."""
    return frame.map(_safe_cell)


def safe_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a table whose headings and texts are safe in a spreadsheet."""
    return pd.DataFrame([{csv_cell(key): _safe_cell(item) for key, item in row.items()} for row in rows])


def _safe_cell(value: object) -> object:
    return csv_cell(value) if isinstance(value, str) else value


def markdown(columns: Sequence[Column], cells: list[list[str]], notes: list[str]) -> str:
    """Return a table in Markdown, its notes below."""
    lines = ["| " + " | ".join(column.heading for column in columns) + " |"]
    cells = [[markdown_cell(text) for text in line] for line in cells]
    lines.append("|" + "|".join("---:" if column.is_number else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{markdown_cell(note)}  " for note in notes)]).rstrip()


def latex(
    columns: Sequence[Column],
    cells: list[list[str]],
    notes: list[str],
    bold: AbstractSet[tuple[int, int]] = frozenset(),
) -> str:
    """Return a table in LaTeX (booktabs), its notes below it in small type; `bold` are places (row, column)."""

    def line(parts: Iterable[str]) -> str:
        return " & ".join(latex_text(part) for part in parts) + r" \\"

    def body(row: int, parts: Sequence[str]) -> str:
        shown = [latex_text(part) for part in parts]
        return (
            " & ".join(rf"\textbf{{{it}}}" if (row, place) in bold else it for place, it in enumerate(shown)) + r" \\"
        )

    alignment = "".join("r" if column.is_number else "l" for column in columns)
    below = (
        [r"\par\smallskip", r"{\footnotesize", *(rf"{latex_text(note)}\par" for note in notes), "}"] if notes else []
    )
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line(column.heading for column in columns),
            r"\midrule",
            *(body(row, parts) for row, parts in enumerate(cells)),
            r"\bottomrule",
            r"\end{tabular}",
            *below,
        ]
    )
