"""Put every registered attack on CIFAR-10 and keep how far its trigger moves images, and one picture of all of them.

    python benchmarks/triggers.py --data-root DATA
    python benchmarks/triggers.py --data-root DATA --images 5000 --only sig --only wanet

Writes results/triggers.csv, results/triggers.md and results/triggers.png. Every attack has its own settings but for the
target, class 0, so that one test image can stand for all. With `--images N` the first N training and N / 5 test images
are taken; triggers that are learned then come from a weaker surrogate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bdbench import pictures, stages
from bdbench.artifacts import DatasetArtifact
from bdbench.datasets.torchvision_sets import Cifar10
from bdbench.errors import BdbenchError
from bdbench.judging import trigger_distances
from bdbench.progress import Silent
from bdbench.registry import ATTACKS

RESULTS = Path(__file__).parent / "results"
SHARED_TARGET = 0
OTHER_TARGETS = {"cba": {"source": 1, "partner": 2, "target": 0}}


def subset(data_root: Path, images: int, folder: Path) -> Path:
    """Write the first images of both splits as an archive and return its path."""
    path = folder / f"cifar10-{images}.npz"
    if not path.exists():
        source = Cifar10(data_root=data_root).load(Silent())
        arrays: dict[str, Any] = {}
        for name, split, count in (("train", source.train, images), ("test", source.test, images // 5)):
            arrays[f"x_{name}"] = split.images[:count].permute(0, 2, 3, 1).numpy()
            arrays[f"y_{name}"] = split.labels[:count].numpy()
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    return path


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


def markdown(rows: pd.DataFrame, images: int) -> str:
    """Return the table that people read."""
    lines = [
        f"CIFAR-10, the first {images:,} training images; distances over at most 1,000 triggered test images.",
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
    parser.add_argument("--data-root", type=Path, required=True, help="folder of local copies of named data sets")
    parser.add_argument("--images", type=int, default=50_000, help="training images, at most 50,000")
    parser.add_argument("--runs", type=Path, default=Path("runs/triggers"), help="folder of the artifacts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="some attacks")
    given = parser.parse_args(arguments)
    archive = subset(given.data_root, given.images, given.runs)
    rows, made, failed = [], [], []
    for name in given.only or ATTACKS.names():
        options = OTHER_TARGETS.get(name, {"target": SHARED_TARGET})
        try:
            data = stages.poison(archive, name, options=options, out=given.runs / f"{given.images}-{name}")
        except BdbenchError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        made.append(data)
        rows.append(facts(name, data))
        print(f"{name}: {data.manifest.made['seconds']:.1f} s", flush=True)
    given.results.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(given.results / "triggers.csv", index=False)
    (given.results / "triggers.md").write_text(markdown(frame, given.images))
    pictures.gallery(made, given.results / "triggers.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
