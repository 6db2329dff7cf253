"""Run a named suite of attacks and defences through the Python API and keep its rows in benchmarks/results/.

    python benchmarks/reproduce.py quickstart
    python benchmarks/reproduce.py cifar10-cpu --data-root DATA

Resumable: what is in the runs folder is reused, and an interrupted training goes on from its last checkpoint. Rows
are written after every cell, with ids, versions, hardware, seconds and the command.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from bdbench import stages, tables
from bdbench.cli.quickstart import ATTACK_OPTIONS, METHODS

RESULTS = Path(__file__).parent / "results"


class Cell(NamedTuple):
    """One model: data, attack, defence and seed."""

    dataset: str
    attack: str
    attack_options: dict[str, Any]
    method: str
    preset: str
    options: dict[str, Any]
    seed: int


def suites() -> dict[str, list[Cell]]:
    """Return the cells of every suite."""
    return {
        "quickstart": [
            Cell("digits", "badnets", dict(ATTACK_OPTIONS), method, "tiny", {}, seed)
            for seed in range(5)
            for method in METHODS
        ],
        "cifar10-cpu": [
            Cell("cifar10", attack, {"rate": 0.1, "target": 0}, method, "fast", {}, 0)
            for attack in ("badnets", "blended")
            for method in ("cbd", "abl", "none")
        ],
    }


def run(cell: Cell, runs: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Run or reuse a cell and return its row."""
    name = f"{cell.dataset}-{cell.attack}-s{cell.seed}"
    data = stages.poison(
        cell.dataset, cell.attack, options=cell.attack_options, source_options=source, seed=cell.seed, out=runs / name
    )
    model = stages.defend(
        data.path, cell.method, preset=cell.preset, options=cell.options, out=runs / f"{name}-{cell.method}"
    )
    row = tables.evaluation_row(stages.evaluate(model.path))
    return row | {"made": model.manifest.made, "processor": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """Return the name of the CPU and what it accelerates."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def keep(suite: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, every single run, and as Markdown, one line for all seeds."""
    RESULTS.mkdir(exist_ok=True)
    marked = tables.mark_rows(rows)
    for row in marked:
        row.pop("path", None)
        row["command"] = f"python benchmarks/reproduce.py {suite}"
    (RESULTS / f"{suite}.csv").write_text(str(tables.render(marked, "csv")))
    (RESULTS / f"{suite}.md").write_text(str(tables.render(marked, "markdown")) + "\n")
    print(pd.DataFrame(marked)[["attack", "defense", "seed", "ba", "asr", "floor", "seconds"]].to_string(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites())
    parser.add_argument("--data-root", type=Path, help="folder of local copies of named data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the artifacts")
    arguments = parser.parse_args(sys.argv[1:])
    source = {"data_root": arguments.data_root} if arguments.data_root else {}
    rows: list[dict[str, Any]] = []
    for cell in suites()[arguments.suite]:
        print(cell, flush=True)
        rows.append(run(cell, arguments.runs, source))
        keep(arguments.suite, rows)


if __name__ == "__main__":
    main()
