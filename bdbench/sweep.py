"""Sweeps: every cell of a grid in a process of its own, resumable; what is known of them lies in DIR/.sweep.

Imports nothing heavy: the process that hands out cells stays small, however many there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, Protocol

import bdbench
from bdbench import store, worker
from bdbench.errors import ArtifactError, OptionError
from bdbench.grid import Cell, Grid, Named, line_of
from bdbench.machine import cores, memory_bytes
from bdbench.registry import plugin_releases

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Spares a training on a CPU a twentieth of its time or more; a process can only be born with it."""
JOB_BYTES = 2 * 10**9
"""Memory that a job may need: one job less is started for every such part that a machine lacks."""
ROOM_BYTES = 256 * 2**20
"""What has to become free before a sweep goes on after the disk was full."""


class Order(NamedTuple):
    """A cell with all that its worker needs; `makes` are the folders that it leaves, the cell's own model first."""

    name: str
    makes: tuple[str, ...]
    text: str


class State(NamedTuple):
    """Where a cell is: waiting, running, done, failed, interrupted, or changed: what is there was asked otherwise; and
    what its record says.
    """

    state: str
    record: Mapping[str, Any]


class Handle(Protocol):
    """A cell that is being made."""

    def poll(self) -> int | None:
        """Return the exit code of `bdbench.worker`, or None while it works."""

    def stop(self) -> None:
        """Ask it to end; it keeps its checkpoints."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it by force when the time is up."""


Launch = Callable[[Order, int], Handle]
"""From an order and the number of the job that is free to the cell being made."""


@dataclass
class Sweep:
    """A grid in a folder.

    Attributes:
        grid: what to make.
        folder: where artifacts and records go.
        device, precision: of every stage.
        suspects, methods: see `Checked`.
        replace: make cells again whose artifacts were asked otherwise, in their place.
        image_memory, compile: see `bdbench.stages.defend`.
    """

    grid: Grid
    folder: Path
    device: str = "auto"
    precision: str = "auto"
    suspects: Sequence[str] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    replace: bool = False
    image_memory: float | None = None
    compile: bool = False

    def order(self, cell: Cell) -> Order:
        """Return what a worker has to know of a cell."""
        name, data_name, asked = self.grid.name(cell), self.grid.data_name(cell), self._asked(cell)
        order = {
            "kind": "cell", "folder": str(self.folder), "name": name, "data_name": data_name,
            "cell": cell._asdict(), "asked": asked, "device": self.device, "precision": self.precision,
            "differences": self.grid.differences, "replace": self.replace,
            "training": {"image_memory": self.image_memory, "compile": self.compile},
        }  # fmt: skip
        suspect = asked["suspect"]
        return Order(name, (name, data_name, *([suspect["name"]] if suspect else [])), json.dumps(order))

    def _asked(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's result depends on: its settings, those of the model that it mends, and its methods."""
        suspect = None
        labels = [f"attack {cell.attack}", f"defense {cell.defense}"]
        if cell.defense in self.suspects:
            base = self.grid.undefended(cell)
            suspect = {"name": self.grid.name(base), "settings": self.grid.settings(base)}
            labels.append(f"defense {base.defense}")
        methods = [self.methods[label] for label in labels if label in self.methods]
        return {"settings": self.grid.settings(cell), "suspect": suspect, "methods": methods}

    def announce(self) -> None:
        """Keep the names of all cells, for those that look on from elsewhere."""
        with store.replace_file(store.sweep_file(self.folder, "grid", "names.json")) as path:
            path.write_text(json.dumps([self.grid.name(cell) for cell in self.grid.cells]), encoding="utf-8")

    def states(self) -> dict[Cell, State]:
        """Return where every cell is, in the order of the grid."""
        records = read_records(self.folder)
        return {cell: self._state(cell, records.get(self.grid.name(cell))) for cell in self.grid.cells}

    def _state(self, cell: Cell, record: Mapping[str, Any] | None) -> State:
        if record is None:
            return State("waiting", {})
        if record["asked"] != self._asked(cell):
            return State("changed" if store.is_artifact(self.folder / self.grid.name(cell)) else "waiting", {})
        state = record["state"]
        if state == "done" and not store.is_artifact(self.folder / record["evaluation"]):
            state = "waiting"
        return State(state, record)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records under a sweep's folder, by the name of the cell; one that says running without a worker is
    said to be interrupted.
    """
    records = {}
    for path in sorted((folder / store.SWEEP / "cells").glob("[!.]*.json")):
        record = read_record(folder, path.stem)
        if not record:
            continue
        if record["state"] == "running" and not is_locked(folder, record["name"]):
            record["state"] = "interrupted"
        records[record["name"]] = record
    return records


def read_waiting(folder: Path, begun: Iterable[str]) -> list[str]:
    """Return the cells of the grid that was last made in a folder, but for those of which there is a record."""
    try:
        names = json.loads((folder / store.SWEEP / "grid" / "names.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return sorted({str(name) for name in names} - set(begun))


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a cell, empty if there is none; a damaged one is none: its cell is looked at again."""
    path = folder / store.SWEEP / "cells" / f"{name}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if set(worker.TOLD) <= found.keys() else {}


def is_locked(folder: Path, name: str) -> bool:
    """Say whether a worker is making a cell."""
    return store.is_locked(store.sweep_file(folder, "locks", f"{name}.lock"))


def shard(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Return one part of the cells, such as ``2/8``: whole data sets, dealt out in turn.

    Raises:
        OptionError: not N/M with N from 1 to M.
    """
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise OptionError(f"shard '{part}' must be N/M with N from 1 to M, such as 2/8")
    groups = list(dict.fromkeys((cell.dataset, cell.attack, cell.seed) for cell in cells))
    own = set(groups[int(number) - 1 :: int(parts)])
    return [cell for cell in cells if (cell.dataset, cell.attack, cell.seed) in own]


class Checked(NamedTuple):
    """What `check` found.

    Attributes:
        suspects: labels of the defences that mend an undefended model.
        gpus: how many are usable.
        methods: from "attack LABEL" and "defense LABEL" to a digest of version, presets and options: another digest
            means another result.
    """

    suspects: tuple[str, ...]
    gpus: int
    methods: Mapping[str, str]


def check(grid: Grid) -> Checked:
    """Check every option of a grid, in another process, so that this one stays small.

    Raises:
        OptionError: an option does not fit; the message has the file, the line and the way out.
    """
    order = {
        "kind": "check",
        "named": [[axis, label, *_checked_named(grid, axis, named)] for (axis, label), named in grid.named.items()],
        "models": sorted({cell.model for cell in grid.cells} - {"auto"}),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bdbench.worker"], input=json.dumps(order) + "\n", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise ArtifactError(f"the check of {grid.path} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    lines = grid.path.read_text(encoding="utf-8").splitlines()
    for axis, label, message in found["errors"]:
        place = line_of(lines, f"{axis}.{label}") or line_of(lines, "recipe" if axis == "defense" else label)
        raise OptionError(f"{grid.path}{place}, {axis} {label}: {message}")
    return Checked(tuple(found["suspects"]), found["gpus"], found["methods"])


def checked_once(grid: Grid, folder: Path) -> Checked:
    """Return what `check` found for this grid, machine and releases before, or check now and keep it in the folder.

    Raises:
        OptionError: see `check`.
    """
    machine = [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    releases = [bdbench.__version__, *plugin_releases()]
    key = hashlib.sha256("\n".join([grid.path.read_text(encoding="utf-8"), *machine, *releases]).encode()).hexdigest()
    file = store.sweep_file(folder, "checks", f"{key[:16]}.json")
    try:
        suspects, gpus, methods = json.loads(file.read_text(encoding="utf-8"))
        return Checked(tuple(suspects), int(gpus), dict(methods))
    except (OSError, ValueError, TypeError):
        found = check(grid)
    with store.replace_file(file) as path:
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _checked_named(grid: Grid, axis: str, named: Named) -> tuple[str, dict[str, Any]]:
    if axis == "defense":
        return named.use, {**grid.recipe, "preset": grid.preset, **named.options}
    return named.use, dict(named.options)


def usual_jobs(gpus: int) -> int:
    """Return how many cells to make at once: one a GPU, else one a core, as far as the memory goes.

    Two processes of one thread do more on two cores than one of two threads (benchmarks/README.md).
    """
    if gpus:
        return gpus
    return max(1, min(cores(), memory_bytes() // JOB_BYTES))


@dataclass
class LocalJob:
    """A cell in a process of this machine."""

    process: subprocess.Popen[str]

    def poll(self) -> int | None:
        """See `Handle`."""
        return self.process.poll()

    def stop(self) -> None:
        """See `Handle`."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float) -> None:
        """See `Handle`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(threads: int) -> dict[str, str]:
    """Return what a worker is started with that computes, and compiles, with so many threads."""
    return {**HUGE_PAGES, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}


def local(folder: Path, jobs: int, gpus: int) -> Launch:
    """Return what starts a cell here: cores are shared among the jobs, a GPU belongs to one of them."""
    threads = max(1, cores() // jobs)

    def launch(order: Order, job: int) -> LocalJob:
        own = {"CUDA_VISIBLE_DEVICES": _visible(job % gpus)} if gpus else {}
        with store.sweep_file(folder, "logs", f"{order.name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bdbench.worker"], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                env={**environment(threads), **os.environ, **own}, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(order.text + "\n")
        process.stdin.flush()
        return LocalJob(process)

    return launch


def _visible(number: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return given[number] if number < len(given) and given[number] else str(number)


@dataclass
class Run:
    """One walk over the cells that are missing.

    Attributes:
        sweep: the grid and its folder.
        cells: those of the grid to make.
        launch: starts a cell.
        jobs: cells at once.
        say: told one line for people.
        retry: make cells again that failed before; a sweep that replaces does so anyway.
        fail_fast: start nothing more after a failure.
        states: where every cell is.
        paused: why nothing is started at the moment, or "".
    """

    sweep: Sweep
    cells: Sequence[Cell]
    launch: Launch
    jobs: int
    say: Callable[[str], None]
    retry: bool = False
    fail_fast: bool = False
    states: dict[Cell, State] = field(default_factory=dict)
    paused: str = ""

    def __post_init__(self) -> None:
        states = self.sweep.states()
        self.states = {cell: states[cell] for cell in self.cells}
        self._running: dict[int, tuple[Cell, Order, Handle]] = {}
        self._waiting = [cell for cell in self.cells if self._is_wanted(cell)]
        self._room = 0
        self._made: set[str] = set()

    def _is_wanted(self, cell: Cell) -> bool:
        wanted = {"done": False, "failed": self.retry or self.sweep.replace, "changed": self.sweep.replace}
        return wanted.get(self.states[cell].state, True)

    def steps(self) -> Iterator[None]:
        """Make the cells; yield now and then, so that somebody can look at `states`.

        Ended early (an exception, Ctrl-C), it stops the workers, which keep their checkpoints.
        """
        try:
            while self._waiting or self._running:
                self._collect()
                self._start()
                yield
                time.sleep(POLL_SECONDS)
            yield
        finally:
            for _, _, handle in self._running.values():
                handle.stop()
            end = time.monotonic() + STOP_SECONDS
            for _, _, handle in self._running.values():
                handle.wait(max(0.1, end - time.monotonic()))

    def _start(self) -> None:
        if self.paused:
            if shutil.disk_usage(self.sweep.folder).free < self._room:
                return
            self.paused = ""
            self.say("there is room again; going on")
        for job in range(self.jobs):
            if job in self._running:
                continue
            chosen = self._next()
            if chosen is None:
                return
            cell, order = chosen
            self._waiting.remove(cell)
            self._running[job] = cell, order, self.launch(order, job)
            self.states[cell] = State("running", {})

    def _next(self) -> tuple[Cell, Order] | None:
        """Return the first cell that needs nothing which another one is making now, and that no other sweep makes."""
        busy = {name for _, order, _ in self._running.values() for name in self._missing(order)}
        for cell in self._waiting:
            order = self.sweep.order(cell)
            if not busy.intersection(self._missing(order)) and not is_locked(self.sweep.folder, order.name):
                return cell, order
        return None

    def _missing(self, order: Order) -> list[str]:
        """Return what a cell has to make: where artifacts are replaced, all that no cell of this walk has left."""
        if self.sweep.replace:
            return [name for name in order.makes if name not in self._made]
        return [name for name in order.makes if not store.is_artifact(self.sweep.folder / name)]

    def _collect(self) -> None:
        for job, (cell, order, handle) in list(self._running.items()):
            code = handle.poll()
            if code is None:
                continue
            del self._running[job]
            record = read_record(self.sweep.folder, order.name)
            if code == worker.DONE:
                self.states[cell] = State("done", record)
                self._made.update(order.makes)
                self.say(f"done    {order.name}  {record.get('seconds', 0):,.0f} s")
            elif code == worker.BUSY:  # another sweep makes it; look again later
                self._waiting.append(cell)
                self.states[cell] = State("waiting", {})
            elif code == worker.FULL:
                self._pause(cell, order)
            else:
                self._fail(cell, order, record, code)

    def _pause(self, cell: Cell, order: Order) -> None:
        self._waiting.insert(0, cell)
        self.states[cell] = State("waiting", {})
        if not self.paused:
            free = shutil.disk_usage(self.sweep.folder).free
            self._room = free + ROOM_BYTES
            self.paused = f"no room on the disk of {self.sweep.folder} ({free / 2**20:,.0f} MiB free)"
            self.say(f"paused  {order.name}: {self.paused}; free {ROOM_BYTES / 2**20:,.0f} MiB to go on")

    def _fail(self, cell: Cell, order: Order, record: Mapping[str, Any], code: int) -> None:
        log = self.sweep.folder / store.SWEEP / "logs" / f"{order.name}.log"
        if code == worker.FAILED and record.get("state") == "failed":
            reason = record["reason"]
        elif code < 0:
            reason = f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
        else:
            reason = f"its process ended with code {code}"
        # A worker that died at its start has left no record, or one of other settings.
        told = {name: value for name, value in json.loads(order.text).items() if name in worker.TOLD}
        record = {"seconds": 0.0, **record, **told, "state": "failed", "reason": reason}
        with store.replace_file(store.sweep_file(self.sweep.folder, "cells", f"{order.name}.json")) as path:
            path.write_text(json.dumps(record), encoding="utf-8")
        self.states[cell] = State("failed", record)
        self.say(f"failed  {order.name}: {reason}\n        log: {log}")
        if self.fail_fast:
            self._waiting.clear()

    def refresh(self) -> None:
        """Read what the running cells have written."""
        for cell, order, _ in self._running.values():
            self.states[cell] = State("running", read_record(self.sweep.folder, order.name))


def seconds_left(states: Mapping[Cell, State], jobs: int) -> float | None:
    """Estimate the seconds until all cells are done, from those that are: None while none is.

    A cell is expected to take as long as the mean of those that share most with it: data set, model and defence, else
    model and defence, else any.
    """
    known: dict[tuple[str, ...], list[float]] = {}
    for cell, state in states.items():
        if state.state == "done":
            for key in _keys(cell):
                known.setdefault(key, []).append(float(state.record["seconds"]))
    if not known:
        return None
    left = 0.0
    for cell, state in states.items():
        if state.state not in ("done", "failed"):
            expected = next(mean(known[key]) for key in _keys(cell) if key in known)
            spent = time.time() - state.record["started"] if state.state == "running" and state.record else 0.0
            left += max(0.0, expected - spent)
    return left / jobs


def _keys(cell: Cell) -> list[tuple[str, ...]]:
    return [(cell.dataset, cell.model, cell.defense), (cell.model, cell.defense), ()]
