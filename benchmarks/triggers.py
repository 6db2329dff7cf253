"""Keep how far the trigger of every registered attack moves images of CIFAR-10, and one picture of all of them.

    python benchmarks/triggers.py --data-root DATA
    python benchmarks/triggers.py --data-root DATA --only sig --only wanet

The datasets are those of `reproduce.py attacks`, and are made only if its runs folder does not have them. Writes
results/triggers.csv, results/triggers.md and results/triggers.png; with `--only` the other rows of the table and the
picture stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from reproduce import RESULTS, undefended

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.errors import BdbenchError
from bdbench.protocol.judging import trigger_distances
from bdbench.registry import ATTACKS
from bdbench.reports import pictures


def facts(name: str, data: DatasetArtifact) -> dict[str, Any]:
    """Return the row of an attack."""
    made, counts = data.manifest.made, data.truth["role"].value_counts()
    return {
        "attack": name,
        "threat": ATTACKS.rows[name].threat,
        "poisoned": int(counts.get(1, 0)),
        "covers": int(counts.get(2, 0)),
        **trigger_distances(data),
        "seconds": made["seconds"],
        "training_seconds": made["training_seconds"],
        "peak_mib": round(made["peak_memory_bytes"] / 2**20),
        "dataset_id": data.id,
    }


def markdown(rows: pd.DataFrame) -> str:
    """Return the table that people read."""
    lines = [
        "CIFAR-10, all 50,000 training images (95 % of them, the others are trusted); distances over at most 1,000",
        "triggered test images.",
        "",
        "| attack | threat model | poisoned | covers | PSNR, dB | SSIM | pixels changed | largest change |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.attack} | {row.threat} | {row.poisoned:,} | {row.covers:,} | {row.psnr:.1f} | {row.ssim:.3f} "
        f"| {row.changed:.1%} | {row.max_change:.0f} |"
        for row in rows.itertuples()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of local copies of named datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the artifacts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="some attacks")
    given = parser.parse_args(arguments)
    rows, made, failed = [], [], []
    for name in given.only or [name for name in ATTACKS.names() if name != "none"]:
        cell = undefended(name)[0]
        try:
            data = stages.poison(
                cell.dataset, name, options=cell.attack_options, source_options={"data_root": given.data_root},
                seed=cell.seed, out=given.runs / cell.data_name,
            )  # fmt: skip
        except BdbenchError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        made.append(data)
        rows.append(facts(name, data))
        print(f"{name}: {data.manifest.made['seconds']:.1f} s", flush=True)
    given.results.mkdir(parents=True, exist_ok=True)
    table = given.results / "triggers.csv"
    frame = pd.DataFrame(rows)
    if given.only and table.exists():
        before = pd.read_csv(table)
        frame = pd.concat([before[~before["attack"].isin(frame["attack"])], frame])
    places = {name: place for place, name in enumerate(ATTACKS.names())}
    frame = frame.sort_values("attack", key=lambda names: names.map(places))
    frame.to_csv(table, index=False)
    (given.results / "triggers.md").write_text(markdown(frame))
    if not given.only:
        pictures.gallery(made, given.results / "triggers.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
