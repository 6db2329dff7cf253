"""Rows of commands in processes of their own: how long they take, and the memory they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import baseline
import numpy as np
import torch
from measuring import Bench, Row, Rows, pixels_last, summarise, synthetic_images, take_turns

PYTHON = [sys.executable]
BDBENCH = [*PYTHON, "-m", "bdbench"]
IMPORT_TORCH = [*PYTHON, "-c", "import torch"]
IMPORT_STAGES = [*PYTHON, "-c", "import bdbench.stages"]

# A small process starts each command: Linux counts the memory of whoever starts a process as its own peak.
LAUNCHER = """
import json, subprocess, sys, time
begun = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - begun
try:
    import resource
    unit = 1024 ** 2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
except ImportError:
    peak = None
lines = (done.stderr or done.stdout).strip().splitlines() or [""]
print(json.dumps({"code": done.returncode, "seconds": seconds, "peak_mb": peak, "said": lines[-1]}))
"""


SWEPT_SEEDS = range(2)
SWEPT = """
seeds = {seeds}
datasets = ["images"]
attacks = ["badnets"]
defenses = ["none"]
models = ["wrn-16-1"]
preset = "fast"

[recipe]
epochs = 1

[dataset.images]
use = "{archive}"
"""


class Ran(NamedTuple):
    """What a command took; `code` is its exit status, `said` its last line."""

    code: int
    seconds: float
    peak_mb: float | None
    said: str


def run_command(command: Sequence[str], folder: Path | None = None, threads: int | None = 0) -> Ran:
    """Run a command in a folder, else in an empty one; it may fail.

    `threads` are those that it is told to take: 0 for as many as torch has here, None for what it chooses itself.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as empty:
            return run_command(command, Path(empty), threads)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads or torch.get_num_threads())
    launched = [sys.executable, "-c", LAUNCHER, *command]
    done = subprocess.run(launched, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return Ran(**json.loads(done.stdout))


def compare_commands(
    commands: Mapping[str, Sequence[str]], plainly: Sequence[str], bench: Bench, note: str
) -> Iterator[Row]:
    """Measure commands, by the names of their rows, against one that all of them take turns with."""
    every = [plainly, *commands.values()]
    turns: list[Callable[[], Ran]] = [partial(run_command, command) for command in every]
    theirs, *own = take_turns(turns, bench.sizes.rounds, bench.until)
    for name, ours in zip(commands, own, strict=True):
        yield command_row(name, theirs, ours, note)


def command_row(name: str, theirs: Sequence[Ran], ours: Sequence[Ran], note: str) -> Row:
    """Make a row; a command that failed leaves its columns empty, and the note says why."""
    for failed in (run for run in (*theirs, *ours) if run.code):
        return empty_row(name, "s", failed)
    row = summarise(name, [run.seconds for run in theirs], [run.seconds for run in ours], "s", note=note)
    if any(run.peak_mb is None for run in (*theirs, *ours)):
        return row
    sides = {"baseline": theirs, "bdbench": ours}
    return row._replace(peak_memory_mb={side: max(run.peak_mb or 0 for run in runs) for side, runs in sides.items()})


def empty_row(name: str, unit: str, failed: Ran) -> Row:
    """Make the row of a command that failed, or that says nothing of its memory."""
    why = f"failed ({failed.code}): {failed.said[:60]}" if failed.code else "this system does not say"
    return Row(name, None, None, None, unit, None, {}, note=why)


def command_rows(bench: Bench) -> Iterator[Row]:
    """Start-up, and whole poison commands."""
    started = {"help-seconds": [*BDBENCH, "--help"], "list-seconds": [*BDBENCH, "list", "attacks"]}
    yield from compare_commands(
        started | {"stage-seconds": IMPORT_STAGES}, IMPORT_TORCH, bench, "baseline: import torch"
    )
    digits = {"poison-command-seconds": [*BDBENCH, "poison", "--out", "data"]}
    yield from compare_commands(digits, [*PYTHON, baseline.__file__, "png"], bench, "digits")
    with tempfile.TemporaryDirectory() as folder:
        archive = write_archive(Path(folder), bench.sizes.poison)
        poisoning = {
            f"poison-command-{attack}-seconds": [*BDBENCH, *poison_flags(archive, attack)]
            for attack in ("badnets", "wanet")
        }
        note = f"{bench.sizes.poison:,} decoded images; baseline: imports alone"
        yield from compare_commands(poisoning, IMPORT_STAGES, bench, note)


FEW = {
    "cbd": ["--twin-epochs", "1"],
    "abl": ["--isolation-epochs", "1", "--unlearn-steps", "16"],
    "dbd": ["--ssl-epochs", "1", "--head-epochs", "1", "--steps-per-epoch", "16"],
    "mcldef": ["--inversion-epochs", "1"],
}
"""Short budgets of the defenses: what they hold does not grow with the epochs."""


def memory_rows(bench: Bench) -> Iterator[Row]:
    """The largest memory of each stage as a process, at the size of CIFAR-10; the baseline is what imports need."""
    count = bench.sizes.cifar
    place = ["--device", str(bench.device), "--precision", "bf16" if bench.bf16 else "fp32"]
    with tempfile.TemporaryDirectory() as folder:
        archive = write_archive(Path(folder), count)
        stages = {
            "memory-poison": poison_flags(archive, "badnets"),
            "memory-train": ["train", "data", "--epochs", "1", "--preset", "fast", "--out", "model", *place],
            "memory-evaluate": ["evaluate", "model", *place],
        }
        for method, few in FEW.items():
            defended = ["defend", "data", "--method", method, "--preset", "fast", "--epochs", "1", "--out", method]
            stages[f"memory-{method}"] = [*defended, *few, *place]
        imports = run_command(IMPORT_STAGES)
        for name, arguments in stages.items():
            ran = run_command([*BDBENCH, *arguments], Path(folder))
            yield memory_row(name, imports, ran, f"{count:,} images, {ran.seconds:.0f} s; baseline: imports alone")


def memory_row(name: str, imports: Ran, ran: Ran, note: str) -> Row:
    """Make a row of the memory of two processes."""
    if ran.code or ran.peak_mb is None or imports.peak_mb is None:
        return empty_row(name, "MB", ran)
    sides = {"baseline": imports.peak_mb, "bdbench": ran.peak_mb}
    spread = {side: (peak, peak) for side, peak in sides.items()}
    return Row(name, imports.peak_mb, ran.peak_mb, None, "MB", None, spread, sides, note)


def neighbour_rows(bench: Bench) -> Iterator[Row]:
    """A training on the digits with the threads that bdbench chooses, beside one with a thread a core: alone on the
    machine, and with a neighbour that keeps two cores busy.
    """
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        run_command([*BDBENCH, "poison", "--out", str(data)])
        train = [*BDBENCH, "train", str(data), "--epochs", "5", "--device", "cpu", "--force", "--out"]
        turns: list[Callable[[], Ran]] = [
            partial(run_command, [*train, str(Path(folder, "model"))], None, threads) for threads in (cores, None)
        ]
        for name, busy in (("train-digits-seconds", 0), ("train-digits-crowded-seconds", 2)):
            with neighbours(busy):
                theirs, ours = take_turns(turns, bench.sizes.rounds, bench.until)
            note = f"beside {busy} busy loops; baseline: {cores} threads"
            yield command_row(name, theirs, ours, note)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many cores busy, while the block runs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def sweep_rows(bench: Bench) -> Iterator[Row]:
    """Cells of one epoch as a sweep, one at a time, beside the same stages called by hand, one after another."""
    place = ["--device", str(bench.device), "--precision", "bf16" if bench.bf16 else "fp32"]
    with tempfile.TemporaryDirectory() as folder:
        archive = write_archive(Path(folder), bench.sizes.train)
        grid = Path(folder, "grid.toml")
        grid.write_text(SWEPT.format(seeds=list(SWEPT_SEEDS), archive=archive))
        rounds = []
        for _ in range(bench.sizes.sweeps):
            with tempfile.TemporaryDirectory() as fresh:
                by_hand = [run_command([*BDBENCH, *command], Path(fresh)) for command in stages_by_hand(archive, place)]
                swept = [*BDBENCH, "sweep", str(grid), "--out", "grid", "--jobs", "1", *place]
                rounds.append((by_hand, run_command(swept, Path(fresh))))
    for failed in (run for by_hand, swept in rounds for run in (*by_hand, swept) if run.code):
        yield empty_row("sweep-seconds", "s", failed)
        return
    theirs, ours = (
        [sum(run.seconds for run in by_hand) for by_hand, _ in rounds],
        [run.seconds for _, run in rounds],
    )
    more = (median(ours) - median(theirs)) / len(SWEPT_SEEDS)
    yield summarise("sweep-seconds", theirs, ours, "s", note=f"{len(SWEPT_SEEDS)} cells; {more:+.1f} s for each")


def stages_by_hand(archive: Path, place: Sequence[str]) -> Iterator[list[str]]:
    """Return the commands that make what the sweep makes."""
    for seed in SWEPT_SEEDS:
        data, model = f"data-{seed}", f"model-{seed}"
        yield ["poison", "--dataset", str(archive), "--attack", "badnets", "--seed", str(seed), "--out", data, *place]
        yield ["train", data, "--model", "wrn-16-1", "--preset", "fast", "--epochs", "1", "--out", model, *place]
        yield ["evaluate", model, *place]


def poison_flags(archive: Path, attack: str) -> list[str]:
    """Return the arguments that poison an archive."""
    return ["poison", "--dataset", str(archive), "--attack", attack, "--out", "data"]


def write_archive(folder: Path, count: int) -> Path:
    """Write decoded images, and a fifth as many to test, as an .npz file."""
    arrays: dict[str, Any] = {}
    for split, size in (("train", count), ("test", count // 5)):
        data = synthetic_images(size, split)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = pixels_last(data.images), data.labels.numpy()
    file = folder / "speed.npz"
    np.savez(file, **arrays)
    return file


ROWS: dict[str, Rows] = {
    "commands": command_rows,
    "memory": memory_rows,
    "sweep": sweep_rows,
    "neighbour": neighbour_rows,
}
