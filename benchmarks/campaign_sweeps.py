"""Campaign over sweeps that are killed: the same command then ends with the same results, and nothing is left over."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from campaign_processes import TIMED, bits, start
from campaign_running import Case, Verdict, run

GRID = """\
attacks = ["badnets", "lc"]
defenses = ["abl", "mcldef"]
preset = "tiny"
recipe.epochs = 2
dataset.digits.images = 150
attack.lc.surrogate_epochs = 6
defense.abl.isolation_epochs = 1
"""
NAMES = {f"digits-{attack}-s0-{defense}" for attack in ("badnets", "lc") for defense in ("abl", "mcldef")}
PR_SET_CHILD_SUBREAPER = 36
LONGEST = 600
"""Seconds that a sweep may take, which takes 20 on an idle machine."""
STOPPED = 60
"""Seconds after which a worker whose sweep was killed must have ended; it may have to import torch first."""
Found = dict[str, Any]


def case(case: Case) -> Verdict:
    """Kill a sweep once or more, at random moments, then give the same command: all is there, with the same bits."""
    # What the sweep leaves becomes a child of this process, which can wait for it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    rng = case.rng
    shutil.rmtree(case.room.root / "cache" / "surrogates", ignore_errors=True)
    Path("grid.toml").write_text(GRID)
    words = ["sweep", "grid.toml", "--out", "runs", "--jobs", str(rng.choice([1, 1, 2]))]
    expected, seconds = undisturbed(words, case)
    told = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind, wait = rng.choice(["sweep", "sweep", "all", "interrupt", "worker"]), rng.random() * seconds
        code = killed(words, kind, wait, rng)
        told.append(f"{kind} after {wait:.1f} s: {code}")
        if code not in {"worker": (0, 1), "interrupt": (0, 130)}.get(kind, (0, -signal.SIGKILL)):
            return Verdict(f"{words[-2:]} {told}", f"exit code {code}", log())
        if problem := left_running() or damaged():
            return Verdict(f"{words[-2:]} {told}", problem, log())
    code = waited(start([*words, "--retry"] if any(text.startswith("worker") for text in told) else words, Path("log")))
    what = f"{words[-2:]} {told}"
    if code:
        return Verdict(what, f"the same command ends with {code}", log())
    if problem := left_running() or damaged() or left_over(case.room.root / "cache"):
        return Verdict(what, problem, log())
    return Verdict(what, differences(expected, results()))


def log() -> str:
    """Return what the sweep and its workers said last."""
    return "\n".join(file.read_text(errors="replace") for file in [*Path("runs/.sweep").glob("logs/*"), Path("log")])


def killed(words: list[str], kind: str, wait: float, rng: random.Random) -> int:
    """Start a sweep, kill it, all of it or one of its workers after some seconds, and return its exit code."""
    begun, pid = time.monotonic(), start(words, Path("log"))
    while time.monotonic() - begun < wait and not has_ended(pid):
        time.sleep(0.005)
    workers = children(pid)
    if kind == "worker":
        for worker in rng.sample(workers, min(1, len(workers))):
            os.kill(worker, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGINT if kind == "interrupt" else signal.SIGKILL)
        for worker in workers if kind == "all" else ():
            os.kill(worker, signal.SIGKILL)
    return waited(pid)


def has_ended(pid: int) -> bool:
    """Say whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def waited(pid: int) -> int:
    """Wait for a child and return its exit code, below 0 for a signal; one that takes too long is killed."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end and not has_ended(pid):
        time.sleep(0.02)
    if not has_ended(pid):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = place.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(place.parent.name))
    return found


def left_running() -> str:
    """Wait for what a killed sweep has started; return what goes on all the same, which is ended, or ''."""
    end = time.monotonic() + STOPPED
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
        except ChildProcessError:
            return ""
    still = children(os.getpid())
    for pid in still:
        os.kill(pid, signal.SIGKILL)
    return f"{len(still)} workers go on without their sweep"


def damaged() -> str:
    """Return what `verify` says of the artifacts that there are, or ''."""
    if not any(Path("runs").glob("*/manifest.json")):
        return ""
    looked = run(["verify", "runs"])
    return looked.problem or (f"verify ends with {looked.code}: {looked.err}" if looked.code else "")


def left_over(cache: Path) -> str:
    """Return which hidden files are left in the sweep's folder and in the cache, or ''."""
    places = [*Path("runs").rglob(".*"), *cache.rglob(".*")]
    found = [str(path) for path in places if path.name != ".sweep"]
    return f"left over: {', '.join(found)}" if found else ""


def results() -> Found:
    """Return a hash of every file of every artifact, and the rows of the table, without times."""
    rows = sorted(json.loads(run(["table", "runs", "--json"]).out)["rows"], key=lambda row: str(row["path"]))
    found: Found = {place.parent.name: bits(place.parent) for place in Path("runs").glob("*/manifest.json")}
    return found | {"rows": [{key: value for key, value in row.items() if key not in TIMED} for row in rows]}


def differences(expected: Found, found: Found) -> str:
    """Return what is missing, or has other bits or numbers, or ''."""
    missing = {*expected, *NAMES} - found.keys()
    other = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    parts = [f"missing: {', '.join(sorted(missing))}"] * bool(missing) + [f"other: {', '.join(sorted(other))}"] * bool(
        other
    )
    return "; ".join(parts)


def undisturbed(words: list[str], case: Case) -> tuple[Found, float]:
    """Return what a sweep leaves and how long it takes without a kill, kept for other cases."""
    kept = case.room.root / "cache" / "undisturbed-sweep.json"
    if not kept.exists():
        begun = time.monotonic()
        if code := waited(start(words, Path("log"))):
            raise SystemExit(f"bdbench {' '.join(words)} ends with {code}: {log()}")
        kept.write_text(json.dumps([results(), time.monotonic() - begun]))
        shutil.rmtree("runs")
        shutil.rmtree(case.room.root / "cache" / "surrogates", ignore_errors=True)
    found, seconds = json.loads(kept.read_text())
    return found, seconds
