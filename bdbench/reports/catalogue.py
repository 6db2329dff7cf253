"""The lists of methods in bdbench/docs, made from the registry: `python -m bdbench.reports.catalogue` writes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bdbench import files
from bdbench.attacks.base import Attack
from bdbench.registry import ATTACKS, DEFENSES, DETECTORS, Registry, Row

FOLDER = Path(__file__).parents[1] / "docs"


def attacks_table() -> str:
    """Return a line per attack: name, what it does, threat model, default poison rate, paper."""
    lines = ["| attack | trigger | threat model | rate | |", "|---|---|---|---:|---|"]
    for name, row in _built_in(ATTACKS):
        cls = ATTACKS.load(name)
        rate, paper = "", ""
        if issubclass(cls, Attack):
            rate, paper = f"{100 * cls.model_fields['rate'].default:g} %", f"[paper]({cls.paper})"
        lines.append(f"| `{name}` | {row.summary} | {row.threat} | {rate} | {paper} |")
    return "\n".join(lines)


def defenses_sections() -> str:
    """Return a list of all defenses, then a section each: what its docstring says before the paper, and the paper."""
    return _sections(DEFENSES)


def detectors_sections() -> str:
    """Return a list of all detectors, then a section each; see `defenses_sections`."""
    return _sections(DETECTORS)


def _sections(registry: Registry) -> str:
    lines = [f"| {registry.kind} | |", "|---|---|"]
    lines += [f"| `{name}` | {row.summary} |" for name, row in _built_in(registry)]
    sections = ["\n".join(lines)]
    for name, _ in _built_in(registry):
        cls = registry.load(name)
        paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
        method = [text for text in paragraphs if not text.startswith(("Paper:", "Differs"))]
        end = next((place for place, text in enumerate(paragraphs) if text.startswith("Paper:")), len(method))
        facts = [f"*Threat model:* {cls.threat}."]
        if cls.paper.startswith("http"):
            facts.append(f"*Paper:* <{cls.paper}>.")
        steps = (re.sub(r"\s(?=\d\. `)", "\n", text) for text in method[:end])
        sections.append("\n\n".join([f"## {name}", *steps, " ".join(facts)]))
    return "\n\n".join(sections)


def _built_in(registry: Registry) -> Iterator[tuple[str, Row]]:
    """Yield the rows that are no plugins."""
    return ((name, row) for name, row in registry.rows.items() if row.target.startswith("bdbench."))


PAGES: dict[str, Callable[[], str]] = {
    "attacks": attacks_table,
    "defenses": defenses_sections,
    "detectors": detectors_sections,
}
"""From a page, which is also the name of its markers, to what stands between them."""


def filled(page: str, text: str) -> str:
    """Return the text of a page with today's list between its markers.

    Raises:
        ValueError: the page lacks the markers.
    """
    pattern = re.compile(rf"(?s)(<!-- {page} -->\n).*?(<!-- /{page} -->)")
    if not pattern.search(text):
        raise ValueError(f"{page}.md has no markers <!-- {page} --> and <!-- /{page} -->")
    return pattern.sub(lambda found: f"{found[1]}{PAGES[page]()}\n{found[2]}", text)


def write(folder: Path = FOLDER) -> None:
    """Write today's lists into the pages."""
    for page in PAGES:
        file = folder / f"{page}.md"
        text = filled(page, file.read_text(encoding="utf-8"))
        with files.replace_file(file) as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
