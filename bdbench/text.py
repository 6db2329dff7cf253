"""Text from outside (class names, file names, options) as it may be shown: a function for each place it goes to."""

from __future__ import annotations

import unicodedata

DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters without a shape that turn the text around them: a name could look like another."""
HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of control characters, halves of characters, and ends of lines."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "^": r"\textasciicircum{}",
    "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
MARKDOWN = {"\\": "\\\\", "|": r"\|", "[": r"\[", "]": r"\]", "`": r"\`", "*": r"\*", "<": "&lt;", ">": "&gt;"}


def printable(text: str) -> str:
    r"""Return text without anything that a terminal obeys: control characters and the like are written ``\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def printable_lines(text: str) -> str:
    """Return text likewise, with its ends of lines and its tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _shown(character: str) -> str:
    if character not in DIRECTIONS and unicodedata.category(character) not in HIDDEN:
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def csv_cell(text: str) -> str:
    """Return text for a cell of a spreadsheet: what a spreadsheet would compute gets an apostrophe before it."""
    shown = printable(text)
    return f"'{shown}" if text.startswith(FORMULA) else shown


def markdown_cell(text: str) -> str:
    """Return text for a cell of a Markdown table: no column, no HTML, no link and no picture of its own."""
    return "".join(MARKDOWN.get(character, character) for character in printable(text))


def latex_text(text: str) -> str:
    """Return text for LaTeX: no command of its own."""
    return "".join(LATEX.get(character, character) for character in printable(text))
