"""Run every registered attack and every registered defense once, on the digits, on one device.

    python benchmarks/methods.py --device cuda --out methods.csv
    python benchmarks/methods.py --rehearsal --only badnets --only cbd

A method that fails has a row that says why, and the others go on. Rows are written one by one; the same command goes on
with those that are not there or failed. Defenses meet BadNets as in the quickstart, with the preset `tiny`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bdbench import stages
from bdbench.cli.quickstart import ATTACK_OPTIONS
from bdbench.options import Options
from bdbench.registry import ATTACKS, DEFENSES
from bdbench.training.recipe import Recipe

REHEARSAL = {"epochs": 1, "steps": 2, "steps_per_epoch": 2, "rounds": 1}
"""What options are set to whose names end so."""

EASY: Mapping[str, Mapping[str, Any]] = {
    "ssba": {"secret_bits": 1, "encoder_width": 16, "encoder_side": 8, "encoder_epochs": 10, "encoder_lr": 5e-3}
}
"""Options of attacks that end with an error where a phase has not learned its task: a task that is learned soon."""


def shortest(*options: type[Options]) -> dict[str, int]:
    """Return settings that make all phases of a method as short as they can be."""
    names = [name for kind in options for name in kind.model_fields]
    return {name: value for name in names for end, value in REHEARSAL.items() if f"_{name}".endswith(f"_{end}")}


def attack(name: str, runs: Path, device: str, *, rehearsal: bool) -> dict[str, Any]:
    """Poison with an attack, and train on it without defense."""
    cls = ATTACKS.load(name)
    options = {**shortest(cls), **EASY.get(name, {})} if rehearsal else {}
    if name == "badnets":
        options |= ATTACK_OPTIONS
    data = stages.poison("digits", name, options=options, out=runs / name, device=device)
    return defended(data.path, "none", device, rehearsal=rehearsal) | {"made": data.manifest.made["training_seconds"]}


def defense(name: str, runs: Path, device: str, *, rehearsal: bool) -> dict[str, Any]:
    """Defend against BadNets."""
    data = stages.poison("digits", "badnets", options=ATTACK_OPTIONS, out=runs / "badnets-defended", device=device)
    if name != "none":
        defended(data.path, "none", device, rehearsal=rehearsal)
    return defended(data.path, name, device, rehearsal=rehearsal)


def defended(data: Path, name: str, device: str, *, rehearsal: bool) -> dict[str, Any]:
    """Train with a defense and judge the model."""
    options = shortest(Recipe, DEFENSES.load(name)) if rehearsal else {}
    without = None
    if DEFENSES.load(name).needs_scan:
        without = stages.scan(data, "spectral", decide="budget:0.1", preset="tiny", device=device).path
    model = stages.defend(data, name, preset="tiny", options=options, without=without, device=device)
    rates = stages.evaluate(model.path, device=device).metrics
    values = dict(zip(rates["metric"], rates["value"], strict=True))
    made = model.manifest.made
    return {
        "training_seconds": made["training_seconds"], "peak_mib": made["peak_memory_bytes"] >> 20,
        "ba": values["ba"], "asr": values.get("asr"), "device": made["device"], "precision": made["precision"],
    }  # fmt: skip


KINDS = {"defense": (DEFENSES, defense), "attack": (ATTACKS, attack)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the artifacts")
    parser.add_argument("--out", type=Path, default=Path("methods.csv"), help="table of the rows")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="some methods")
    parser.add_argument("--rehearsal", action="store_true", help="every phase as short as it can be")
    given = parser.parse_args(arguments)
    before = pd.read_csv(given.out).to_dict("records") if given.out.exists() else []
    rows: list[dict[Any, Any]] = [row for row in before if row["said"] == "ok"]
    there = {(row["kind"], row["method"]) for row in rows}
    failed = 0
    for kind, (registry, run) in KINDS.items():
        for name in registry.names():
            if (kind, name) in there or (given.only and name not in given.only) or name.endswith(":NAME"):
                continue
            row = timed(lambda run=run, name=name: run(name, given.runs, given.device, rehearsal=given.rehearsal))
            rows.append({"kind": kind, "method": name, **row})
            failed += row["said"] != "ok"
            pd.DataFrame(rows).to_csv(given.out, index=False)
            print(f"{kind:8} {name:12} {row['seconds']:6.1f} s  {row['said']}", flush=True)
    print(f"done: {len(rows) - failed} ok, {failed} failed")
    return 1 if failed else 0


def timed(run: Any) -> Mapping[str, Any]:  # noqa: ANN401 - see `KINDS`
    """Return what a method gave, or why it failed, and its seconds."""
    begun = time.perf_counter()
    try:
        row = run() | {"said": "ok"}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other methods go on
        row = {"said": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"seconds": round(time.perf_counter() - begun, 2), **row}


if __name__ == "__main__":
    sys.exit(main())
