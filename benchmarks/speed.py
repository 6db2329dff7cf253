"""Measure bdbench against the pipeline people write by hand, both in one run, turn by turn.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --quick --seconds 300
    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --only train-wrn-16-1 --only data-path

The data are synthetic, of CIFAR-10's shape and from a fixed seed: nothing is downloaded. README.md beside
this file says what each row means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import rows_data
import rows_defenses
import rows_growth
import rows_networks
import rows_processes
import rows_sharing
import torch
from limits import machine_facts
from measuring import FULL, GPU, QUICK, QUICK_RATE, REHEARSAL, Bench, Row, Rows, cache_in, fitted
from rich import box
from rich.console import Console
from rich.table import Table

from bdbench.errors import BdbenchError
from bdbench.training.devices import resolve_device, use_bf16

GROUPS: Mapping[str, Rows] = {
    **rows_processes.ROWS,
    **rows_networks.ROWS,
    **rows_sharing.ROWS,
    **rows_defenses.ROWS,
    **rows_data.ROWS,
    **rows_growth.ROWS,
}
QUICK_SECONDS = 600
"""What `--quick` may take. Setting a group up and the first, uncounted round are not shortened."""

RIGHT = ("baseline", "bdbench", "times faster", "of the limit", "peak MB")


def show(console: Console, facts: Mapping[str, str | float], rows: Sequence[Row], seconds: float) -> None:
    """Print the machine and the table; into a file it is Markdown."""
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for column in ("row", "baseline", "bdbench", "times faster", "of the limit", "unit", "peak MB", "note"):
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"Medians (least - largest) over turns; {seconds:.0f} s in all.", highlight=False)


def cells(row: Row) -> list[str]:
    """Return the row as text."""
    sides = [figure(row, side) for side in ("baseline", "bdbench", "ratio")]
    share = "" if row.limit_share is None else f"{row.limit_share:.0%}"
    peaks = " / ".join(f"{peak:,.0f}" for peak in (row.peak_memory_mb or {}).values())
    return [row.name, *sides, share, row.unit, peaks, row.note]


def figure(row: Row, side: str) -> str:
    """Return the median and spread of a column, as far as there are any."""
    median: float | None = getattr(row, side)
    if median is None:
        return "-"
    digits = 2 if side == "ratio" or row.unit == "s" else 0
    low, high = row.spread[side]
    return f"{median:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list."""
    return json.dumps([row._asdict() for row in rows], indent=1) + "\n"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `device` comes back as torch's."""
    parser = argparse.ArgumentParser(description="Measure bdbench against the pipeline people write by hand.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer images and turns, as many as a first look says")
    size.add_argument("--rehearsal", action="store_true", help="see that every row works; its figures mean nothing")
    parser.add_argument(
        "--seconds", type=float, help="about how long, by fewer turns (default: 600 with --quick, else no limit)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:N or mps (default: cpu)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of bdbench")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch, for both sides; 1 where others compute too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, as a list, after every group")
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    arguments = parser.parse_args(given)
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else math.inf
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads {arguments.threads} must be at least 1")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        parser.error(f"--json {arguments.json} cannot be written: name a file in a folder that exists")
    try:
        arguments.device = resolve_device(arguments.device)
    except BdbenchError as error:
        parser.error(f"--device: {error}")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit code, 1 if a group of rows failed."""
    arguments = parse_arguments(given)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: meant
    begun = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 300)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bf16 = use_bf16(arguments.precision, arguments.device)
    bench = Bench(GPU if arguments.device.type == "cuda" else FULL, arguments.device, bf16)
    if arguments.rehearsal:
        bench = replace(bench, sizes=REHEARSAL)
    elif arguments.quick:
        rate = rows_networks.training_rate(replace(bench, sizes=REHEARSAL))
        share = arguments.seconds / QUICK_SECONDS * len(GROUPS) / len(arguments.only or GROUPS)
        bench = replace(bench, sizes=fitted(QUICK, rate / QUICK_RATE * min(1, share), FULL))
        console.print(f"at {rate:,.0f} images/s an epoch has {bench.sizes.train:,} images", highlight=False)
    precision = f"{'bf16' if bf16 else 'fp32'} ({arguments.precision})"
    facts = machine_facts(bench.device, precision, bench.ceilings)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, cache_in(Path(folder)):
        names = list(dict.fromkeys(arguments.only or GROUPS))
        for index, name in enumerate(names):
            left = begun + arguments.seconds - time.perf_counter()
            bench.until = time.monotonic() + left / (len(names) - index)
            try:
                with console.status(name):
                    rows += GROUPS[name](bench)
            except RuntimeError as error:  # torch's; the other groups go on
                failed[name] = str(error).strip().splitlines()[0]
            if arguments.json:
                arguments.json.write_text(as_json(rows), encoding="utf-8")
    show(console, facts, rows, time.perf_counter() - begun)
    for name, message in failed.items():
        console.print(f"failed: {name}: {message}", highlight=False, markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
