"""How a campaign runs a command in this process, and what it counts as a finding."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 30
"""Seconds of the processor that a command may take."""
LONGEST = 600
"""Seconds that it may take on a machine that others use too."""
CODES = {0, 1, 2, 3, 130}
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Room(NamedTuple):
    """Where cases run: what stands in `root` beside `place` must stay as it is."""

    root: Path

    @property
    def place(self) -> Path:
        """The folder of a case."""
        return self.root / "case"

    @property
    def base(self) -> Path:
        """A folder with two datasets, two models and two evaluations."""
        return self.root / "base"

    @classmethod
    def make(cls, root: Path) -> Room:
        """Make the folder and the artifacts that cases change copies of; programs of other names leave a mark."""
        room = cls(root)
        for name in ("home", "cache", "base", "bin", "ran"):
            (root / name).mkdir()
        for name in ("gs", "gswin64c", "convert", "rsvg-convert", "curl", "wget"):
            (root / "bin" / name).write_text(f"#!/bin/sh\ntouch {root}/ran/{name}\n")
            (root / "bin" / name).chmod(0o755)
        os.environ |= {
            "HOME": str(root / "home"), "BDBENCH_CACHE": str(root / "cache"), "COLUMNS": "100",
            "TMPDIR": str(root / "cache"), "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "MPLCONFIGDIR": str(root / "cache"), "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        }  # fmt: skip
        os.chdir(room.base)
        for line in (
            "poison --images 150 --out runs/d", "poison --images 150 --seed 1 --differences --out runs/small",
            "train runs/d --epochs 2 --out runs/none",
            "defend runs/d --method abl --epochs 3 --isolation-epochs 1 --unlearn-steps 5 --out runs/abl",
            "evaluate runs/none runs/abl", "report runs --out r.html", "suspects runs/abl --image s.png",
        ):  # fmt: skip
            ended = run(line.split())
            if ended.code or ended.problem:
                raise SystemExit(f"bdbench {line} ended with {ended.code}: {ended.problem} {ended.err}")
        Path("table.json").write_text(run(["table", "runs", "--json"]).out)
        return room

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of the table of the artifacts as they were made."""
        rows: list[dict[str, Any]] = json.loads((self.base / "table.json").read_text())["rows"]
        return rows

    def disturbed(self) -> str:
        """Return what a case left outside its folder, or ''."""
        if ran := [path.name for path in (self.root / "ran").iterdir()]:
            for name in ran:
                (self.root / "ran" / name).unlink()
            return f"a program ran: {', '.join(ran)}"
        known = {"home", "cache", "base", "bin", "ran", "case", "log"}
        extra = [path for path in [*self.root.iterdir(), *(self.root / "home").iterdir()] if path.name not in known]
        for path in extra:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return f"a file was written outside: {extra[0]}" if extra else ""


class Case(NamedTuple):
    """A case: its number, its own randomness, and where it runs."""

    number: int
    rng: random.Random
    room: Room


class Verdict(NamedTuple):
    """What was done, what is wrong ('' if nothing), and the output that shows it."""

    what: str
    problem: str
    detail: str = ""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    problem: str


class TooLongError(BaseException):
    """A command took too long; no handler of errors may take it."""


def _ring(*_: Any) -> None:  # noqa: ANN401 - of a signal
    raise TooLongError


def run(words: list[str]) -> Ended:
    """Run a command line in this process, with streams as a pipe has them."""
    from bdbench.cli.app import run as bdbench

    raw = io.BytesIO(), io.BytesIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, encoding="utf-8", write_through=True) for stream in raw)
    code, problem = 0, ""
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, _ring)
    signal.alarm(LONGEST)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        bdbench(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        problem = "" if code in CODES else f"exit code {code}"
    except TooLongError:
        problem = f"more than {SECONDS} s"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = before
    out, err = (stream.getvalue().decode("utf-8", "replace") for stream in raw)
    del streams
    return Ended(code, out, err, problem or judged(out + err))


def judged(text: str) -> str:
    """Return what is wrong with output, or ''."""
    if "Traceback (most recent call last)" in text:
        return "a traceback"
    for character in text:
        if (unicodedata.category(character) == "Cc" and character not in "\n\t") or character in TURNING:
            return f"the control character {character!r} in the output"
    return ""


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, clear or double bytes."""
    changed = bytearray(content)
    kind = rng.choice(["flip", "flip", "flip", "cut", "insert", "clear", "double", "head"])
    place = rng.randrange(len(changed) or 1)
    if kind == "flip" and changed:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "insert":
        changed[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
    elif kind == "clear":
        changed[place : place + 16] = bytes(len(changed[place : place + 16]))
    elif kind == "double":
        changed *= 2
    elif kind == "head":
        changed[:8] = rng.randbytes(8)
    return bytes(changed)


TEXTS = [
    "", " ", "-", "--", "../../../evil", "/etc/passwd", "\x1b[31mred\x1b]0;title\x07", "[/bold]", "[red]x[/red]",
    "a" * 5000, "\0", "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "{{7*7}}",
    "=cmd|' /C calc'!A0", "\ud800", "\u202eevil", "\n", "a|b", "module:evil", "torchvision:NAME", "os:system", "nan",
    "1e309", "٣", "²", "${HOME}", "~nobody/x", "$(touch x)", "%s%n", "💣", r"\input{/etc/passwd}",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, float("nan"), float("inf"), 1e308, [], {}, [[]],
    [None], {"a": None}, {"": {}}, [1, "a"], ["x"] * 300, *TEXTS,
]  # fmt: skip
