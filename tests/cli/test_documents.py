"""README and bdbench/docs: what they show exists, runs, and is what the code says."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.markdown import Markdown
from toys import toy_data, toy_model

from bdbench import __version__, stages
from bdbench.cli import docs
from bdbench.models.wrappers import wrap
from bdbench.protocol.metric_list import METRICS
from bdbench.registry import REGISTRIES
from bdbench.reports import catalogue, tables
from bdbench.sweeps.grid import read_grid

ROOT = Path(__file__).parents[2]
PAGES = sorted(docs.FOLDER.glob("*.md"))
SHOWN = [ROOT / "README.md", *PAGES]
"""Documents whose commands are typed."""
LINKED = [*SHOWN, *sorted((ROOT / "benchmarks").glob("*.md")), *sorted((ROOT / ".github").glob("*.md"))]

named = {"argvalues": SHOWN, "ids": [page.stem for page in SHOWN]}


# commands


def console_lines(text: str) -> list[list[str]]:
    """The words of every command of bdbench that a text shows, without its comment."""
    typed = re.findall(r"(?m)^\$ (?:.* && )?(?:\S*/)?bdbench (.*)$", text)
    return [shlex.split(line, comments=True) for line in typed]


TRAINING = {"quickstart", "train", "defend", "scan"}
"""Commands that take long: only their flags are looked at, as those of sweeps that are not dry."""
ELSEWHERE = re.compile(r"cifar10|photos|DATA|runs/grid")
"""What a line names that runs on other images than the digits, or after a sweep."""


def can_be_run(words: list[str]) -> bool:
    if words[0] == "sweep" and not {"--init", "--dry-run"} & set(words):
        return False
    return words[0] not in TRAINING and not any(ELSEWHERE.search(word) for word in words)


@pytest.mark.parametrize("page", **named)
def test_every_flag_that_a_document_shows_exists(page: Path, bdbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for name, *words in console_lines(page.read_text()):
        method = [
            word for flag in ("--method", "--attack") if flag in words for word in (flag, words[words.index(flag) + 1])
        ]
        result = bdbench(name, *method, "--help")
        assert result.code == 0, name
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", result.out), (name, word)


def test_the_commands_of_the_documents_run_as_they_are_typed(copy_of_walk: Path, bdbench: Any) -> None:
    lines = [words for page in SHOWN for words in console_lines(page.read_text())]
    assert {"quickstart", "poison", "train", "defend", "evaluate", "table"} <= {words[0] for words in lines}
    distinct = {shlex.join(words): words for words in lines if can_be_run(words)}
    assert len(distinct) >= 20
    for words in distinct.values():
        result = bdbench(*words)
        assert result.code in ((0, 3) if "--assert" in words else (0,)), (words, result.err)


# grids, Python, plugins


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", page.read_text())


@pytest.mark.parametrize("page", **named)
def test_the_grids_of_a_document_can_be_read(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "toml")):
        if "seeds" in text:
            file = tmp_path / f"{number}.toml"
            file.write_text(text)
            assert len(read_grid(file).cells) > 1


def test_the_python_of_the_documents_runs(copy_of_walk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defend = stages.defend

    def quick(*given: Any, options: Mapping[str, Any] | None = None, **named: Any) -> Any:
        budget = {name: 1 for name in options or {} if name == "twin_epochs"}
        return defend(*given, options={**(options or {}), **budget, "epochs": 1, "batch_size": 256}, **named)

    monkeypatch.setattr(stages, "defend", quick)
    for page in (ROOT / "README.md", docs.FOLDER / "python.md"):
        code = "".join(text for text in blocks(page, "python") if "class Stripe" not in text)
        exec(compile(code, str(page), "exec"), {})


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package of plugins.md, as if it were installed."""
    page = docs.FOLDER / "plugins.md"
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "methods.py").write_text("\n".join(blocks(page, "python")))
    (groups,) = blocks(page, "toml")
    described = tmp_path / "mypackage-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    entries = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", groups).replace('"', "")
    (described / "entry_points.txt").write_text(entries)
    return tmp_path


def test_the_plugins_of_the_documents_are_in_every_command(package: Path) -> None:
    def called(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bdbench", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
        return subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)

    listed = json.loads(called("list", "--json").stdout)
    assert {"stripe", "drop-easy"} <= {row["name"] for kind in ("attacks", "defenses") for row in listed[kind]}
    done = called("poison", "--attack", "stripe", "--column", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["triggered"] == 323
    refused = called("poison", "--attack", "stripe", "--column", "30", "--out", "other")
    assert (refused.returncode, "column 30 is outside 0..15" in refused.stderr) == (2, True)
    done = called("defend", "--method", "drop-easy", "--drop", "0.2", "--epochs", "1", "--first-epochs", "1")
    assert done.returncode == 0, done.stderr
    (model,) = package.glob("runs/*-drop-easy*")
    assert json.loads((model / "manifest.json").read_text())["facts"]["findings"] == {"dropped": 273}


def test_the_wrapper_of_the_documents_goes_with_copies_of_a_network() -> None:
    (code,) = (text for text in blocks(docs.FOLDER / "plugins.md", "python") if "class Temperature" in text)
    names: dict[str, Any] = {"__name__": "mypackage"}
    exec(compile(code, "plugins.md", "exec", dont_inherit=True), names)
    data = toy_data(4)
    plain, model = toy_model(data).eval(), wrap(toy_model(data), names["Temperature"](first=2.0), data.image_shape)
    other = copy.deepcopy(model.eval())
    other.get_buffer("head.temperature").fill_(4.0)
    images = data.images.float() / 255
    assert torch.equal(model(images), plain(images) / 2)
    assert torch.equal(other(images), plain(images) / 4)


# what they say


@pytest.mark.parametrize("page", catalogue.PAGES)
def test_the_list_of_methods_in_a_page_is_that_of_the_registry(page: str) -> None:
    text = (docs.FOLDER / f"{page}.md").read_text()
    assert catalogue.filled(page, text) == text, "run: python -m bdbench.reports.catalogue"


def test_every_command_is_explained(bdbench: Any) -> None:
    offered = re.findall(r"(?m)^│ ([a-z]+) ", bdbench("--help").out)
    assert re.findall(r"(?m)^\| `([a-z]+)` \|", (docs.FOLDER / "commands.md").read_text()) == offered


def test_every_metric_and_every_mark_is_explained() -> None:
    text = (docs.FOLDER / "metrics.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in text] == []
    assert re.findall(r"(?m)^\| `(.)` \|", text) == list(tables.MARKS)


def test_the_readme_names_all_that_there_is_and_fits() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for registry in REGISTRIES.values() for name in registry.names() if f"`{name}`" not in text]
    assert missing == []
    assert [page.stem for page in PAGES if f"(bdbench/docs/{page.name})" not in text] == []
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 100


def test_the_workflow_of_the_readme_is_the_one_to_copy() -> None:
    (shown,) = blocks(ROOT / "README.md", "yaml")
    assert shown in (ROOT / ".github" / "workflows" / "backdoor.yml").read_text()


def test_what_is_cited_is_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_contributing_names_every_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = {name for line in contracts[0]["layers"] for name in re.findall(r"bdbench\.(\w+)", line)} - {"__main__"}
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    assert [name for name in sorted(names) if f"`{name}/`" not in text and f"`{name}.py`" not in text] == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=[f"{page.parent.name}-{page.stem}" for page in LINKED])
def test_every_link_between_documents_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", re.sub(r"(?s)```.*?```", "", page.read_text())):
        place, _, anchor = target.partition("#")
        file = page.parent / place if place else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# bdbench docs


def test_docs_lists_the_pages_with_a_sentence_each(bdbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    out = bdbench("docs").out
    for name, summary in docs.topics().items():
        assert re.search(rf"(?m)^{name} +{re.escape(summary)}", out)
        assert summary.endswith(".")


def test_docs_gives_a_page_as_it_is_to_a_file_and_says_where_it_lies(bdbench: Any) -> None:
    page = docs.FOLDER / "metrics.md"
    assert bdbench("docs", "metrics").out == page.read_text()
    assert bdbench("docs", "metrics", "--path").out.strip() == str(page)
    assert bdbench("docs", "--path").out.strip() == str(docs.FOLDER)


def test_docs_names_the_nearest_page(bdbench: Any) -> None:
    result = bdbench("docs", "metrcs")
    assert result.code == 2
    assert "Did you mean 'metrics'?" in result.err


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_fits_a_terminal_of_eighty_columns(page: Path) -> None:
    written = StringIO()
    Console(file=written, width=80, force_terminal=True, color_system=None).print(
        Markdown(docs.for_terminal(page.read_text()), hyperlinks=False)
    )
    assert max(len(line.rstrip()) for line in written.getvalue().splitlines()) <= 80
    code = [line for block in re.findall(r"(?s)```\w*\n(.*?)```", page.read_text()) for line in block.splitlines()]
    assert [line for line in code if len(line) > 78] == []


def test_links_to_other_pages_are_commands_in_a_terminal() -> None:
    assert docs.for_terminal("see [the cache](artifacts.md#the-cache).") == "see the cache (`bdbench docs artifacts`)."
    assert docs.for_terminal("[a/b](../../a/b) [c](../../a/c.md#d)") == "a/b c (a/c.md)"
    assert docs.for_terminal("[paper](https://arxiv.org)") == "[paper](https://arxiv.org)"


def test_docs_starts_without_torch() -> None:
    code = (
        "import sys\nfrom bdbench.cli.app import run\n"
        "try: run(['docs', 'metrics'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
