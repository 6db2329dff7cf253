"""Campaign over command lines, TOML files, records of sweeps and environments that nobody would type."""

from __future__ import annotations

import os
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from campaign_running import TEXTS, Case, Verdict, run

COMMANDS = {
    "poison": 8, "take": 5, "train": 4, "defend": 6, "suspects": 5, "evaluate": 5, "table": 7, "compare": 4,
    "report": 4, "sweep": 6, "status": 3, "gc": 3, "list": 2, "show": 3, "inspect": 5, "verify": 4, "docs": 1,
    "quickstart": 1,
}  # fmt: skip
METHODS = {
    "poison": ("--attack", ["badnets", "blended", "wanet", "sig", "tact", "adap-blend", "refool", "trojan"]),
    "defend": ("--method", ["abl", "cbd", "dbd", "mcldef", "oracle", "none"]),
}
NAMES = [
    "digits",
    "cifar10",
    "badnets",
    "badnet",
    "none",
    "abl",
    "oracle",
    "convnet",
    "torchvision:NAME",
    "torchvision:../x",
    "attacks",
    "metrics",
]
PLACES = [
    "runs", "runs/d", "runs/none", "runs/abl", "runs/none-eval", "runs/d/manifest.json", ".", "", "nope",
    "/proc/nope/x", "/dev/null", "/dev/full", "~nobody/x", "a" * 300, "a/" * 2500, "x\ny", "grid.toml", "empty",
    "file.npz", "file.parquet", "pickle.pt", "x.png", "x.svg", "out", "out/new", "file.npz/x", "﷽", "-",
    "0123456789abcdef", "[/b]",
]  # fmt: skip
NUMBERS = [
    "0", "1", "-1", "2", "20", "0.5", "1.5", "1e309", "nan", "inf", "-inf", "1e-400", "9" * 30, "9" * 5000, "1_000",
    "0x10", "²", "٣", "1,5", " 1", "", "true", "1e5", "2147483648", "9223372036854775808", "1e18",
]  # fmt: skip
WORDS = [
    *TEXTS, "asr<=0.5", "asr<=1e999", "ba>=--1", "xyz<1", "all-to-all", "cuda:0", "cuda:-1", "cuda:²", "mps", "meta",
    "cpu:5", "bf16", "fp16", "paper", "fast", "tiny", "markdown", "csv", "latex", "json", "1/2", "²/8", "0/0",
    "1/" + "9" * 5000, "0-4", "4-0", "0-", "0-99999999999", "1,,2", "local", "crop,flip", "auto",
]  # fmt: skip
SETTINGS = [
    "seed = 1", "seed = -1", "seed = nan", "seed = true", "seed = [[1]]", "seed = {a=1}", "seed = 1979-05-27",
    "seed = " + "9" * 5000, "x = " + "[" * 5000, ".".join("a" for _ in range(3000)) + " = 1", "attack = 5",
    "attack = ['badnets']", "out = '\\u0000'", "out = ''", "json = 'x'", "config = 'c.toml'", '"--seed" = 1',
    '"" = 1', "options = {a=1}", "image_size = 1e400", "trusted = nan", "share = nan", "places = ['a']",
    "assert = [1]", "epochs = 1.5", "lr = nan", "data = '\\u0000'", "device = '\\u0000'", "image_memory = inf",
    "data_root = '~nobody'", "csv = '\\u0000'", "help = true", "\xff", "",
]  # fmt: skip
GRIDS = [
    "", "seeds = [-1]", "seeds = ['a']", "seeds = [" + "9" * 4000 + "]", "datasets = ['../x']",
    "datasets = ['digits', 'digits']", "defenses = ['none','abl']", "models = ['torchvision:../../x']",
    "attacks=['x']\n[attack.x]\nuse='badnets'\nrate=nan", "attacks=['x']\n[attack.x]\nuse=5",
    "attacks=['x']\nattack=5", "datasets=['d']\n[dataset.d]\nuse='../../../etc'",
    "datasets=['d']\n[dataset.d]\nuse='\\u0000/'", "datasets=['d']\n[dataset.d]\nuse='~nobody/x'",
    "[recipe]\nepochs=nan", "recipe=5", "preset=5", "trusted=nan", "[[exclude]]\nx=1", "include=[1]",
    "x = " + "[" * 3000, "defenses=['..']", "defenses=['\\u0000']",
    "attacks=['" + "a" * 300 + "']\n[attack." + "a" * 300 + "]\nuse='badnets'",
    "defenses=['x']\n[defense.x]\nuse='abl'\nisolation_rate=[1]",
    "attacks=['blended']\n[attack.blended]\npicture='/etc/passwd'",
    "defenses=['x']\n[defense.x]\nuse='none'\nepochs=1979-05-27",
]  # fmt: skip
RECORDS = [
    "", "null", "[]", "{}", '{"name": "x0"}',
    '{"name": "x0", "cell": {}, "asked": {}, "state": "weird", "seconds": 1}',
    '{"name": "x0", "cell": {}, "asked": {}, "state": "done", "seconds": "a"}',
    '{"name": "../x", "cell": {}, "asked": {}, "state": "running", "seconds": 1}',
    '{"name": "x0", "cell": {}, "asked": {}, "state": "failed", "seconds": 1, "reason": "[/b]\\u001b[2J"}',
    "[" * 90_000, '{"name": "x0", "cell": {}, "asked": {}, "state": "interrupted", "seconds": NaN}',
]  # fmt: skip
ENVIRONMENTS = {
    "COLUMNS": ["0", "-5", "abc", "1", "99999999"], "OMP_NUM_THREADS": ["", "x", "0", "-1"],
    "BDBENCH_CACHE": ["~nobody/x", "/dev/null", "grid.toml", "/proc/x", "c" * 5000, "\x1b[31m", "runs/d/x/y"],
}  # fmt: skip
FILES = ("--out", "--csv", "--image", "--junit", "--data", "--suspect", "--data-root", "--picture", "--runs")
ROWS = ("--dataset", "--attack", "--method", "--model")
NOT_TRIED = ("--compile", "--engine", "--address", "--help", "--download", "--retry", "--jobs")
"""Flags that only take long or reach for other machines."""

LONG = ("train", "defend", "poison")
"""Commands that take as long as the numbers ask that they are given, as does the timing of a sweep's dry run."""


@cache
def _flags(command: str, extra: tuple[str, ...]) -> list[tuple[str, bool, int, bool]]:
    """Return flag, whether it is a switch, how many words it takes, and whether it is an argument."""
    import typer

    from bdbench.cli.app import build

    group: Any = typer.main.get_command(build([command, *extra])[0])
    found = group.commands[command].params
    return [
        (item.opts[0], getattr(item, "is_flag", False), item.nargs, item.param_type_name == "argument")
        for item in found
    ]


def _value(flag: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return rng.choice([*PLACES, *NUMBERS, *WORDS, *NAMES])
    if flag == "--config":
        return rng.choice(["c.toml"] * 9 + PLACES + ["/dev/zero"])
    if flag in FILES:
        return rng.choice(PLACES)
    if flag in ROWS:
        return rng.choice(NAMES + PLACES[:8])
    return rng.choice(NUMBERS if rng.random() < 0.6 else WORDS)


def line(rng: random.Random) -> list[str]:
    """Return a command line."""
    command = rng.choices(list(COMMANDS), list(COMMANDS.values()))[0]
    if command == "quickstart":
        return [command, "--seed", rng.choice(["-1", "x", "", "nan", "9" * 5000])]
    flag, methods = METHODS.get(command, ("", []))
    extra = (flag, rng.choice(methods)) if methods and rng.random() < 0.7 else ()
    words = [command, *extra]
    if command == "sweep":
        words += [rng.choice(["grid.toml"] * 6 + PLACES), "--dry-run"]
    known = [item for item in _flags(command, extra) if item[0] not in NOT_TRIED]
    named = [item for item in known if not item[3]]
    for name, is_switch, count, _ in rng.sample(named, min(len(named), rng.choice([0, 1, 1, 2, 3, 5]))):
        words += [name] if is_switch else [name, *(_value(name, rng) for _ in range(max(1, count)))]
    if command != "sweep" and any(item[3] for item in known) and rng.random() < 0.8:
        words.append(
            rng.choice(
                NAMES + WORDS
                if command in ("show", "list", "docs")
                else [*PLACES[:6] * 3, *PLACES, *NAMES[:3], "swept"]
            )
        )
    if command in ("train", "defend"):
        words += ["--epochs", "1"] if "--epochs" not in words else []
    if command in ("poison", "take"):
        words += ["--no-download"]
    if rng.random() < 0.02:
        words.insert(rng.randrange(len(words)), rng.choice(WORDS))
    return [word.replace("\0", "").replace("\ud800", "\udc80") for word in words]


def case(case: Case) -> Verdict:
    """Type a command line among files that nobody would write."""
    rng = case.rng
    shutil.copytree(case.room.base / "runs", "runs")
    Path("empty").mkdir()
    Path("grid.toml").write_text(rng.choice(GRIDS), encoding="utf-8")
    Path("c.toml").write_text(rng.choice(SETTINGS), encoding="latin-1")
    Path("file.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    Path("file.parquet").write_bytes(b"PAR1PAR1")
    Path("pickle.pt").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    for name in ("filelock", "torch", "typing_extensions"):
        Path(f"{name}.py").write_text("open('PWNED', 'w')\n")
    cells = Path("swept/.sweep/cells")
    cells.mkdir(parents=True)
    (cells / "x0.json").write_text(rng.choice(RECORDS))
    (cells.parent / "grid").mkdir()
    (cells.parent / "grid" / "names.json").write_text(
        rng.choice(["[]", '["a"]', "5", "null", '{"a":1}', '[{"a":1}]', '"abc"', "[" * 50_000, ""])
    )
    before = dict(os.environ)
    if rng.random() < 0.1:
        name = rng.choice(sorted(ENVIRONMENTS))
        os.environ[name] = rng.choice(ENVIRONMENTS[name])
    words = line(rng)
    ended = run(words)
    os.environ.clear()
    os.environ.update(before)
    told = " ".join(word if len(word) < 60 else f"{word[:20]}...x{len(word)}" for word in words)
    toml = Path("grid.toml" if words[0] == "sweep" else "c.toml")
    if toml.name in words and toml.is_file():
        told += f" | {toml.read_bytes()[:80]!r}"
    if ended.problem.startswith("more than") and (words[0] in LONG or "timing a few steps" in ended.err):
        ended = ended._replace(problem="")
    problem = ended.problem or ("code ran" if Path("PWNED").exists() else "")
    if not problem and not {"--force", "--remove"} & set(words) and not Path("runs/d/manifest.json").is_file():
        problem = "an artifact that was not named is gone"
    return Verdict(told.encode("utf-8", "backslashreplace").decode(), problem, ended.out + ended.err)
