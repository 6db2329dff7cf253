"""Campaigns over processes: killed at any moment, and several at a time at one place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from campaign_running import CODES, Case, Verdict, judged, run

STAGES = {
    "poison": "poison --images 150 --out runs/m",
    "differences": "poison --images 150 --differences --out runs/m",
    "lc": "poison --images 150 --attack lc --surrogate-epochs 4 --out runs/m",
    "lira": "poison --images 150 --attack lira --victim-epochs 3 --generator-epochs 3 --out runs/m",
    "train": "train runs/d --epochs 4 --out runs/m",
    "abl": "defend runs/d --method abl --epochs 3 --isolation-epochs 1 --unlearn-steps 20 --out runs/m",
    "cbd": "defend runs/d --method cbd --epochs 3 --twin-epochs 2 --out runs/m",
    "dbd": "defend runs/d --method dbd --epochs 2 --ssl-epochs 2 --head-epochs 2 --steps-per-epoch 5 --out runs/m",
    "evaluate": "evaluate runs/none --force",
    "force": "train runs/d --epochs 2 --out runs/none --force",
}
TIMED = {"seconds", "peak_memory_bytes", "training_seconds", "made", "at"}
TOGETHER = [
    ["train runs/d --epochs 2 --out runs/m"] * 4,
    ["poison --images 150 --out runs/p"] * 4,
    ["poison --images 150 --out runs/p --force"] * 4,
    [
        "train runs/d --epochs 2 --out runs/m",
        "train runs/d --epochs 3 --out runs/m",
        "poison --images 150 --out runs/m",
    ],
    [
        "train runs/d --epochs 1 --out runs/none --force",
        "table runs",
        "verify runs",
        "report runs --out r.html",
        "gc runs --remove",
        "status runs",
    ],
    [
        "evaluate runs/none --force",
        "evaluate runs/none runs/abl --force",
        "table runs --format csv",
        "inspect runs/none",
    ],
]


def start(words: list[str], log: Path) -> int:
    """Fork a process that runs a command as a shell would."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        from bdbench.cli.app import run as bdbench

        try:
            bdbench(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # before the command began too, on a slow machine
        code = 130
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process and return its exit code, below 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def bits(folder: Path) -> dict[str, str]:
    """Return a hash of every file of an artifact, without times."""
    found = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.name == "history.parquet":
            content = repr(pq.ParquetFile(file).read(["phase", "epoch", "loss", "lr"]).to_pylist()).encode()
        elif file.name == "manifest.json":
            raw = json.loads(content)
            facts = {key: value for key, value in raw["facts"].items() if key not in TIMED}
            content = json.dumps([raw["ask"], facts], sort_keys=True).encode()
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


def kill_case(case: Case) -> Verdict:
    """Kill a command once or more, at random moments, then run it to its end: its bits are those without a kill."""
    rng, name = case.rng, case.rng.choice(sorted(STAGES))
    words = STAGES[name].split()
    made = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs/none-eval")
    expected, seconds = undisturbed(name, words, made, case)
    told = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        begun, wait, how = (
            time.monotonic(),
            rng.random() * seconds,
            rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]),
        )
        pid = start(words, Path("log"))
        while time.monotonic() - begun < wait and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        os.kill(pid, how)
        code = ended(pid)
        told.append(f"{how.name} after {wait:.2f} s: {code}")
        if code not in (0, 130, -how):
            return Verdict(f"{name}, {told}", f"exit code {code}", Path("log").read_text(errors="replace"))
        looked = run(["verify", "runs"])
        if looked.problem or looked.code:
            return Verdict(f"{name}, {told}", looked.problem or "an artifact is damaged", looked.err)
    code = ended(start([word for word in words if word != "--force"] if made.exists() else words, Path("log")))
    if code:
        return Verdict(f"{name}, {told}", f"the same command ends with {code}", Path("log").read_text(errors="replace"))
    if bits(made) != expected and name != "force":
        return Verdict(f"{name}, {told}", "other bits than without the kill")
    return Verdict(f"{name}, {told}", "")


def undisturbed(name: str, words: list[str], made: Path, case: Case) -> tuple[dict[str, str], float]:
    """Return the bits and the seconds of a command without a kill, kept for other cases; runs/ is fresh afterwards."""
    kept = case.room.root / "cache" / f"undisturbed-{name}.json"
    if not kept.exists():
        shutil.copytree(case.room.base / "runs", "runs")
        begun = time.monotonic()
        if code := ended(start(words, Path("log"))):
            raise SystemExit(f"bdbench {' '.join(words)} ends with {code}: {Path('log').read_text()}")
        kept.write_text(json.dumps([bits(made), time.monotonic() - begun]))
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree(case.room.base / "runs", "runs")
    found, seconds = json.loads(kept.read_text())
    return found, seconds


def together_case(case: Case) -> Verdict:
    """Start several commands at one place: each ends as documented, all that stands is whole, nothing is left over."""
    rng = case.rng
    shutil.copytree(case.room.base / "runs", "runs")
    lines = rng.choice(TOGETHER)
    pids = []
    for number, text in enumerate(lines):
        pids.append(start(text.split(), Path(f"log{number}")))
        time.sleep(rng.choice([0.0, 0.05, 0.4]) * rng.random())
    codes = [ended(pid) for pid in pids]
    said = [Path(f"log{number}").read_text(errors="replace") for number in range(len(lines))]
    what = f"{lines}: {codes}"
    for code, text in zip(codes, said, strict=True):
        if code not in CODES - {2, 3} or judged(text):
            return Verdict(what, judged(text) or f"exit code {code}", text)
    if 0 not in codes:
        return Verdict(what, "none was done", " ".join(said))
    looked = run(["verify", "runs"])
    if looked.problem or looked.code:
        return Verdict(what, looked.problem or "an artifact is damaged", looked.err)
    left = [path for path in Path("runs").rglob(".*") if path.name.endswith((".tmp", ".work"))]
    return Verdict(what, f"left over: {left}" if left else "")
