"""Sweeps: every cell of a grid in a process of its own, resumable; what is known of them lies in DIR/.sweep.

Imports nothing heavy: the process that hands out cells stays small, however many there are.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bdbench import files
from bdbench.artifacts import finding, manifests
from bdbench.errors import ArtifactError, OptionError
from bdbench.machine import cores, memory_bytes
from bdbench.sweeps import records, worker
from bdbench.sweeps.grid import WHOLE, Cell, Grid
from bdbench.sweeps.jobs import Handle, Launch, Order
from bdbench.sweeps.records import is_locked, read_record, read_records

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
JOB_BYTES = 2 * 10**9
"""Memory that a job may need: one job less is started for every such part that a machine lacks."""
ROOM_BYTES = 256 * 2**20
"""What has to become free before a sweep goes on after the disk was full."""
AGAIN_SECONDS = 300.0
"""When it tries again all the same: a quota is not seen from outside."""


class State(NamedTuple):
    """Where a cell is: waiting, running, done, failed, interrupted, or changed: what is there was asked otherwise; and
    what its record says.
    """

    state: str
    record: Mapping[str, Any]


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
        with files.replace_file(records.sweep_file(self.folder, "grid", "names.json")) as path:
            path.write_text(json.dumps([self.grid.name(cell) for cell in self.grid.cells]), encoding="utf-8")

    def states(self) -> dict[Cell, State]:
        """Return where every cell is, in the order of the grid."""
        records = read_records(self.folder)
        return {cell: self._state(cell, records.get(self.grid.name(cell))) for cell in self.grid.cells}

    def _state(self, cell: Cell, record: Mapping[str, Any] | None) -> State:
        if record is None:
            return State("waiting", {})
        if records.without_places(record["asked"]) != records.without_places(self._asked(cell)):
            return State("changed" if manifests.is_artifact(self.folder / self.grid.name(cell)) else "waiting", {})
        state = record["state"]
        if state == "done" and (wrong := damage(self.folder / record["evaluation"], "evaluation")):
            return State("waiting", {"damage": wrong})
        return State(state, record)


def damage(artifact: Path, kind: manifests.Kind | None = None) -> str:
    """Return why an artifact cannot be read, or ''; it may lack files that a table does not need."""
    try:
        manifest = manifests.read_manifest(artifact, kind)
        for name in manifest.files:
            if name == "metrics.parquet" or (artifact / name).exists():
                manifests.checked_file(artifact, manifest, name)
    except ArtifactError as error:
        return str(error)
    return ""


def shard(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Return one part of the cells, such as ``2/8``: whole datasets, dealt out in turn.

    Raises:
        OptionError: not N/M with N from 1 to M.
    """
    number, _, parts = part.partition("/")
    if not (WHOLE.fullmatch(number) and WHOLE.fullmatch(parts) and 1 <= int(number) <= int(parts)):
        raise OptionError(f"shard '{part}' must be N/M with N from 1 to M, such as 2/8")
    groups = list(dict.fromkeys((cell.dataset, cell.attack, cell.seed) for cell in cells))
    own = set(groups[int(number) - 1 :: int(parts)])
    return [cell for cell in cells if (cell.dataset, cell.attack, cell.seed) in own]


def usual_jobs(gpus: int) -> int:
    """Return how many cells to make at once: one a GPU, else one a core, as far as the memory goes.

    Two processes of one thread do more on two cores than one of two threads (benchmarks/README.md).
    """
    if gpus:
        return gpus
    return max(1, min(cores(), memory_bytes() // JOB_BYTES))


@dataclass
class Run:
    """One walk over the cells that are missing.

    Attributes:
        sweep: the grid and its folder.
        cells: those of the grid to make.
        launch: starts a cell.
        jobs: cells at once.
        say: told one line for people.
        retry: make cells again that failed before, and mend datasets and models that are damaged; a sweep that
            replaces makes failed ones again anyway.
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
        self.states = {cell: self._looked_at(cell, states[cell]) for cell in self.cells}
        for state in self.states.values():
            if "damage" in state.record:
                self.say(f"again   {state.record['damage']}")
        self._running: dict[int, tuple[Cell, Order, Handle]] = {}
        self._waiting = [cell for cell in self.cells if self._is_wanted(cell)]
        self._room, self._paused_at, self._full = 0, 0.0, self.sweep.folder
        self._made: set[str] = set()

    def _looked_at(self, cell: Cell, state: State) -> State:
        """Return where a cell is: it waits if its dataset or a model of it is damaged and that is to be mended."""
        parts = self.sweep.order(cell).makes if self.retry and state.state == "done" else ()
        there = (place for name in parts if manifests.is_artifact(place := self.sweep.folder / name))
        wrong = next(filter(None, map(damage, there)), "")
        return State("waiting", {"damage": wrong}) if wrong else state

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
            room = shutil.disk_usage(self._full).free
            if room < self._room and time.monotonic() - self._paused_at < AGAIN_SECONDS:
                return
            self.paused = ""
            self.say("there is room again; going on" if room >= self._room else "trying again")
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
        return [name for name in order.makes if not manifests.is_artifact(self.sweep.folder / name)]

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
            said = Path(str(read_record(self.sweep.folder, order.name).get("full", "")))
            self._full = said if said.is_dir() else self.sweep.folder
            free = shutil.disk_usage(self._full).free
            self._room, self._paused_at = free + ROOM_BYTES, time.monotonic()
            self.paused = f"no room on the disk of {self._full} ({free / 2**20:,.0f} MiB free)"
            self.say(f"paused  {order.name}: {self.paused}; free {ROOM_BYTES / 2**20:,.0f} MiB to go on")

    def _fail(self, cell: Cell, order: Order, record: Mapping[str, Any], code: int) -> None:
        log = self.sweep.folder / finding.SWEEP / "logs" / f"{order.name}.log"
        if code == worker.FAILED and record.get("state") == "failed":
            reason = record["reason"]
        elif code < 0:
            reason = f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
        else:
            reason = f"its process ended with code {code}"
        # A worker that died at its start has left no record, or one of other settings.
        told = {name: value for name, value in json.loads(order.text).items() if name in records.TOLD}
        record = {"seconds": 0.0, **record, **told, "state": "failed", "reason": reason}
        with files.replace_file(records.sweep_file(self.sweep.folder, "cells", f"{order.name}.json")) as path:
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

    A cell is expected to take as long as the mean of those that share most with it: dataset, model and defense, else
    model and defense, else any.
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
