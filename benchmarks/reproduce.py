"""Run a named suite of attacks and defenses through the Python API and keep its rows in benchmarks/results/.

    python benchmarks/reproduce.py quickstart
    python benchmarks/reproduce.py cifar10-cpu --data-root DATA
    python benchmarks/reproduce.py cifar10-paper --data-root DATA --device cuda --seconds 570
    python benchmarks/reproduce.py compare

Resumable: what is in the runs folder is reused, and an interrupted training goes on from its last checkpoint. Rows
are written after every cell, with ids, versions, hardware, seconds and the command; rows that other machines made
stay. `compare` sets the rows beside what papers and their repositories report.
"""

from __future__ import annotations

import _thread
import argparse
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import pages
import torch
from compare import compare, key, read_rows
from limits import cpu_name

from bdbench import files, stages
from bdbench.artifacts import manifests
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.attacks.parts.victims import VictimAttack
from bdbench.cli.quickstart import ATTACK_OPTIONS, METHODS
from bdbench.errors import BdbenchError
from bdbench.registry import ATTACKS, DEFENSES
from bdbench.reports import results, tables
from bdbench.training.devices import Precision

RESULTS = Path(__file__).parent / "results"
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
SCANNED: Mapping[str, Any] = MappingProxyType({"image_size": 8})
"""The digits as they were scanned."""
PROVENANCE = ("processor", "cores", "command")


class Cell(NamedTuple):
    """One model: data, attack, network, defense, budget and seed; `variant` names what is not the preset's.

    `precision` is None where `--precision` decides; `source` are options of the dataset's source beside those of the
    command.
    """

    dataset: str
    attack: str
    attack_options: Mapping[str, Any]
    model: str
    method: str
    preset: str
    seed: int = 0
    variant: str = ""
    options: Mapping[str, Any] = NO_OPTIONS
    precision: Precision | None = None
    source: Mapping[str, Any] = NO_OPTIONS

    @property
    def data_name(self) -> str:
        """The folder of its dataset: equal for cells that share one."""
        usual = {"target": 0, "rate": 0.1}
        options = usual | {name: value for name, value in self.attack_options.items() if not name.endswith("_epochs")}
        special = [f"{name}{value}" for name, value in options.items() if value not in (usual.get(name), None)]
        shown = [f"{name}{value}" for name, value in self.source.items()]
        return "-".join((self.dataset, *shown, self.attack, *special, f"s{self.seed}"))

    @property
    def name(self) -> str:
        """The folder of its model; what `bdbench train` would choose by itself has no place in it."""
        model = "" if self.model in ("convnet", "convnet-16", "wrn-16-1") else self.model
        budget = "" if self.preset in ("fast", "tiny") else self.preset
        return "-".join(filter(None, (self.data_name, model, budget, self.method, self.variant)))

    def describes(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row of the results is this cell's."""
        ours = (self.dataset, self.attack, self.model, self.method, self.preset, self.seed, self.variant)
        names = ("dataset", "attack", "model", "defense", "preset", "seed", "variant")
        same = all(row[name] == value for name, value in zip(names, ours, strict=True))
        return (
            same
            and self.attack_options.items() <= row["attack_options"].items()
            and self.options.items() <= row["defense_options"].items()
        )


CONTROL_RATE = 0.001
"""One poisoned image of the digits' 1,366: what the defenses cost where there is next to nothing to defend against."""

PRECISIONS: Sequence[Precision] = ("fp32", "bf16")

CIFAR_ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "badnets": {"rate": 0.1, "target": 0},
    "blended": {"rate": 0.1, "target": 0},
    # Clean-label: its images are from the target class alone, and 10 % of the set would be all of that class.
    "sig": {"rate": 0.05, "target": 0},
    "wanet": {"rate": 0.1, "target": 0},
}

DBD_ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "badnets": {"rate": 0.05, "target": 3, "patch": "dbd"},
    "blended": {"rate": 0.05, "target": 3, "alpha": 0.1},
    "sig": {"rate": 0.05, "target": 3},
    "wanet": {"rate": 0.05, "target": 3},
}
"""As in DBD's repository, with its two triggers (SIG and WaNet are not in it)."""

ATTACK_EPOCHS = 3
"""A quarter of the preset `fast`: what every attack gets to show itself, undefended, and what its own networks get."""

FEW, QUICK = MappingProxyType({"epochs": ATTACK_EPOCHS}), f"{ATTACK_EPOCHS}-epochs"
PLAIN = {"augment": "none"}

OWN_EPOCHS = {"lira": ("generator_epochs",), "lc": ("surrogate_epochs",)}
"""Trainings of an attack's own that take as many epochs, besides the victim's (the plain surrogate is shared: 10)."""

DOUBTS: Mapping[str, Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]] = {
    "badnets": (
        (f"{QUICK}-no-augment", {"rate": 0.01}, {**FEW, **PLAIN}),
        ("no-augment", {"rate": 0.01}, PLAIN),
    ),
    "ftrojan": (
        (f"{QUICK}-no-augment", {}, {**FEW, **PLAIN}),
        (f"{QUICK}-strong", {"magnitude": 90.0}, FEW),
        ("", {}, {}),
    ),
    "ssba": ((f"{QUICK}-no-augment", {}, {**FEW, **PLAIN}),),
    "fc": (
        (f"{QUICK}-no-augment", {}, {**FEW, **PLAIN}),
        (f"{QUICK}-adversarial", {"surrogate_adversarial": True, "surrogate_epochs": ATTACK_EPOCHS}, FEW),
    ),
    "bpp": ((f"{QUICK}-no-covers", {"cover_ratio": 0.0}, FEW), ("", {}, {})),
}
"""Weak after so few epochs: what may be why. Variant, options of the attack, options of the training."""

RATES: Mapping[str, Sequence[float]] = {
    "badnets": (0.01, 0.005), "blended": (0.01, 0.005), "adap-blend": (0.01, 0.005), "lc": (0.01, 0.005),
    "adap-patch": (0.01,), "adap-kway": (0.01,), "tact": (0.02,),
}  # fmt: skip
"""Rates beside the default: lower ones, and higher ones where the default, 0.3 %, is weak after so few epochs.

They get the whole preset: a quarter of it sees so few poisoned samples too seldom to show anything.
"""

PAPER_TWIN = {"twin_step_limit": 0, "twin_schedule": "constant", "twin_augment": "auto", "twin_judges": "batch"}

PUBLISHED_UNLEARNING = {
    "objective": "ascent", "unlearn_steps": 32, "unlearn_lr": 5e-4, "unlearn_stop": 1000.0,
    "unlearn_momentum": "kept", "unlearn_weight_decay": 1e-4,
}  # fmt: skip
"""The dose of ABL's code in place of bdbench's own."""

PAPER_ISOLATION = {"isolation_epochs": 20}
"""For the attacks of which ABL isolates the wrong samples in the few epochs of `fast`."""

ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cbd": {
        "": {},
        "no-information": {"information_weight": 0.0},
        "no-bottleneck": {"bottleneck": 0.0},
        "no-reweight": {"reweight": False},
        "reweighting-only": {"information_weight": 0.0, "bottleneck": 0.0},
        "paper-twin": PAPER_TWIN,
    },
    "abl": {"sample-cap": {"unlearn_cap": "sample"}, "published-unlearning": PUBLISHED_UNLEARNING},
    "dbd": {
        "": {},
        "ssl20": {"ssl_epochs": 20},
        "ssl5": {"ssl_epochs": 5},
        "ssl2": {"ssl_epochs": 2},
        "split-all": {"split_by": "all"},
    },
    "mcldef": {
        "": {},
        "given-target": {"oracle_target": 0},
        "mask": {"form": "mask"},
        "clean-norms": {"clean_norms": True},
        "clean-weight": {"clean_weight": 1.0},
    },
}


def suites() -> dict[str, list[Cell]]:
    """Return the cells of every suite."""
    return {
        "quickstart": [
            Cell("digits", "badnets", ATTACK_OPTIONS, "convnet-16", method, "tiny", seed)
            for seed in range(5)
            for method in METHODS
        ],
        "control": [
            Cell(
                "digits",
                "badnets",
                {"margin": 1, "rate": CONTROL_RATE},
                "convnet",
                method,
                "tiny",
                seed,
                source=SCANNED,
            )
            for seed in range(3)
            for method in METHODS
        ],
        "precision": [
            Cell("digits", attack, {"rate": 0.1}, "convnet", "none", "tiny", seed, given, NO_OPTIONS, given, SCANNED)
            for attack in ("badnets", "blended")
            for given in PRECISIONS
            for seed in range(3)
        ],
        # Before the attack the images are the same for all: one `clean` is enough.
        "cifar10-cpu": [
            cifar(attack, method, "fast")
            for attack in CIFAR_ATTACKS
            for method in (*METHODS, *(["clean"] if attack == "badnets" else []))
        ],
        "cifar10-budget": [cifar("badnets", method, "paper") for method in ("none", "abl", "cbd", "mcldef")],
        "cifar10-paper": [cell for seed in range(3) for attack in CIFAR_ATTACKS for cell in papers(attack, seed)],
        "attacks": [cell for attack in ATTACKS.names() if attack != "none" for cell in undefended(attack)],
        "ablation": [cell for attack in CIFAR_ATTACKS for cell in ablation(attack)],
    }


def cifar(
    attack: str, method: str, preset: str, seed: int = 0, variant: str = "", options: Mapping[str, Any] = NO_OPTIONS
) -> Cell:
    """Return a cell on CIFAR-10 and WRN-16-1."""
    return Cell("cifar10", attack, CIFAR_ATTACKS[attack], "wrn-16-1", method, preset, seed, variant, options)


def papers(attack: str, seed: int) -> list[Cell]:
    """Return the cells of the papers' budgets: all but DBD on WRN-16-1, DBD on ResNet-18 in its authors' setting."""
    cells = [cifar(attack, method, "paper", seed) for method in METHODS if method != "dbd"]
    settings = DBD_ATTACKS[attack]
    return cells + [Cell("cifar10", attack, settings, "resnet-18", method, "paper", seed) for method in ("none", "dbd")]


def undefended(attack: str) -> list[Cell]:
    """Return an attack without defense: its own settings, other rates, the whole preset, its own victim if any."""
    usual = ATTACKS.load(attack)()
    victim = isinstance(usual, VictimAttack)
    trained = dict.fromkeys((*(("victim_epochs",) if victim else ()), *OWN_EPOCHS.get(attack, ())), ATTACK_EPOCHS)
    default = {name: getattr(usual, name) for name in ("rate", "class_rate", "target")} | trained
    own = {name: value for name, value in default.items() if value is not None}
    cells = [Cell("cifar10", attack, own, "wrn-16-1", "none", "fast", 0, QUICK, FEW)]
    for rate in RATES.get(attack, ()):
        options = {"rate": rate, "target": usual.target} | trained
        cells.append(Cell("cifar10", attack, options, "wrn-16-1", "none", "fast"))
    for variant, changed, training in DOUBTS.get(attack, ()):
        cells.append(Cell("cifar10", attack, {**own, **changed}, "wrn-16-1", "none", "fast", 0, variant, training))
    if victim:
        cells.append(Cell("cifar10", attack, own, "wrn-16-1", "victim", "attacker"))
    return cells


def ablation(attack: str) -> list[Cell]:
    """Return the cells that show what each term does; ABL's row holds the precision of its isolation."""
    cells = [cifar(attack, method, "fast") for method in ("none", "abl")]
    if attack in ("badnets", "blended"):
        for method, variants in ABLATIONS.items():
            cells += [cifar(attack, method, "fast", 0, *variant) for variant in variants.items()]
    else:
        cells.append(cifar(attack, "abl", "fast", 0, "paper-isolation", PAPER_ISOLATION))
    return cells


class Settings(NamedTuple):
    """Where artifacts lie and how cells are computed."""

    runs: Path
    source: Mapping[str, Any]
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool = False


def run(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Run or reuse a cell and return its row."""
    runs, device, precision = settings.runs, settings.device, cell.precision or settings.precision
    data = stages.poison(
        cell.dataset, cell.attack, options=cell.attack_options, source_options={**settings.source, **cell.source},
        seed=cell.seed, out=runs / cell.data_name, device=device, precision=precision,
    )  # fmt: skip
    if cell.method == "victim":
        model = ModelArtifact.open(data.path.with_name(f"{data.path.name}-victim"))
    else:
        model = trained(cell, data, settings)
    row = results.evaluation_row(stages.evaluate(model.path, data=data.path, device=device, precision=precision))
    made = model.manifest.made
    return row | {"variant": cell.variant, "made": made, "processor": processor(), "cores": os.cpu_count()}


def trained(cell: Cell, data: DatasetArtifact, settings: Settings) -> ModelArtifact:
    """Train or reuse the model of a cell."""
    runs, suspect = settings.runs, None
    computing: dict[str, Any] = {
        "device": settings.device, "precision": cell.precision or settings.precision, "compile": settings.compile,
    }  # fmt: skip
    if DEFENSES.load(cell.method).needs_suspect:
        undefended = cell._replace(method="none", variant="", options=NO_OPTIONS)
        suspect = stages.defend(
            data.path, "none", model=cell.model, preset=cell.preset, out=runs / undefended.name, **computing,
        ).path  # fmt: skip
    return stages.defend(
        data.path, cell.method, model=cell.model, preset=cell.preset, options=cell.options, suspect=suspect,
        out=runs / cell.name, **computing,
    )  # fmt: skip


def processor() -> str:
    """Return the name of the CPU and what it accelerates."""
    return f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the old rows with those of `new` in their place or behind them.

    Old rows keep their DER and marks: these were computed against their own undefended row, which may be gone. A new
    row whose model was not made anew keeps what the old row says about the machine that made it.
    """
    before = {key(row): row for row in old}
    fresh = []
    for row in new:
        known = before.pop(key(row), None)
        same = known is not None and known["made"] == row["made"]
        fresh.append(row | {name: known[name] for name in PROVENANCE} if known is not None and same else row)
    marked = results.mark_rows([*before.values(), *fresh])[len(before) :]
    return list(({key(row): row for row in old} | {key(row): row for row in marked}).values())


def command(suite: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Return what makes a row again."""
    return {"command": f"python benchmarks/reproduce.py {suite}{' --compile' * row['made'].get('compiled', False)}"}


def keep(suite: str, new: Sequence[dict[str, Any]], failures: Mapping[str, str], results: Path) -> None:
    """Write the rows as CSV, every single run, and as Markdown, one line for all seeds, in the order of the suite."""
    results.mkdir(parents=True, exist_ok=True)
    table, text = results / f"{suite}.csv", results / f"{suite}.md"
    made = [{name: item for name, item in row.items() if name != "path"} | command(suite, row) for row in new]
    cells = suites()[suite]
    rows = sorted(
        merge(read_rows(table), made),
        key=lambda row: next((index for index, cell in enumerate(cells) if cell.describes(row)), len(cells)),
    )
    parts = []
    if rows:
        with files.replace_file(table) as path:
            path.write_text(str(tables.render(rows, "csv")))
        named = [row | {"defense": f"{row['defense']} {row['variant']}".strip()} for row in rows]
        parts.append(str(tables.render(named, "markdown")))
    if failures:
        parts.append("## Failed\n\n" + "\n".join(f"- `{name}`: {message}" for name, message in failures.items()))
    with files.replace_file(text) as path:
        path.write_text("\n\n".join(parts) + "\n")


def read_failures(path: Path) -> dict[str, str]:
    """Return the failures that a Markdown file of `keep` lists."""
    return dict(re.findall(r"(?m)^- `(.+?)`: (.+)$", path.read_text())) if path.exists() else {}


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread when the time is up."""
    # A job that a shell put in the background ignores the signal, and the timer with it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


def run_all(suite: str, cells: Sequence[Cell], settings: Settings, results: Path, seconds: float) -> int:
    """Run cells one after the other and keep their rows; return the exit code."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    failures = read_failures(results / f"{suite}.md")
    try:
        with interrupted_after(seconds) if math.isfinite(seconds) else nullcontext():
            for number, cell in enumerate(cells, 1):
                if time.monotonic() >= end:
                    raise KeyboardInterrupt  # noqa: TRY301 - the same way out as in the middle of a cell
                print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
                try:
                    row = run(cell, settings)
                    rows.append(row)
                    failures.pop(cell.name, None)
                    print("  " + "  ".join(f"{name} {row[name]:.4g}" for name in ("ba", "asr", "floor", "seconds")))
                except BdbenchError as error:
                    failures[cell.name] = " ".join(str(error).split())
                    print(f"  failed: {error}", flush=True)
                keep(suite, rows, failures, results)
    except KeyboardInterrupt:
        if time.monotonic() < end:
            raise
        print("time is up; run the same command again", flush=True)
        return 0
    print(f"done: {len(rows)} of {len(cells)} cells", flush=True)
    return 0 if len(rows) == len(cells) else 1


def state(cell: Cell, runs: Path) -> str:
    """Say what of a cell is in the runs folder."""
    found = {
        "evaluated": manifests.is_artifact(runs / f"{cell.name}-eval"),
        "trained": manifests.is_artifact(runs / cell.name),
        "interrupted": (runs / f".{cell.name}.work").exists(),
        "poisoned": manifests.is_artifact(runs / cell.data_name),
    }
    return next((name for name, there in found.items() if there), "-")


SWEEP = "repairs"
"""Results of the sweep of `repairs.toml`, of the form of a suite's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=[*suites(), "compare"], metavar="SUITE", help=", ".join(suites()))
    parser.add_argument("--data-root", type=Path, help="folder of local copies of named datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the artifacts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--compile", action="store_true", help="let torch compile the networks that are trained")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, within a cell too")
    parser.add_argument("--only", action="append", default=[], metavar="SUBSTRING", help="cells whose name has it")
    parser.add_argument("--missing", action="store_true", help="only cells that have no row in the results yet")
    parser.add_argument("--list", action="store_true", help="print the cells and what of them is there; run nothing")
    given = parser.parse_args(arguments)
    suite, *others = given.suites
    if suite == "compare":
        pages.write(given.results)
        return compare(given.results, others or [*suites(), SWEEP])
    if others:
        parser.error("one suite at a time")
    cells = [cell for cell in suites()[suite] if not given.only or any(part in cell.name for part in given.only)]
    if not cells:
        parser.error(f"no cell of {suite} has {' or '.join(given.only)} in its name; --list prints the names")
    there = read_rows(given.results / f"{suite}.csv")
    has_row = {cell.name: any(cell.describes(row) for row in there) for cell in cells}
    if given.missing:
        cells = [cell for cell in cells if not has_row[cell.name]]
    if given.list:
        for cell in cells:
            print(f"{state(cell, given.runs):<12} {'row' if has_row[cell.name] else '-':<4} {cell.name}")
        return 0
    source = {"data_root": given.data_root} if given.data_root else {}
    settings = Settings(given.runs, source, given.device, given.precision, given.compile)
    return run_all(suite, cells, settings, given.results, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
