"""Sweeps: which cell is started when, what becomes of those that end badly, and that nothing is lost or made twice."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from filelock import FileLock
from toys import FACTS, MADE

from bdbench import files, stages
from bdbench.artifacts import finding, manifests, store
from bdbench.artifacts import kinds as artifacts
from bdbench.artifacts.manifests import Ask
from bdbench.cli import app, console
from bdbench.cli import sweep as commands
from bdbench.cli.sweep import view, watch
from bdbench.defenses.training.abl import ABL
from bdbench.errors import ArtifactError, BusyError, DamageWarning, OccupiedError, OptionError
from bdbench.plugins import Plugin
from bdbench.reports import results
from bdbench.sweeps import checking, cluster, jobs, records, sweep, worker
from bdbench.sweeps.grid import Cell, Grid, parse_seeds, read_grid
from bdbench.sweeps.jobs import Order
from bdbench.sweeps.records import read_records, read_waiting
from bdbench.sweeps.sweep import Run, State, Sweep, seconds_left, shard

GRID = 'seeds = [0, 1]\ndefenses = ["none", "abl", "mcldef"]\n'


@pytest.fixture(autouse=True)
def expected(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What a dry run is told of every cell's time, in place of what a process of its own would measure."""
    told: list[float | None] = []
    monkeypatch.setattr(checking, "expected_seconds", lambda *_: told)
    return told


def grid_of(folder: Path, text: str = GRID) -> Grid:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def seal(folder: Path, name: str) -> None:
    """Leave an evaluation that can be read."""
    with store.create(folder / name, Ask("evaluation", "evaluate", 1, {}, 0, {})) as draft:
        draft.facts, draft.made = dict(FACTS["evaluation"]), dict(MADE)


@dataclass
class Played:
    """A cell whose worker does at once, or when it is told, what a script says."""

    order: Order
    code: int | None
    stopped: bool = False

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.stopped = True

    def wait(self, seconds: float) -> None:
        assert seconds > 0


@dataclass
class Stage:
    """Plays workers: each cell ends with the next code of its script, else well."""

    sweep: Sweep
    script: dict[str, list[int | None]] = field(default_factory=dict)
    reason: str = "the loss is nan"
    started: list[str] = field(default_factory=list)
    playing: list[Played] = field(default_factory=list)
    at_once: list[set[str]] = field(default_factory=list)

    def launch(self, order: Order, job: int) -> Played:
        assert job >= 0
        codes = self.script.get(order.name, [])
        played = Played(order, codes.pop(0) if codes else worker.DONE)
        self.started.append(order.name)
        self.playing.append(played)
        self.at_once.append({other.order.name for other in self.playing if other.code is None} | {order.name})
        if played.code is not None:
            self.end(played, played.code)
        return played

    def end(self, played: Played, code: int) -> None:
        """Let a cell end: write what its worker would write."""
        played.code = code
        folder, told = self.sweep.folder, json.loads(played.order.text)
        facts = {
            "name": told["name"],
            "cell": told["cell"],
            "asked": told["asked"],
            "started": 0.0,
            "seconds": 8.0,
        }
        if code == worker.DONE:
            for name in (*played.order.makes, f"{played.order.name}-eval"):
                seal(folder, name)
            facts |= {"state": "done", "evaluation": f"{played.order.name}-eval"}
        elif code == worker.FAILED:
            facts |= {"state": "failed", "reason": self.reason}
        else:
            facts |= {"state": "running"}
        records.sweep_file(folder, "cells", f"{told['name']}.json").write_text(json.dumps(facts))


def run_of(
    folder: Path,
    jobs: int = 1,
    script: dict[str, list[int | None]] | None = None,
    text: str = GRID,
    methods: dict[str, str] | None = None,
    replace: bool = False,
    **settings: Any,
) -> tuple[Run, Stage, list[str]]:
    job = Sweep(grid_of(folder, text), folder / "out", suspects=["mcldef"], methods=methods or {}, replace=replace)
    stage, said = Stage(job, script or {}), list[str]()
    return Run(job, job.grid.cells, stage.launch, jobs, say=said.append, **settings), stage, said


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.0)


def walk(run: Run) -> None:
    for _ in run.steps():
        pass


METHODS = [("attack", "badnets"), *(("defense", name) for name in ("none", "abl", "mcldef"))]
NAMES = [f"digits-badnets-s{seed}-{method}" for seed in (0, 1) for method in ("none", "abl", "mcldef")]


def states_of(run: Run) -> dict[str, str]:
    return {run.sweep.grid.name(cell): state.state for cell, state in run.states.items()}


def test_every_cell_is_made_once_and_in_order(tmp_path: Path) -> None:
    run, stage, said = run_of(tmp_path)
    walk(run)
    assert stage.started == NAMES
    assert set(states_of(run).values()) == {"done"}
    assert said == [f"done    {name}  8 s" for name in NAMES]


def test_what_is_done_is_not_made_again_and_what_changed_is(tmp_path: Path) -> None:
    walk(run_of(tmp_path)[0])
    again, stage, _ = run_of(tmp_path)
    walk(again)
    assert stage.started == []
    shutil.rmtree(tmp_path / "out" / f"{NAMES[1]}-eval")
    added, stage, _ = run_of(tmp_path, text=GRID.replace("[0, 1]", "[0, 1, 2]"))
    walk(added)
    assert stage.started == [NAMES[1], *(f"digits-badnets-s2-{name}" for name in ("none", "abl", "mcldef"))]
    shutil.rmtree(tmp_path / "out" / NAMES[2])
    changed, stage, _ = run_of(tmp_path, text=GRID + "[defense.mcldef]\nalpha = 2\n")
    assert states_of(changed)[NAMES[2]] == "waiting"
    assert states_of(changed)[NAMES[5]] == "changed"
    walk(changed)
    assert stage.started == [NAMES[2]]
    changed, stage, _ = run_of(tmp_path, text=GRID + "[defense.mcldef]\nalpha = 2\n", replace=True)
    walk(changed)
    assert stage.started == [NAMES[5]]
    assert json.loads(stage.playing[0].order.text)["replace"] is True


@pytest.mark.parametrize(
    ("text", "methods", "changed"),
    [
        (GRID + "[defense.none]\nepochs = 3\n", {}, ["none", "mcldef"]),
        (GRID + "[attack.badnets]\nrate = 0.2\n", {}, ["none", "abl", "mcldef"]),
        (GRID, {"defense abl": "another"}, ["abl"]),
        (GRID, {"defense none": "another"}, ["none", "mcldef"]),
        (GRID, {"attack badnets": "another"}, ["none", "abl", "mcldef"]),
        (GRID + "[dataset.digits]\nimages = 100\n", {}, ["none", "abl", "mcldef"]),
        (GRID + '[dataset.digits]\ndata_root = "elsewhere"\n', {}, []),
    ],
)
def test_a_cell_is_changed_where_what_it_depends_on_is(
    tmp_path: Path, text: str, methods: dict[str, str], changed: list[str]
) -> None:
    usual = {f"{axis} {name}": name for axis, name in METHODS}
    walk(run_of(tmp_path, methods=usual)[0])
    found, *_ = run_of(tmp_path, text=text, methods=usual | methods)
    assert [name for name, state in states_of(found).items() if state == "changed"] == [
        f"digits-badnets-s{seed}-{name}" for seed in (0, 1) for name in changed
    ]


def test_cells_that_would_make_the_same_thing_are_not_started_together(tmp_path: Path) -> None:
    """Three jobs, but each dataset and each undefended model is made by one cell."""
    run, stage, _ = run_of(tmp_path, jobs=3, script={name: [None] for name in NAMES})
    steps = run.steps()
    next(steps)
    assert stage.started == [NAMES[0], NAMES[3]]
    stage.end(stage.playing[0], worker.DONE)
    next(steps)
    assert stage.started[2:] == [NAMES[1], NAMES[2]]
    for played in stage.playing:
        stage.end(played, worker.DONE)
    next(steps)
    for played in stage.playing:
        stage.end(played, worker.DONE)
    walk_on(steps)
    assert Counter(stage.started) == Counter(NAMES)


def walk_on(steps: Any) -> None:
    for _ in steps:
        pass


def test_a_failed_cell_is_named_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    run, stage, said = run_of(tmp_path, script={NAMES[1]: [worker.FAILED]})
    walk(run)
    assert stage.started == NAMES
    assert states_of(run)[NAMES[1]] == "failed"
    assert f"failed  {NAMES[1]}: the loss is nan" in said[1]
    assert f"{NAMES[1]}.log" in said[1]
    # It stays failed until somebody asks for it.
    later, stage, _ = run_of(tmp_path)
    walk(later)
    assert stage.started == []
    retried, stage, _ = run_of(tmp_path, retry=True)
    walk(retried)
    assert stage.started == [NAMES[1]]
    assert set(states_of(retried).values()) == {"done"}


def test_fail_fast_starts_nothing_more(tmp_path: Path) -> None:
    run, stage, _ = run_of(tmp_path, script={NAMES[1]: [worker.FAILED]}, fail_fast=True)
    walk(run)
    assert stage.started == NAMES[:2]
    assert list(states_of(run).values()).count("waiting") == 4


@pytest.mark.parametrize(
    ("code", "reason"),
    [(-9, r"killed by signal 9 \(out of memory\?\)"), (-11, "killed by signal 11$"), (7, "ended with code 7")],
)
def test_a_worker_that_dies_fails_its_cell_and_is_remembered(tmp_path: Path, code: int, reason: str) -> None:
    import re

    run, _, said = run_of(tmp_path, script={NAMES[0]: [code]})
    walk(run)
    assert re.search(reason, said[0].splitlines()[0])
    assert read_records(tmp_path / "out")[NAMES[0]]["state"] == "failed"


def test_a_worker_that_dies_before_it_writes_anything_is_remembered_too(tmp_path: Path) -> None:
    run, _, _ = run_of(tmp_path)
    run.launch = lambda order, _: Played(order, -9)
    walk(run)
    later, stage, _ = run_of(tmp_path)
    walk(later)
    assert stage.started == []
    assert set(states_of(later).values()) == {"failed"}


def test_a_cell_that_another_sweep_makes_is_asked_for_again(tmp_path: Path) -> None:
    run, stage, _ = run_of(tmp_path, script={NAMES[0]: [worker.BUSY, worker.BUSY]})
    walk(run)
    assert stage.started.count(NAMES[0]) == 3
    assert set(states_of(run).values()) == {"done"}


def test_a_cell_that_another_sweep_makes_is_not_started_until_that_ends(tmp_path: Path) -> None:
    run, stage, _ = run_of(tmp_path)
    steps = run.steps()
    with FileLock(records.sweep_file(tmp_path / "out", "locks", f"{NAMES[0]}.lock")):
        for _ in range(20):
            next(steps)
        assert stage.started == NAMES[1:]
        assert states_of(run)[NAMES[0]] == "waiting"
    walk_on(steps)
    assert stage.started == [*NAMES[1:], NAMES[0]]


def test_a_full_disk_pauses_the_sweep_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 * 2**20]
    monkeypatch.setattr(sweep.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    run, stage, said = run_of(tmp_path, script={NAMES[1]: [worker.FULL]})
    steps = run.steps()
    for _ in range(20):
        next(steps)
    assert stage.started == NAMES[:2]
    assert "10 MiB free" in run.paused
    assert "256 MiB" in said[-1]
    free[0] += 256 * 2**20
    walk_on(steps)
    assert stage.started == [NAMES[0], NAMES[1], *NAMES[1:]]
    assert run.paused == ""


def test_a_sweep_that_waits_looks_at_the_disk_that_is_full_and_tries_again_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("BDBENCH_CACHE", str(cache))
    usage = {cache: 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=usage.get(Path(place), 10**12)))
    assert worker.fullest(tmp_path) == cache
    run, stage, said = run_of(tmp_path, script={NAMES[0]: [worker.FULL]})
    monkeypatch.setattr(sweep, "read_record", lambda *_: {"full": str(cache)})
    steps = run.steps()
    for _ in range(5):
        next(steps)
    assert f"the disk of {cache} (1 MiB free)" in run.paused
    monkeypatch.setattr(sweep, "AGAIN_SECONDS", 0.0)
    for _ in range(3):
        next(steps)
    assert "trying again" in said
    assert stage.started[:2] == [NAMES[0], NAMES[0]]


def test_ctrl_c_stops_the_workers(tmp_path: Path) -> None:
    run, stage, _ = run_of(tmp_path, jobs=2, script={name: [None] for name in NAMES})
    steps = run.steps()
    next(steps)
    steps.close()
    assert [played.stopped for played in stage.playing] == [True, True]


def test_a_record_that_says_running_without_a_worker_is_interrupted(tmp_path: Path) -> None:
    run, stage, _ = run_of(tmp_path, script={NAMES[0]: [None]})
    steps = run.steps()
    next(steps)
    stage.end(stage.playing[0], worker.INTERRUPTED)
    folder = tmp_path / "out"
    assert read_records(folder)[NAMES[0]]["state"] == "interrupted"
    with FileLock(records.sweep_file(folder, "locks", f"{NAMES[0]}.lock")):
        assert read_records(folder)[NAMES[0]]["state"] == "running"
    steps.close()


def test_a_damaged_record_means_that_the_cell_is_made_again(tmp_path: Path) -> None:
    walk(run_of(tmp_path)[0])
    (tmp_path / "out" / finding.SWEEP / "cells" / f"{NAMES[0]}.json").write_text("{")
    run, stage, _ = run_of(tmp_path)
    walk(run)
    assert stage.started == [NAMES[0]]


def test_shards_keep_data_sets_whole_and_cover_all(tmp_path: Path) -> None:
    cells = grid_of(tmp_path, 'seeds = [0, 1, 2]\nattacks = ["badnets", "sig"]\n').cells
    parts = [shard(cells, f"{number}/4") for number in (1, 2, 3, 4)]
    assert sorted(cell for part in parts for cell in part) == sorted(cells)
    groups = [{(cell.attack, cell.seed) for cell in part} for part in parts]
    assert [len(group) for group in groups] == [2, 2, 1, 1]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(OptionError, match="must be N/M"):
        shard(grid_of(tmp_path).cells, part)


def test_the_time_left_comes_from_the_cells_most_alike(tmp_path: Path) -> None:
    def state(name: str, seconds: float) -> State:
        return State(name, {"seconds": seconds, "started": time.time()})

    first, second = Cell("a", "x", "m", "cbd", 0), Cell("a", "x", "m", "abl", 0)
    states = {
        first: state("done", 10), second: state("done", 20), first._replace(attack="y"): State("waiting", {}),
        second._replace(dataset="b"): State("interrupted", {}), Cell("b", "y", "n", "dbd", 0): state("running", 0),
        Cell("b", "z", "n", "dbd", 0): State("failed", {}),
    }  # fmt: skip
    assert seconds_left(states, 1) == pytest.approx(10 + 20 + 15, abs=0.1)
    assert seconds_left(states, 3) == pytest.approx(15, abs=0.1)
    assert seconds_left({first: State("waiting", {})}, 1) is None


def test_jobs_are_bounded_by_memory_and_a_gpu_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "memory_bytes", lambda: 3 * 10**9)
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    assert sweep.usual_jobs(0) == 1
    monkeypatch.setattr(sweep, "memory_bytes", lambda: 300 * 10**9)
    assert sweep.usual_jobs(0) == 8
    assert sweep.usual_jobs(4) == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_only_the_cores_that_this_process_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert sweep.usual_jobs(0) == 1
    finally:
        os.sched_setaffinity(0, allowed)


# the worker


def test_a_worker_waits_for_what_another_process_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    tries: list[bool] = []

    def make(force: bool) -> str:
        tries.append(force)
        if len(tries) < 3:
            raise BusyError("another process")
        return "made"

    assert worker.when_free(make) == "made"
    assert tries == [False] * 3


def test_a_worker_replaces_what_is_in_the_way_once_and_when_told_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker that replaces the same thing at that moment is waited for, and what it made is taken."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    answers: list[Exception | str] = [OccupiedError("other"), BusyError("another process"), "made"]
    tries: list[bool] = []

    def make(force: bool) -> str:
        tries.append(force)
        answer = answers[len(tries) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(OccupiedError):
        worker.when_free(make)
    tries.clear()
    assert worker.when_free(make, replace=True) == "made"
    assert tries == [False, True, False]


def test_a_full_disk_is_told_from_other_errors() -> None:
    def caused(error: Exception) -> Exception:
        outer = ArtifactError("cannot write")
        outer.__cause__ = error
        return outer

    assert worker.is_full(caused(OSError(errno.ENOSPC, "No space left on device")))
    assert worker.is_full(caused(OSError("I/O error: No space left on device (os error 28)")))
    assert not worker.is_full(caused(OSError(errno.EACCES, "Permission denied")))


TINY = """
datasets = ["tiny"]
attacks = ["badnets", "blended"]
defenses = ["none", "abl"]

[recipe]
epochs = 6
batch_size = 16

[dataset.tiny]
use = "tiny.npz"

[defense.abl]
isolation_epochs = 2
unlearn_steps = 2
"""
UNDEFENDED = TINY.partition("[defense.abl]")[0].replace(', "abl"', "")


def tiny_folder(folder: Path) -> Path:
    """A folder with a grid of four cells that take moments, on 80 tiny images."""
    rng = np.random.default_rng(0)
    splits = {"train": 80, "test": 40}
    arrays: dict[str, Any] = {}
    for split, count in splits.items():
        arrays[f"y_{split}"] = np.arange(count) % 4
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "tiny.npz", **arrays)
    (folder / "grid.toml").write_text(TINY)
    return folder


def bdbench(folder: Path, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BDBENCH_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "bdbench", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    rows = results.read_rows([folder / "runs" / "grid"])
    return sorted((row["attack"], row["defense"], row["ba"], row["asr"], row["evaluation_id"]) for row in rows)


def make_here(folder: Path) -> None:
    """Make the cells of a folder's grid one after another in this process, without a sweep."""
    made = Sweep(read_grid(folder / "grid.toml"), folder / "runs" / "grid")
    for cell in made.grid.cells:
        order = made.order(cell)
        worker.make(json.loads(order.text), made.folder, worker.Record(folder / f"{order.name}.json", {}))


@pytest.mark.parametrize("fits", [True, False])
def test_what_a_sweep_says_of_training_reaches_every_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.chdir(tiny_folder(tmp_path))
    text = UNDEFENDED.replace(', "blended"', "").replace('["none"]', '["mcldef"]')
    job = Sweep(grid_of(tmp_path, text), tmp_path / "runs", suspects=["mcldef"], image_memory=1e-3 * fits, compile=True)
    asked = []
    defend = stages.defend

    def watched(*words: Any, **settings: Any) -> Any:
        asked.append(settings["compile"])
        return defend(*words, **settings | {"compile": False})

    monkeypatch.setattr(stages, "defend", watched)
    order = job.order(job.grid.cells[0])
    if fits:
        worker.make(json.loads(order.text), job.folder, worker.Record(tmp_path / "record.json", {}))
        assert asked == [True, True]  # the suspect, and what mends it
    else:
        with pytest.raises(OptionError, match="raise --image-memory"):
            worker.make(json.loads(order.text), job.folder, worker.Record(tmp_path / "record.json", {}))


MOMENTS = 10


def killed_again_and_again(folder: Path, victims: Callable[[int], Sequence[int]]) -> int:
    """Start a sweep and kill at a random moment, again and again; then let it end. Return how many were killed."""
    rng, kills = random.Random(0), 0
    for _ in range(MOMENTS):
        process = bdbench(folder, "sweep", "--jobs", "2", start_new_session=True)
        try:
            process.wait(rng.uniform(0.5, 5))
        except subprocess.TimeoutExpired:
            for pid in victims(process.pid):
                os.kill(pid, signal.SIGKILL)
                kills += 1
            process.kill()
        process.communicate()
        for path in finding.find_artifacts(folder / "runs"):
            artifacts.verify(path[0])
    return kills


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in found]


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="needs pgrep")
@pytest.mark.parametrize("victims", [lambda pid: [pid], workers_of], ids=["sweep", "workers"])
def test_a_sweep_killed_again_and_again_ends_with_the_table_of_an_undisturbed_one(
    tmp_path: Path, victims: Callable[[int], Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
        tiny_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path / "quiet")
    make_here(tmp_path / "quiet")
    folder = tmp_path / "killed"
    kills = killed_again_and_again(folder, victims)
    done = bdbench(folder, "sweep", "--retry")
    assert done.wait(300) == 0, done.communicate()[1]
    assert numbers(folder) == numbers(tmp_path / "quiet")
    assert len(numbers(folder)) == 4
    # Every artifact was sealed once: what is there was made by one of the runs and reused by the others.
    made = [manifest.ask.kind for _, manifest in finding.find_artifacts(folder / "runs")]
    assert Counter(made) == {"dataset": 2, "model": 4, "evaluation": 4}
    assert kills > 0


def test_a_cell_added_to_a_copy_without_images_and_weights_makes_again_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path)
    monkeypatch.chdir(folder)
    text = UNDEFENDED.replace(', "blended"', "")
    (folder / "grid.toml").write_text(text)
    make_here(folder)
    before = numbers(folder)
    for heavy in [*folder.glob("runs/grid/*/*.safetensors"), *folder.glob("runs/grid/*/truth.parquet")]:
        heavy.unlink()
    job = Sweep(grid_of(folder, text.replace('["none"]', '["mcldef"]')), folder / "runs" / "grid", suspects=["mcldef"])
    (cell,) = job.grid.cells
    order = job.order(cell)
    with pytest.warns(DamageWarning) as warned:
        worker.make(json.loads(order.text), job.folder, worker.Record(folder / "record.json", {}))
    assert [str(item.message).partition(" is made again")[0].rpartition("/")[2] for item in warned] == [
        "tiny-badnets-s0",
        "tiny-badnets-s0-none",
    ]
    after = numbers(folder)
    assert [row for row in after if row[1] == "none"] == before
    assert len(after) == 2


def test_a_cell_that_fails_is_recorded_with_its_log(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    text = UNDEFENDED.replace(', "blended"', "")
    (folder / "grid.toml").write_text(f"{text}[attack.badnets]\nrate = 0.001\n")
    done = bdbench(folder, "sweep", "--json")
    out, said = done.communicate(timeout=300)
    assert done.returncode == 1
    assert json.loads(out)["failed"].keys() == {"tiny-badnets-s0-none"}
    assert "rate 0.001" in json.loads(out)["failed"]["tiny-badnets-s0-none"]
    assert "--retry" in said
    log = folder / "runs" / "grid" / finding.SWEEP / "logs" / "tiny-badnets-s0-none.log"
    assert "OptionError" in log.read_text()
    assert read_waiting(folder / "runs" / "grid", ()) == ["tiny-badnets-s0-none"]


def test_what_a_killed_worker_left_of_its_record_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Sweep(grid_of(tmp_path), tmp_path / "out")
    order = json.loads(job.order(job.grid.cells[0]).text)
    record = records.sweep_file(job.folder, "cells", f"{order['name']}.json")
    with pytest.raises(SystemExit), files.replace_file(record) as temporary:
        raise SystemExit
    temporary.touch()  # as SIGKILL leaves it
    monkeypatch.setattr(worker, "make", lambda *_: "evaluation")
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(order) + "\n"))
    monkeypatch.setattr(worker, "_end_with_the_giver", lambda: None)
    assert worker.main() == worker.DONE
    assert [path.name for path in record.parent.iterdir()] == [record.name]


def test_options_are_checked_before_anything_runs(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 'attacks = ["badnets"]\ndefenses = ["abl"]\n[defense.abl]\nisolation_rat = 0.1\n')
    with pytest.raises(OptionError, match=r"line 3, defense abl: unknown option 'isolation_rat'\. Did you mean"):
        checking.check(grid)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[recipe]\naugment = "crop,flap"\n',
            r"line 2, defense none: unknown augmentation 'flap'\. Did you mean 'flip'",
        ),
        ('datasets = ["mine"]\n[dataset.mine]\nuse = "{place}"\n', "line 3, dataset mine: .* is an artifact already"),
    ],
)
def test_what_no_cell_could_be_made_with_is_found_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    seal(tmp_path, "data")
    with pytest.raises(OptionError, match=message):
        checking.check(grid_of(tmp_path, f'defenses = ["none"]\n{text}'.replace("{place}", str(tmp_path / "data"))))


def test_a_grid_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Grid] = []

    def check(grid: Grid) -> checking.Checked:
        asked.append(grid)
        return checking.Checked(("mcldef",), 3, {"attack badnets": "1"})

    monkeypatch.setattr(checking, "check", check)
    for text in (GRID, GRID, GRID + "preset = 'tiny'\n"):
        found = checking.checked_once(grid_of(tmp_path, text), tmp_path / "out")
        assert found == (("mcldef",), 3, {"attack badnets": "1"})
    assert len(asked) == 2
    for release in ("1.0", "1.1", "1.1"):
        plugin = Plugin("attack", "stripe", "mypackage.stripe:Stripe", "mypackage", release)
        monkeypatch.setattr(checking, "all_plugins", lambda plugin=plugin: [plugin])
        checking.checked_once(grid_of(tmp_path, GRID), tmp_path / "out")
    assert len(asked) == 4


def test_the_check_finds_who_mends_a_model(tmp_path: Path) -> None:
    found = checking.check(grid_of(tmp_path))
    assert found.suspects == ("mcldef",)
    assert found.methods.keys() == {"attack badnets", *(f"defense {name}" for name in ("none", "abl", "mcldef"))}


def test_another_version_preset_or_option_is_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(**options: Any) -> str:
        order = {"named": [["defense", "mine", "abl", options]], "models": []}
        return str(worker.check(order)["methods"]["defense mine"])

    usual = digest()
    assert digest() == usual
    assert len({usual, digest(gamma=1.0), digest(preset="paper"), digest(epochs=3)}) == 4
    monkeypatch.setattr(ABL, "version", ABL.version + 1)
    assert digest() != usual
    monkeypatch.undo()
    monkeypatch.setattr(ABL, "presets", {**ABL.presets, "tiny": {}})
    assert digest() != usual


# the commands


def ran(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command line here: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        app.run(arguments)
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_init_writes_a_grid_that_dry_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ran(["sweep", "--init"], capsys)[0] == 0
    code, _, said = ran(["sweep", "--init"], capsys)
    assert code == 1
    assert "exists" in said
    code, shown, said = ran(["sweep", "--dry-run", "--shard", "1/6"], capsys)
    assert code == 0
    assert shown.split()[:2] == ["waiting", "digits-badnets-s0-none"]
    assert "6 waiting" in said
    code, shown, said = ran(["sweep", "--dry-run", "--shard", "6/6", "--seeds", "0"], capsys)
    assert (code, shown) == (0, "")
    assert "no run" in said
    assert ran(["sweep", "--dry-run", "--seeds", "5"], capsys)[1].split()[:2] == ["waiting", "digits-badnets-s5-none"]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_fresh_grid_says_how_long_a_few_steps_lead_to_expect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, expected: list[float | None]
) -> None:
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 0, {}))
    expected += [60.0, 90.0, None, 60.0, 90.0, None]
    grid_of(tmp_path)
    words = ["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--dry-run", "--jobs", "2"]
    assert "about 3 min 45 s left with 2 at once" in ran(words, capsys)[2]  # 6 cells of 75 s, 2 at once
    assert json.loads(ran([*words, "--json"], capsys)[1])["seconds_left"] == 225


def test_cells_that_differ_in_seed_and_attack_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_of(tmp_path, 'seeds = [0, 1]\nattacks = ["badnets", "sig"]\ndefenses = ["none", "cbd"]\n')
    poisoned, timed = [], []
    monkeypatch.setattr(stages, "poison", lambda dataset, out, **_: (poisoned.append(dataset), out.mkdir()))

    def seconds(data: Path, method: str, **_: Any) -> dict[str, float]:
        if method == "cbd":
            raise OptionError("no")
        timed.append(method)
        return {"train": 3.0, "passes": 1.0}

    monkeypatch.setattr(stages, "estimate_seconds", seconds)
    settings = [grid.settings(cell) for cell in grid.cells]
    answers = worker.plan({"settings": settings, "device": "cpu", "precision": "fp32"})
    assert answers == [4.0 if wanted["method"] == "none" else None for wanted in settings]
    assert (poisoned, timed) == (["digits"], ["none"])


def test_a_dry_run_checks_the_options_and_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid_of(tmp_path, 'attacks = ["badnets"]\n[attack.badnets]\nsise = 3\n')
    out = tmp_path / "out"
    code, shown, said = ran(["sweep", str(tmp_path / "grid.toml"), "--out", str(out), "--dry-run"], capsys)
    assert code == 2
    assert not shown
    assert "line 2, attack badnets: unknown option 'sise'" in said
    assert not out.exists()


def test_a_dry_run_counts_a_job_a_gpu_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 5, {}))
    walk(run_of(tmp_path, script={NAMES[1]: [worker.FAILED]})[0])
    there = sorted((tmp_path / "out").rglob("*"))
    code, _, said = ran(["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--dry-run"], capsys)
    assert code == 0
    assert "left with 5 at once" in said
    assert sorted((tmp_path / "out").rglob("*")) == there


def test_a_sweep_on_the_cpu_has_a_job_a_core_whatever_gpus_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 5, {}))
    monkeypatch.setattr(sweep, "cores", lambda: 3)
    monkeypatch.setattr(sweep, "memory_bytes", lambda: 10**11)
    walk(run_of(tmp_path, script={NAMES[1]: [worker.FAILED]})[0])
    words = ["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--dry-run", "--device"]
    assert "left with 3 at once" in ran([*words, "cpu"], capsys)[2]
    assert "left with 5 at once" in ran([*words, "cuda"], capsys)[2]
    code, _, said = ran([*words, "cuda:1"], capsys)
    assert (code, "CUDA_VISIBLE_DEVICES=1 bdbench sweep ... --device cuda" in said) == (2, True)


@pytest.mark.parametrize(("device", "use_gpus"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_ray_is_told_whether_gpus_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str, use_gpus: bool
) -> None:
    connect = Mock(side_effect=OptionError("seen"))
    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 0, {}))
    grid_of(tmp_path)
    words = ["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--engine", "ray"]
    ran([*words, "--device", device], capsys)
    connect.assert_called_once_with(None, None, use_gpus=use_gpus)


def test_a_worker_starts_with_its_share_of_the_cores_and_its_gpu_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Mock()
    monkeypatch.setattr(jobs.subprocess, "Popen", started)
    monkeypatch.setattr(jobs, "cores", lambda: 12)
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    jobs.local(tmp_path, 3, 2)(Order("cell", (), "{}"), 2)
    given = started.call_args.kwargs["env"]
    assert [given[name] for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")] == ["4", "4"]
    assert (given["CUDA_VISIBLE_DEVICES"], given["GLIBC_TUNABLES"]) == ("0", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs.local(tmp_path, 3, 0)(Order("cell", (), "{}"), 2)
    given = started.call_args.kwargs["env"]
    assert given["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in given


def test_the_flags_of_training_reach_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = []
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 0, {}))
    monkeypatch.setattr(commands, "watch", lambda run: orders.append(run.sweep.order(run.cells[0])))
    monkeypatch.setattr(commands, "finish", Mock())
    grid_of(tmp_path)
    words = ["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]
    ran([*words, "--compile", "--image-memory", "0.5"], capsys)
    ran(words, capsys)
    training = [json.loads(order.text)["training"] for order in orders]
    assert training == [{"image_memory": 0.5, "compile": True}, {"image_memory": None, "compile": False}]


def test_status_and_dry_run_say_how_far_a_sweep_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "check", lambda _: checking.Checked(("mcldef",), 1, {}))
    walk(run_of(tmp_path, script={NAMES[1]: [worker.FAILED]})[0])
    code, shown, said = ran(["status", str(tmp_path / "out")], capsys)
    assert code == 0
    assert "the loss is nan" in shown
    assert "5 done, 1 failed" in said
    code, shown, said = ran(["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--dry-run"], capsys)
    assert shown.count("done") == 5
    assert "about 0 s left" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reason_of_a_failure_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    run, stage, _ = run_of(tmp_path, script={NAMES[1]: [worker.FAILED]})
    run.say, stage.reason = console.say_plainly, "cannot open [/usr/lib/x.so]: [enforce fail at alloc_cpu.cpp:117]"
    watch(run)
    assert set(states_of(run).values()) == {"done", "failed"}
    assert f"{NAMES[1]}: {stage.reason}" in capsys.readouterr().err
    assert stage.reason in ran(["status", str(tmp_path / "out")], capsys)[1]


def test_a_sweep_without_room_shows_its_folder_as_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.show(view(grid_of(tmp_path), {}, 1, "no room on the disk of [/data]"))
    assert "no room on the disk of [/data]" in " ".join(capsys.readouterr().out.split())


def test_status_lists_cells_that_have_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = run_of(tmp_path, script={NAMES[0]: [worker.FAILED]}, fail_fast=True, jobs=1)
    run.sweep.announce()
    walk(run)
    code, shown, said = ran(["status", str(tmp_path / "out")], capsys)
    assert code == 0
    assert "1 failed, 5 waiting" in said
    assert all(name in shown for name in NAMES)
    told = json.loads(ran(["status", str(tmp_path / "out"), "--json"], capsys)[1])["cells"]
    assert Counter(record["state"] for record in told) == {"failed": 1, "waiting": 5}


def test_status_of_no_sweep_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = ran(["status", str(tmp_path)], capsys)
    assert code == 1
    assert "holds no sweep; start one with: bdbench sweep" in said


def test_a_changed_cell_is_refused_and_replaced_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path)
    text = UNDEFENDED.replace(', "blended"', "").replace('["none"]', '["none", "mcldef"]')
    (folder / "grid.toml").write_text(text)
    monkeypatch.chdir(folder)
    assert bdbench(folder, "sweep").wait(300) == 0
    before = numbers(folder)
    (folder / "grid.toml").write_text(f"{text}\n[attack.badnets]\nrate = 0.3\n")
    assert ran(["sweep", "--dry-run"], capsys)[1].split()[::2] == ["changed", "changed"]
    code, _, said = ran(["sweep"], capsys)
    assert code == 1
    assert "tiny-badnets-s0-none and 1 more. --replace makes them again in place" in said
    assert numbers(folder) == before
    assert bdbench(folder, "sweep", "--replace", "--jobs", "2").wait(300) == 0
    after = numbers(folder)
    assert [row[:2] for row in after] == [row[:2] for row in before]
    assert not {row[-1] for row in after} & {row[-1] for row in before}
    assert ran(["sweep", "--dry-run"], capsys)[1].split()[::2] == ["done", "done"]


def test_gc_lists_and_removes_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = tmp_path / ".gone.work"
    checkpoints = leftover / "0123456789abcdef"
    checkpoints.mkdir(parents=True)
    (checkpoints / "point").write_bytes(bytes(3_000_000))
    code, shown, said = ran(["gc", str(tmp_path)], capsys)
    assert code == 0
    assert "3.0 MB" in shown
    assert "--remove" in said
    assert leftover.exists()
    assert json.loads(ran(["gc", str(tmp_path), "--remove", "--json"], capsys)[1])["removed"] is True
    assert not leftover.exists()


@pytest.mark.parametrize("lock", [".data.work/lock", ".sweep/locks/digits-badnets-s0-none.lock"])
def test_gc_removes_nothing_while_something_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lock: str
) -> None:
    (tmp_path / ".gone.work").mkdir()
    held = tmp_path / "grid" / lock
    held.parent.mkdir(parents=True)
    with FileLock(held):
        code, _, said = ran(["gc", str(tmp_path), "--remove"], capsys)
        assert code == 1
        assert f"{held} is held" in said
        assert (tmp_path / ".gone.work").exists()
        assert ran(["gc", str(tmp_path)], capsys)[0] == 0
    assert ran(["gc", str(tmp_path), "--remove"], capsys)[0] == 0
    assert not (tmp_path / ".gone.work").exists()


# what is not needed


def test_gc_removes_nothing_while_an_artifact_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be what needs the others."""
    data = stages.poison("digits", out=tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / manifests.MANIFEST).write_text("null")
    assert ran(["gc", str(tmp_path), "--remove"], capsys)[0] == 1
    assert data.path.exists()


def test_gc_finds_what_no_result_was_made_from(tmp_path: Path) -> None:
    data = stages.poison("digits", out=tmp_path / "data")
    other = stages.poison("digits", seed=1, out=tmp_path / "other")
    model = stages.defend(data.path, options={"epochs": 1}, out=tmp_path / "model")
    stages.evaluate(model.path)
    stages.defend(
        data.path, options={"epochs": 1, "lr": 0.01}, out=tmp_path / "not-evaluated"
    )  # hours of work, perhaps
    (tmp_path / ".gone.work").mkdir()
    (tmp_path / ".busy.work").mkdir()
    with FileLock(tmp_path / ".busy.work" / "lock"):
        found = finding.unneeded(tmp_path)
    assert found == sorted([other.path, tmp_path / ".gone.work"])


def test_no_module_of_the_current_folder_is_imported_by_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = {name.partition(".")[0] for name in sys.modules} | {"filelock", "torch", "sitecustomize"}
    for name in loaded - {"pytest", "tests"}:
        if name.isidentifier():
            (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    checking.check(grid_of(tmp_path, 'defenses = ["none"]\n'))
    assert not (tmp_path / "RAN").exists()


def test_a_sweep_makes_again_what_is_damaged_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder(tmp_path))
    job = Sweep(grid_of(tmp_path, UNDEFENDED.replace(', "blended"', "")), tmp_path / "runs")
    (cell,) = job.grid.cells
    order = job.order(cell)
    record = worker.Record(tmp_path / "record.json", {})
    evaluation = tmp_path / "runs" / worker.make(json.loads(order.text), job.folder, record)
    before = (evaluation / "metrics.parquet").read_bytes()
    for damaged in (evaluation / "metrics.parquet", evaluation / manifests.MANIFEST):
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        seal_record(job, cell, evaluation.name)
        said: list[str] = []
        run = Run(job, [cell], Mock(), 1, said.append)
        assert run.states[cell].state == "waiting"
        assert said
        assert said[0].startswith("again   ")
        worker.make(json.loads(order.text), job.folder, record)
        assert (evaluation / "metrics.parquet").read_bytes() == before
        assert job.states()[cell].state == "done"
    dataset = job.folder / job.grid.data_name(cell)
    for name, gone in (("triggered.parquet", evaluation), ("train.safetensors", job.folder / job.grid.name(cell))):
        content = bytearray((dataset / name).read_bytes())
        content[-1] ^= 1
        (dataset / name).write_bytes(content)
        shutil.rmtree(gone)
        worker.make(json.loads(order.text), job.folder, record)
        artifacts.verify(dataset)
        assert (evaluation / "metrics.parquet").read_bytes() == before


def test_retry_makes_datasets_and_models_again_that_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder(tmp_path))
    job = Sweep(grid_of(tmp_path, UNDEFENDED.replace(', "blended"', "")), tmp_path / "runs")
    (cell,) = job.grid.cells
    order = json.loads(job.order(cell).text)
    record = worker.Record(tmp_path / "record.json", {})
    notes: list[str] = []
    record.note = notes.append  # type: ignore[method-assign]
    evaluation = worker.make(order, job.folder, record)
    seal_record(job, cell, evaluation)
    model, dataset = job.folder / order["name"], job.folder / order["data_name"]
    for damaged in (model / "model.safetensors", dataset / "train.safetensors", dataset / manifests.MANIFEST):
        content = bytearray(damaged.read_bytes())
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert Run(job, [cell], Mock(), 1, notes.append).states[cell].state == "done"
        assert Run(job, [cell], Mock(), 1, notes.append, retry=True).states[cell].state == "waiting"
        assert notes[-1].startswith(f"again   {damaged}")
        worker.make(order, job.folder, record)
        assert any(note.startswith(str(damaged)) and note.endswith("it is made again now") for note in notes)
        assert Run(job, [cell], Mock(), 1, notes.append, retry=True).states[cell].state == "done"
    (model / "model.safetensors").unlink()  # to save space
    assert Run(job, [cell], Mock(), 1, notes.append, retry=True).states[cell].state == "done"


def seal_record(job: Sweep, cell: Cell, evaluation: str) -> None:
    """Write the record of a cell that is done."""
    order = json.loads(job.order(cell).text)
    facts = {name: order[name] for name in records.TOLD}
    record = {**facts, "state": "done", "evaluation": evaluation, "seconds": 1.0}
    records.sweep_file(job.folder, "cells", f"{order['name']}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("text", ["0-99999999999", "0-9999,10000-20000", "9" * 5000, "²", "1-²"])
def test_more_seeds_than_the_limit_are_refused_at_once(text: str) -> None:
    with pytest.raises(OptionError, match="seeds"):
        parse_seeds(text)


def test_more_runs_than_the_limit_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="asks for 1,000,000 runs"):
        grid_of(tmp_path, f'seeds = {list(range(1000))}\nattacks = {["badnets"] * 1000}\ndefenses = ["none"]\n')


def test_a_model_whose_name_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot name a folder"):
        grid_of(tmp_path, 'models = ["torchvision:../../../evil/x"]\n')


@pytest.mark.parametrize("content", [b"[" * 100_000, b"x = " + b"[" * 5000, b"\xff", b"a" * (17 * 2**20)])
def test_a_grid_that_asks_for_too_much_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "grid.toml").write_bytes(content)
    with pytest.raises(OptionError, match=r"grid\.toml is not TOML"):
        read_grid(tmp_path / "grid.toml")
