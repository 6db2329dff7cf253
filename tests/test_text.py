"""Text from outside cannot command a terminal, a spreadsheet, Markdown or LaTeX."""

from __future__ import annotations

import unicodedata

import pytest

from bdbench.text import csv_cell, latex_text, markdown_cell, printable


@pytest.mark.parametrize("text", ["cat", "Katze, groß", "犬", "👩‍👩‍👧", "a [b] <c>", "", "naïve"])
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\r\tc", r"a\x0ab\x0d\x09c"),
        ("\x9b1m", r"\x9b1m"),
        ("cat\u202egnp.exe", r"cat\u202egnp.exe"),
        ("half\udc80", r"half\udc80"),
        ("\u2028", r"\u2028"),
        ("\x00\x7f", r"\x00\x7f"),
    ],
)
def test_what_a_terminal_obeys_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_at_all_reaches_a_terminal_as_a_command() -> None:
    shown = printable("".join(map(chr, range(0x3000))) + "\ud800")
    assert {unicodedata.category(character) for character in shown}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    shown.encode()


@pytest.mark.parametrize("text", ["=1+cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    assert csv_cell(text).startswith("'")


def test_a_plain_cell_stays_as_it_is() -> None:
    assert csv_cell("badnets rate=0.1") == "badnets rate=0.1"


def test_markdown_gets_no_column_no_html_no_picture() -> None:
    assert markdown_cell("a|b <b>x</b> ![y](http://z) `c`") == (r"a\|b &lt;b&gt;x&lt;/b&gt; !\[y\](http://z) \`c\`")


def test_latex_gets_no_command() -> None:
    assert latex_text(r"\input{/etc/passwd} 5 % of a_b^c~d & #1 $x$ ±") == (
        r"\textbackslash{}input\{/etc/passwd\} 5 \% of a\_b\textasciicircum{}c\textasciitilde{}d \& \#1 \$x\$ $\pm$"
    )
