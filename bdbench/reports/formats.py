"""A table as Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A column of the printed table: key of the row, heading, and whether it holds numbers, which stand right."""

    key: str
    heading: str
    is_number: bool = True


def markdown(columns: Sequence[Column], cells: list[list[str]], notes: list[str]) -> str:
    """Return a table in Markdown, its notes below."""
    lines = ["| " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.is_number else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip()


LATEX: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
}  # fmt: skip
"""Characters that LaTeX would read as something else."""


def latex(columns: Sequence[Column], cells: list[list[str]], notes: list[str]) -> str:
    """Return a table in LaTeX (booktabs), its notes below it in small type."""

    def escape(text: str) -> str:
        return text.translate(str.maketrans(LATEX))

    def line(parts: Iterable[str]) -> str:
        return " & ".join(escape(part) for part in parts) + r" \\"

    alignment = "".join("r" if column.is_number else "l" for column in columns)
    below = [r"\par\smallskip", r"{\footnotesize", *(rf"{escape(note)}\par" for note in notes), "}"] if notes else []
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line(column.heading for column in columns),
            r"\midrule",
            *(line(cell) for cell in cells),
            r"\bottomrule",
            r"\end{tabular}",
            *below,
        ]
    )
