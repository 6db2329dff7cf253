"""Campaign over artifacts that were damaged, or prepared by somebody."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from campaign_running import TEXTS, VALUES, Case, Ended, Room, Verdict, damage, run

LOOKS = (
    "verify {0}", "verify runs --json", "table runs --format markdown", "table runs --format csv",
    "table runs --format latex", "table runs", "table runs --wide --columns ba,asr", "inspect {0}",
    "inspect {0} --json", "report runs --out r.html", "gc runs", "status runs",
    "suspects runs/abl --data runs/d --csv s.csv", "evaluate runs/none",
    "compare runs/none-eval runs/abl-eval --csv c.csv", "inspect {0} --image i.png",
)  # fmt: skip
TRAININGS = ("train {0} --epochs 1 --out runs/new", "defend {0} --method oracle --epochs 1 --out runs/new")
"""What reads a dataset only, and takes as long as ten looks."""


def case(case: Case) -> Verdict:
    """Damage or prepare one artifact of six; look at it, at the others, and at the table."""
    rng, runs = case.rng, Path("runs")
    for file in sorted((case.room.base / "runs").rglob("*")):
        if file.is_file():
            target = runs / file.relative_to(case.room.base / "runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    folder = rng.choice(sorted(path for path in runs.iterdir() if (path / "manifest.json").is_file()))
    told, sealed = _change(folder, rng)
    what = f"{folder}: {told}"
    after = run(["table", "runs", "--json"])
    if (
        problem := after.problem
        or _lost_rows(folder, after, case.room)
        or ("" if sealed else _other_numbers(after, case.room))
    ):
        return Verdict(f"{what}; table --json", problem, after.out + after.err)
    lines = rng.sample([*LOOKS, *TRAININGS] if folder.name in ("d", "small") else LOOKS, 3)
    for line in sorted(lines, key=lambda line: line != "verify {0}"):  # before another command mends it
        ended = run(line.format(folder).split())
        problem = ended.problem
        if not sealed and line == "verify {0}" and not ended.code:
            problem = "verify says nothing"
        if problem:
            return Verdict(f"{what}; {line.format(folder)}", problem, ended.out + ended.err)
    return Verdict(what, "")


def _rows(ended: Ended) -> list[dict[str, Any]]:
    return json.loads(ended.out)["rows"] if ended.code == 0 else []


def _lost_rows(folder: Path, after: Ended, room: Room) -> str:
    """Return which row is no longer in the table though another artifact was changed, or ''."""
    kept = {row["path"] for row in room.table()} - {str(folder)}
    lost = kept - {row["path"] for row in _rows(after)}
    return f"{', '.join(sorted(lost))} left out of the table" if lost else ""


def _other_numbers(after: Ended, room: Room) -> str:
    """Return which number differs, or ''; one that rests on a row that was left out is empty."""
    known = {row["path"]: row for row in room.table()}
    for row in _rows(after):
        for key, value in row.items():
            if value is not None and key != "marks" and known.get(row["path"], {}).get(key) != value:
                return f"another {key} of {row['path']}"
    return ""


def _change(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Change an artifact; say how, and whether its hashes are right again (as an attacker makes them)."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    manifest = folder / "manifest.json"
    kind = rng.choice(
        [
            "bytes",
            "manifest bytes",
            "manifest",
            "manifest",
            "manifest",
            "sealed bytes",
            "sealed table",
            "sealed names",
            "sealed tensors",
            "sealed tensors",
            "sealed model",
            "thing",
        ]
    )
    raw = json.loads(manifest.read_text())
    if kind == "bytes":
        file = rng.choice(files)
        old = file.read_bytes()
        file.write_bytes(damage(old, rng))
        return f"{kind} of {file.name}", file.read_bytes() == old
    if kind == "manifest bytes":
        manifest.write_bytes(damage(manifest.read_bytes(), rng))
        return kind, True  # spaces may change without harm
    if kind == "manifest":
        told = []
        for _ in range(rng.choice([1, 1, 2])):
            container, key = rng.choice(_places(raw))
            if isinstance(container, dict) and rng.random() < 0.3:
                del container[key]
                told.append(f"no {key}")
            else:
                container[key] = rng.choice(VALUES)
                told.append(f"{key}={str(container[key])[:40]!r}")
        return _seal(folder, raw, f"{kind} {' '.join(told)}")
    if kind == "sealed names":
        name = rng.choice([*TEXTS, "../none/model.safetensors", "/dev/zero", "manifest.json"])
        raw["files"][name] = {"sha256": "0" * 64, "bytes": rng.choice([0, 1, 10**20])}
        return _seal(folder, raw, f"{kind} {name[:40]!r}")
    file = rng.choice(files)
    if kind == "thing":
        return f"{_put_thing(file, rng)} in place of {file.name}", True
    if kind == "sealed model" and "model" in raw["facts"]:
        raw["facts"]["model"] = raw["ask"]["config"]["model"] = rng.choice([*TEXTS, "torchvision:vgg16", "wrn-16-1", 5])
        return _seal(folder, raw, f"{kind} {str(raw['facts']['model'])[:40]!r}")
    if kind == "sealed tensors" and file.suffix == ".safetensors":
        file.write_bytes(_changed_tensors(file.read_bytes(), rng))
        return _seal(folder, raw, f"{kind} of {file.name}")
    if kind == "sealed table" and file.suffix == ".parquet":
        _change_table(file, rng)
    else:
        file.write_bytes(damage(file.read_bytes(), rng))
    return _seal(folder, raw, f"{kind} of {file.name}")


def _put_thing(file: Path, rng: random.Random) -> str:
    """Put something in place of a file that is no file of an artifact."""
    content = file.read_bytes()
    file.unlink()
    thing = rng.choice(["nothing", "folder", "pipe", "loop", "device", "link"])
    if thing == "folder":
        file.mkdir()
    elif thing == "pipe":
        os.mkfifo(file)
    elif thing == "link":
        Path("away").write_bytes(content)
        file.symlink_to(Path("away").resolve())
    elif thing != "nothing":
        file.symlink_to(file.name if thing == "loop" else rng.choice(["/dev/zero", "/dev/null", "/proc/self/mem"]))
    return thing


def _changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file whose header says something else, or whose tensors are others."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.choice(["dtype", "shape", "data_offsets", "length", "drop", "nested", "nan", "zeros"])
    values: dict[str, list[Any]] = {
        "dtype": ["F64", "F16", "BF16", "I8", "BOOL", "X", "", "I64", 5],
        "shape": [[], [0], [1], [-1], [2**62, 4], header[name]["shape"][::-1], [2**31, 0], [1.5], "x"],
        "data_offsets": [[0, 0], [5, 1], [-1, 5], [0, 2**63], [0], "x", [0, len(body) + 1]],
    }
    if kind in values:
        header[name][kind] = rng.choice(values[kind])
    elif kind == "length":
        return struct.pack("<Q", rng.choice([2**63, 2**40, 2**27, len(content), 0])) + content[8:]
    elif kind == "drop":
        del header[name]
    elif kind == "nested":
        text = b"[" * 20_000
        return struct.pack("<Q", len(text)) + text + body
    elif kind == "nan":
        body = b"\xff" * len(body)
    else:
        body = bytes(len(body))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _places(value: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in [(value, key), *_places(item)]]


def _seal(folder: Path, raw: Any, told: str) -> tuple[str, bool]:  # noqa: ANN401 - JSON of any form
    try:
        for name, said in raw["files"].items():
            if "/" not in name and (folder / name).is_file():
                content = (folder / name).read_bytes()
                said |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        asked = json.dumps({"schema": 1, **raw["ask"]}, sort_keys=True, separators=(",", ":"))
        raw["id"] = hashlib.sha256(asked.encode()).hexdigest()[:16]
        seal = json.dumps([raw["files"], raw["facts"], raw["made"]], sort_keys=True)
        raw["seal"] = hashlib.sha256(seal.encode()).hexdigest()
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        pass
    (folder / "manifest.json").write_text(json.dumps(raw))
    return told, True


def _change_table(file: Path, rng: random.Random) -> None:
    table = pq.ParquetFile(file).read()
    place = rng.randrange(table.num_columns)
    name, count = table.column_names[place], len(table)
    text = rng.choice(TEXTS).replace("\ud800", "s")
    changes = {
        "drop": lambda: table.drop_columns([name]), "twice": lambda: table.append_column(name, table.column(place)),
        "rename": lambda: table.rename_columns([text if old == name else old for old in table.column_names]),
        "text": lambda: table.set_column(place, name, pa.array([text] * count)),
        "rows": lambda: table.slice(0, count // 2),
        "none": lambda: table.set_column(place, name, pa.array([None] * count, table.column(place).type)),
        "type": lambda: table.set_column(place, name, pa.array(np.full(count, rng.choice([-1, 2**62])))),
        "nan": lambda: table.set_column(place, name, pa.array(np.full(count, np.nan))), "empty": lambda: pa.table({}),
        "note": lambda: table.replace_schema_metadata({b"pandas": b"{" * 9000}),
    }  # fmt: skip
    pq.write_table(changes[rng.choice(sorted(changes))](), file)
