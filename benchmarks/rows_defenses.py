"""Rows of defenses: what a phase costs beside plain training, SimCLR's views, trigger inversion."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import baseline
import torch
from measuring import (
    BATCH,
    CLASSES,
    SEED,
    SHAPE,
    Bench,
    Row,
    Rows,
    Turn,
    compare,
    first,
    per_second,
    pixels_last,
    summarise,
    take_turns,
)
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defense, Task
from bdbench.defenses.repair.mcldef import MCLDef
from bdbench.defenses.training.abl import ABL
from bdbench.defenses.training.cbd import CBD
from bdbench.defenses.training.dbd import DBD
from bdbench.defenses.training.plain import NoDefense
from bdbench.models.classifier import Classifier
from bdbench.registry import DEFENSES, repairs
from bdbench.training.engine import Engine
from bdbench.training.recipe import Recipe
from bdbench.training.views import contrastive_view

PHASES = {
    "epoch-none": ("none", "train"),
    "epoch-cbd": ("cbd", "clean"),
    "epoch-cbd-reweighting": ("reweighting", "clean"),
    "epoch-abl-isolate": ("abl", "isolate"),
    "epoch-abl-finetune": ("abl", "finetune"),
    "epoch-dbd-simclr": ("dbd", "simclr"),
    "epoch-dbd-mixmatch": ("dbd", "mixmatch"),
}
"""Name of the row -> defense and phase."""

COUNTED = 2 * BATCH
"""Images whose FLOPs are counted."""


SomeEngine = TypeVar("SomeEngine", bound=Engine)


@dataclass
class CountingEngine(Engine):
    """An engine that counts the FLOPs of every phase."""

    flops: dict[str, int] = field(default_factory=dict)

    def fit(self, *args: Any, phase: str, **named: Any) -> Any:  # noqa: ANN401 - as the engine's
        """Train as the engine does, under the counter."""
        with FlopCounterMode(display=False) as counter:
            trained = super().fit(*args, phase=phase, **named)
        self.flops[phase] = counter.get_total_flops()
        return trained

    def flops_per_image(self, phase: str) -> float:
        """Return the FLOPs of an image of a phase, of which the history says the images."""
        rows = [row for row in self.history if row["phase"] == phase]
        return self.flops[phase] / sum(float(row["images_per_second"]) * float(row["seconds"]) for row in rows)


def epoch_rows(bench: Bench) -> Iterator[Row]:
    """An epoch of each defense's longest phases beside an epoch of plain training, all by bdbench's engine."""
    data, few = first(bench.train, bench.sizes.epoch), first(bench.train, COUNTED)
    runs = {name: epoch_of(bench, data, defense) for name, defense in one_epoch_defenses(len(data)).items()}
    counted = {
        name: run_defense(bench, few, defense, CountingEngine(bench.device, bench.bf16, SEED))
        for name, defense in one_epoch_defenses(COUNTED).items()
    }
    measured = dict(zip(runs, take_turns(list(runs.values()), bench.sizes.rounds, bench.until), strict=True))
    plain = [speeds["train"] for speeds in measured["none"]]
    for row, (name, phase) in PHASES.items():
        own = [speeds[phase] for speeds in measured[name]]
        limit = bench.computing(counted[name].flops_per_image(phase))
        if name == "none":
            yield summarise(row, None, own, "images/s", limit=limit)
        else:
            yield summarise(row, plain, own, "images/s", limit=limit, note="baseline: epoch-none")


def one_epoch_defenses(count: int) -> dict[str, Defense]:
    """Return the defenses of `PHASES`, every phase an epoch of `count` images."""
    one_epoch = {"ssl_epochs": 1, "head_epochs": 1, "ssl_batch_size": BATCH}
    return {
        "none": NoDefense(),
        "cbd": CBD.parse({"twin_epochs": 1}),
        "reweighting": CBD.parse({"twin_epochs": 1, "information_weight": 0, "bottleneck": 0}),
        "abl": ABL.parse({"isolation_epochs": 1, "isolation_rate": 0.01, "unlearn_steps": 0}),
        "dbd": DBD.parse({**one_epoch, "steps_per_epoch": count // BATCH}),
    }


def epoch_of(bench: Bench, data: ImageDataset, defense: Defense) -> Callable[[], dict[str, float]]:
    """Return a turn that runs a defense and says the images/s of every phase."""

    def turn() -> dict[str, float]:
        history = run_defense(bench, data, defense, bench.engine()).history
        return {str(row["phase"]): float(row["images_per_second"]) for row in history}

    return turn


def run_defense(bench: Bench, data: ImageDataset, defense: Defense, engine: SomeEngine) -> SomeEngine:
    """Run a defense and return the engine, with its history."""
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")
    defense.run(Task(data, bench.model, recipe, engine))
    return engine


def repair_rows(bench: Bench) -> Iterator[Row]:
    """An epoch, or as many steps, of every registered repair beside as many plain steps, all by bdbench's engine."""
    data = first(bench.train, bench.sizes.epoch)
    suspect = bench.model("suspect").eval()
    names = repairs()
    turns = [per_image(bench, data, defense, suspect) for defense in (NoDefense(), *map(one_epoch_of(data), names))]
    plain, *measured = take_turns(turns, bench.sizes.rounds, bench.until)
    for name, own in zip(names, measured, strict=True):
        yield summarise(f"repair-{name}", plain, own, "images/s", note="baseline: plain steps")


def one_epoch_of(data: ImageDataset) -> Callable[[str], Defense]:
    """Return what makes a repair whose phases have one epoch or round, or the steps of one, over such data."""
    lengths = {"epochs": 1, "rounds": 1, "steps": len(data) // BATCH}

    def make(name: str) -> Defense:
        method: type[Defense] = DEFENSES.load(name)
        options = {option: lengths.get(option.rpartition("_")[2]) for option in method.model_fields}
        return method.parse({option: length for option, length in options.items() if length is not None})

    return make


def per_image(bench: Bench, data: ImageDataset, defense: Defense, suspect: Classifier) -> Turn:
    """Return a turn that runs a defense and says images/s over all its steps; over all it does, where it has none."""

    def turn() -> float:
        engine, begun = bench.engine(), time.perf_counter()
        recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")
        defense.run(Task(data, bench.model, recipe, engine, trusted=data, suspect=copy.deepcopy(suspect)))
        if not engine.history:
            return len(data) / (time.perf_counter() - begun)
        seconds = [float(row["seconds"]) for row in engine.history]
        images = [float(row["images_per_second"]) * float(row["seconds"]) for row in engine.history]
        return sum(images) / sum(seconds)

    return turn


def view_rows(bench: Bench) -> Iterator[Row]:
    """The views of a SimCLR step, alone and beside the whole step."""
    data = first(bench.train, bench.sizes.epoch)
    images = data.images[:BATCH].to(bench.device).float() / 255
    repeats = len(data) // BATCH

    def views() -> None:
        for _ in range(repeats):
            contrastive_view(torch.cat([images, images]))
        bench.wait()

    dbd = DBD.parse({"ssl_epochs": 1, "head_epochs": 1, "ssl_batch_size": BATCH, "steps_per_epoch": 1})
    whole = epoch_of(bench, data, dbd)
    turns = (lambda: whole()["simclr"]), per_second(repeats * BATCH, views)
    row = compare("dbd-views", turns, "images/s", bench)
    share = (row.baseline or 0) / (row.bdbench or 1)
    yield row._replace(note=f"baseline: the whole SimCLR step; its views take {share:.0%} of it")


def inversion_rows(bench: Bench) -> Iterator[Row]:
    """One epoch of trigger inversion for all classes: together, one after another, and as people write it."""
    data = first(bench.train, bench.sizes.inversion)
    suspect = bench.model("suspect").eval().to(bench.device)
    plain = bench.plain_network(normalises=True).eval().requires_grad_(False)
    images = baseline.ArrayImages(pixels_last(data.images), data.labels.tolist(), transforms.ToTensor())
    loader = DataLoader(images, batch_size=64)
    by_hand = per_second(CLASSES * len(data), lambda: baseline.invert(plain, loader, SHAPE, CLASSES, bench.device))
    for form in ("mask", "pixel"):
        method = {"inversion_epochs": 1, "form": form}
        together = inverting(bench, data, suspect, method, [None])
        turns = [inverting(bench, data, suspect, method, range(CLASSES)), together]
        limit = bench.computing(inversion_flops(bench, suspect, method))
        measured = take_turns([*turns, by_hand] if form == "mask" else turns, bench.sizes.rounds, bench.until)
        note = "baseline: the same, one class after another"
        yield summarise(f"mcldef-inversion-{form}", measured[0], measured[1], "images/s", limit=limit, note=note)
        if form == "mask":
            note = "baseline: one class after another, fp32, by hand"
            yield summarise("mcldef-inversion-plain", measured[2], measured[1], "images/s", limit=limit, note=note)


def inverting(
    bench: Bench, data: ImageDataset, suspect: Classifier, options: dict[str, Any], targets: Sequence[int | None]
) -> Turn:
    """Return a turn that inverts for each of the targets (None: all classes) and says stamped images/s."""

    def turn() -> float:
        seconds = 0.0
        for target in targets:
            engine = invert(bench.engine(), data, suspect, {**options, "oracle_target": target})
            seconds += sum(float(row["seconds"]) for row in engine.history if str(row["phase"]).startswith("invert"))
        return CLASSES * len(data) / seconds

    return turn


def invert(engine: SomeEngine, data: ImageDataset, suspect: Classifier, options: dict[str, Any]) -> SomeEngine:
    """Invert triggers, and return the engine with its history."""
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="none")
    task = Task(data, lambda _: suspect, recipe, engine, trusted=data, suspect=suspect)
    MCLDef.parse(options).run(task)
    return engine


def inversion_flops(bench: Bench, suspect: Classifier, options: dict[str, Any]) -> float:
    """Return the FLOPs of one stamped image."""
    engine = CountingEngine(bench.device, bench.bf16, SEED)
    return invert(engine, first(bench.train, 4), suspect, options).flops_per_image("invert") / CLASSES


ROWS: dict[str, Rows] = {
    "epochs": epoch_rows,
    "repairs": repair_rows,
    "dbd-views": view_rows,
    "mcldef-inversion": inversion_rows,
}
