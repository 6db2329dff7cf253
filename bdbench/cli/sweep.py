"""bdbench sweep, bdbench status and bdbench gc: grids."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from bdbench import files
from bdbench.artifacts import finding
from bdbench.cli import console
from bdbench.cli.parameters import Compile, Device, ImageMemory, Json, PrecisionName
from bdbench.errors import ArtifactError, OptionError, unknown_name
from bdbench.progress import duration
from bdbench.text import printable
from bdbench.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from bdbench.sweeps.grid import Cell, Grid
    from bdbench.sweeps.sweep import Run, State, Sweep

STATES = ("done", "running", "failed", "interrupted", "waiting", "changed")
REFRESH_SECONDS = 0.5
LINE_SECONDS = 20.0
"""Between two lines where no terminal shows the live view."""
SHOWN = 20
ENGINES = ("local", "ray")


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="TOML file; see --init.")] = Path("grid.toml"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of artifacts and records; default: runs/ and the file's name.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once; default: one a GPU, else one a core.", min=1, show_default=False)
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to GRID and end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the grid, show its runs, what is there, and the time left.")
    ] = False,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Make runs again that failed before; make damaged datasets and models again."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make runs again, in place, whose options or methods have changed.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Start nothing more after a failure.")] = False,
    seeds: Annotated[
        str | None, typer.Option(help="In place of the grid's, such as 0-4 or 0,2,5-7.", show_default=False)
    ] = None,
    shard: Annotated[str | None, typer.Option(help="One part of the grid, such as 2/8, for batch schedulers.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: runs as tasks of a Ray cluster.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Ray head node, HOST:PORT; default: start Ray on this machine.", show_default=False),
    ] = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    image_memory: ImageMemory = None,
    compile: Compile = False,  # noqa: A002
    json: Json = False,
) -> None:
    """Run every combination in a grid: datasets x attacks x models x defenses x seeds.

    Each run has a process of its own: one that fails is recorded with its reason and its log, the others go on. What
    runs share is made once, and what is there is not made again: after Ctrl-C, kill -9 or a reboot the same command
    goes on. Watch it from another terminal with `bdbench status DIR`.

    Examples:
      bdbench sweep --init

      bdbench sweep grid.toml --dry-run

      bdbench sweep grid.toml --jobs 2 --seeds 0-9

      bdbench sweep grid.toml --out /shared/grid --engine ray --address head:6379
    """
    from bdbench.sweeps import grid as grids
    from bdbench.sweeps.checking import check, checked_once
    from bdbench.sweeps.jobs import local
    from bdbench.sweeps.sweep import Run, Sweep, usual_jobs
    from bdbench.sweeps.sweep import shard as part_of

    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if address is not None and engine != "ray":
        raise OptionError("--address belongs to --engine ray")
    if device.startswith("cuda:"):
        number = device.partition(":")[2]
        raise OptionError(
            f"a sweep gives each of its jobs a GPU; --device {device} is for single runs. To use that one alone: "
            f"CUDA_VISIBLE_DEVICES={number} bdbench sweep ... --device cuda"
        )
    if init:
        write_example(grid, grids.EXAMPLE)
        return
    read = grids.read_grid(grid, grids.parse_seeds(seeds) if seeds is not None else None)
    folder = out or finding.ROOT / grid.stem
    cells: Sequence[Cell] = part_of(read.cells, shard) if shard else read.cells
    checked = check(read) if dry_run else checked_once(read, folder)
    gpus = 0 if device == "cpu" else checked.gpus
    job = Sweep(
        read, folder.absolute(), device, precision, checked.suspects, checked.methods, replace=replace,
        image_memory=image_memory, compile=compile,
    )  # fmt: skip
    if dry_run:
        show_plan(job, cells, jobs or usual_jobs(gpus), as_json=json)
        return
    refuse_changed(job, cells)
    with ExitStack() as ending:
        if engine == "ray":
            from bdbench.sweeps.cluster import connect

            cluster = connect(address, jobs, use_gpus=device != "cpu")
            ending.callback(cluster.leave)
            jobs, launch = cluster.jobs, cluster.launch(job.folder)
        else:
            jobs = jobs or usual_jobs(gpus)
            launch = local(job.folder, jobs, gpus)
        job.announce()
        run = Run(job, cells, launch, jobs, console.say_plainly, retry, fail_fast)
        there = sum(state.state == "done" for state in run.states.values())
        console.say_plainly(f"{counted(len(cells), 'run')} in {folder}, {there:,} of them there; {jobs} at once")
        watch(run)
    finish(run, as_json=json)


def write_example(path: Path, text: str) -> None:
    """Write the example grid.

    Raises:
        ArtifactError: the file exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise ArtifactError(f"{path} exists; give another file name") from error
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    console.say_wrote(path)
    console.say_next(f"bdbench sweep {quote(str(path))} --dry-run")


def refuse_changed(job: Sweep, cells: Sequence[Cell]) -> None:
    """Refuse to start where cells were asked otherwise, unless they are to be replaced.

    Raises:
        ArtifactError: a cell was made with other options, or by another version of its methods.
    """
    states = job.states()
    changed = [job.grid.name(cell) for cell in cells if states[cell].state == "changed"]
    if changed and not job.replace:
        named = f"{changed[0]} and {len(changed) - 1:,} more" if len(changed) > 1 else changed[0]
        raise ArtifactError(
            f"{job.folder} has runs that were made with other options or versions of their methods: {named}. "
            "--replace makes them again in place; a label of their own in the grid, or another --out, keeps both"
        )


def show_plan(job: Sweep, cells: Sequence[Cell], jobs: int, *, as_json: bool) -> None:
    """Print the cells and their states, and estimate the time; nothing is written."""
    from bdbench.sweeps.checking import expected_seconds
    from bdbench.sweeps.sweep import seconds_left

    found = job.states()
    states = {cell: found[cell] for cell in cells}
    if not as_json:
        for cell, state in states.items():
            console.show(f"{state.state:<12}{job.grid.name(cell)}")
    left = seconds_left(states, jobs)
    if left is None and cells:
        console.say("no cell is done yet: timing a few steps of each defense ...")
        expected = [seconds for seconds in expected_seconds(job.grid, cells, job.device, job.precision) if seconds]
        left = sum(expected) / len(expected) * len(cells) / jobs if expected else None
    if as_json:
        rows = [{**cell._asdict(), "name": job.grid.name(cell), "state": state.state} for cell, state in states.items()]
        console.show_json({"cells": rows, "seconds_left": left})
        return
    counts = Counter(state.state for state in states.values())
    console.say(", ".join(f"{counts[name]:,} {name}" for name in STATES if counts[name]) or "no run in this shard")
    console.say("no time known yet" if left is None else f"about {duration(left)} left with {jobs} at once")


def watch(run: Run) -> None:
    """Make the cells, with a live view on a terminal, else a line per cell, and every 20 s how far all of it is."""
    import sys

    if not sys.stderr.isatty():
        said = time.monotonic()
        for _ in run.steps():
            if time.monotonic() - said >= LINE_SECONDS:
                run.refresh()
                run.say(line(run))
                said = time.monotonic()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True, highlight=False, markup=False, emoji=False), refresh_per_second=4) as live:
        run.say = live.console.print
        shown = 0.0
        for _ in run.steps():
            if time.monotonic() - shown > REFRESH_SECONDS:
                run.refresh()
                live.update(view(run.sweep.grid, run.states, run.jobs, run.paused))
                shown = time.monotonic()
        live.update(view(run.sweep.grid, run.states, run.jobs, run.paused))


def line(run: Run) -> str:
    """Say in a line what a sweep is doing: how many cells are where, and how far those are that are being made."""
    from bdbench.sweeps.sweep import seconds_left

    counts = Counter(state.state for state in run.states.values())
    parts = [f"{counts['done']:,} of {len(run.states):,} cells done"]
    for cell, state in run.states.items():
        if state.state == "running":
            record = state.record
            share = f" {100 * record['done'] // max(1, record['total'])} %" if record.get("total") else ""
            parts.append(f"{run.sweep.grid.name(cell)}: {record.get('phase', 'starting')}{share}")
    left = seconds_left(run.states, run.jobs)
    parts += [run.paused] if run.paused else []
    return "; ".join([*parts, *([f"about {duration(left)} left"] if left else [])])


def view(grid: Grid, states: Mapping[Cell, State], jobs: int, paused: str = "") -> Table:
    """Return what a sweep is doing: a line per running cell, and how many are where."""
    from rich.table import Table

    from bdbench.sweeps.sweep import seconds_left

    table = Table(box=None, pad_edge=False)
    for column in ("running", "phase", "", "seconds"):
        table.add_column(column, justify="right" if column in ("", "seconds") else "left")
    running = [(cell, state.record) for cell, state in states.items() if state.state == "running"]
    for cell, record in running[:SHOWN]:
        share = f"{record['done'] / max(1, record['total']):.0%}" if record.get("total") else ""
        spent = time.time() - record["started"] if "started" in record else 0.0
        phase = printable(record.get("phase", "starting"))
        table.add_row(grid.name(cell), phase, share, f"{spent:,.0f}")
    counts = Counter(state.state for state in states.values())
    left = seconds_left(states, jobs)
    parts = [f"{counts[name]:,} {name}" for name in STATES if counts[name]]
    parts += [f"about {duration(left)} left"] if left else []
    table.caption = paused or ", ".join(parts)
    table.caption_justify = "left"
    return table


def finish(run: Run, *, as_json: bool) -> None:
    """Print the table of what is done, name what failed, and end with exit code 1 if anything did."""
    from rich.markup import escape

    from bdbench.artifacts.kinds import EvaluationArtifact
    from bdbench.reports import results, tables

    folder = run.sweep.folder
    rows = [
        results.evaluation_row(EvaluationArtifact.open(folder / state.record["evaluation"]))
        for state in run.states.values()
        if state.state == "done"
    ]
    marked = results.mark_rows(rows)
    failed = {run.sweep.grid.name(cell): state for cell, state in run.states.items() if state.state == "failed"}
    if as_json:
        reasons = {name: state.record.get("reason", "") for name, state in failed.items()}
        console.show_json({"rows": marked, "failed": reasons})
    elif marked:
        console.show(tables.render(marked, "rich"))
    for name, state in failed.items():
        console.say_error(f"{name}: {state.record.get('reason', 'failed before')}")
    if failed:
        console.say(
            "the failed runs are made again with [cyan]--retry[/cyan]; their logs are in "
            f"[bold]{escape(str(folder / finding.SWEEP / 'logs'))}[/bold]"
        )
        raise typer.Exit(1)
    console.say_next(f"bdbench table {quote(str(folder))} --format markdown")


def status(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Folder of a sweep, or its grid file; default: the newest under runs/."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the progress of a sweep.

    Examples:
      bdbench status

      bdbench status runs/grid
    """
    from rich.table import Table

    from bdbench.sweeps.records import read_records, read_waiting

    folder = newest_sweep() if folder is None else finding.ROOT / folder.stem if folder.is_file() else folder
    begun = read_records(folder)
    waiting = [{"name": name, "state": "waiting", "seconds": 0.0} for name in read_waiting(folder, begun)]
    records = [*begun.values(), *waiting]
    if not records:
        raise ArtifactError(f"{folder} holds no sweep; start one with: bdbench sweep GRID.toml --out {folder}")
    if json:
        console.show_json({"cells": records})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "phase", "", "seconds", "reason"):
        table.add_column(column, justify="right" if column in ("", "seconds") else "left")
    for record in sorted(records, key=lambda item: (STATES.index(item["state"]), item["name"])):
        active = record["state"] in ("running", "interrupted")
        share = f"{record['done'] / max(1, record['total']):.0%}" if active and record.get("total") else ""
        table.add_row(
            printable(record["name"]), record["state"],
            printable(record.get("phase", "")) if active else "", share, f"{record['seconds']:,.0f}",
            printable(record.get("reason", "")) if record["state"] == "failed" else "",
        )  # fmt: skip
    console.show(table)
    counts = Counter(record["state"] for record in records)
    console.say(", ".join(f"{counts[name]:,} {name}" for name in STATES if counts[name]))


def newest_sweep() -> Path:
    """Return the folder of the newest sweep under runs/, and say so.

    Raises:
        ArtifactError: there is none.
    """
    from bdbench.sweeps.records import sweeps_under

    found = sweeps_under(finding.ROOT)
    if not found:
        raise ArtifactError(f"no sweep under {finding.ROOT}/; start one with: bdbench sweep GRID.toml")
    console.say_plainly(f"sweep: {found[-1]} (the newest)")
    return found[-1]


def gc(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of artifacts.")] = finding.ROOT,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them; without it they are listed only.")] = False,
    json: Json = False,
) -> None:
    """List, or remove, datasets that no result needs, and leftovers of interrupted work.

    Keeps models, evaluations and everything they were made from. Removes nothing while anything under DIR is being
    made, or is damaged.

    Examples:
      bdbench gc

      bdbench gc runs/grid --remove
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder")
    if remove:
        finding.check_idle(folder)
    found = [(path, files.folder_bytes(path)) for path in finding.unneeded(folder, strict=remove)]
    if json:
        console.show_json({"removed": remove, "unneeded": [{"path": path, "bytes": size} for path, size in found]})
    else:
        for path, size in found:
            console.show(f"{size / 1e6:>10,.1f} MB  {path}")
    if remove:
        found = [(path, size) for path, size in found if finding.remove(path)]
    total = sum(size for _, size in found) / 1e6
    if not found:
        console.say("nothing to remove: all that is there is needed, or in use")
        return
    verb = "removed" if remove else "not needed; --remove removes them"
    console.say(f"{counted(len(found), 'folder')}, {total:,.1f} MB: {verb}")
