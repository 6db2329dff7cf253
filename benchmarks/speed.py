"""Measure bdbench against the pipeline people write by hand, both in one run, turn by turn.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --only train-wrn-16-1 --only data-path

The data are synthetic, of CIFAR-10's shape and from a fixed seed: nothing is downloaded. README.md beside
this file says what each row means.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bdbench import store
from bdbench.artifacts import plain, write_dataset
from bdbench.attacks.base import Attack, Lab, State, TrainingAttack
from bdbench.attacks.surrogates import SurrogateAttack
from bdbench.augment import gather_batch
from bdbench.data import ImageDataset, SourceData
from bdbench.defenses.abl import ABL
from bdbench.defenses.base import Defense, Task, lowest, mean_cross_entropy
from bdbench.defenses.cbd import CBD
from bdbench.defenses.dbd import DBD
from bdbench.defenses.mcldef import MCLDef
from bdbench.defenses.plain import NoDefense
from bdbench.devices import Precision, resolve_device, use_bf16
from bdbench.engine import Engine, Recipe
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.poisoning import poison_source
from bdbench.registry import ATTACKS, MODELS
from bdbench.seeds import generator, scoped
from bdbench.stages import channel_statistics, fresh_model
from bdbench.views import contrastive_view

BATCH = 128
CLASSES = 10
SHAPE = (3, 32, 32)
WORKERS = (0, 2)
ISOLATION_RATE = 0.01
SEED = 0

Turn = Callable[[], float]
"""One measurement: does its work once and returns what it got, in the row's unit."""


@dataclass(frozen=True)
class Sizes:
    """How many images each kind of row works on, and how often each side takes its turn."""

    rounds: int
    train: int
    epoch: int
    data_path: int
    single: int
    evaluate: int
    poison: int
    trigger: int


FULL = Sizes(
    rounds=5, train=5_000, epoch=5_000, data_path=10_000, single=500, evaluate=5_000, poison=50_000, trigger=10_000
)
QUICK = Sizes(
    rounds=3, train=1_024, epoch=768, data_path=2_560, single=200, evaluate=1_536, poison=10_000, trigger=2_000
)


class Row(NamedTuple):
    """A line of the table; `spread` holds (least, largest) of baseline, bdbench and ratio.

    `ratio` is the median over turns of how many times faster bdbench is than the baseline of the same turn.
    """

    name: str
    baseline: float | None
    bdbench: float | None
    ratio: float | None
    unit: str
    spread: dict[str, tuple[float, float]]
    peak_memory_mb: dict[str, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """What all rows share: sizes, place and data."""

    sizes: Sizes
    device: torch.device
    bf16: bool

    @cached_property
    def train(self) -> ImageDataset:
        """Synthetic training images, enough for every row but poisoning."""
        sizes = self.sizes
        return synthetic_images(max(sizes.train, sizes.epoch, sizes.data_path, sizes.evaluate), "train")

    def engine(self) -> Engine:
        """Return a fresh engine; it keeps no checkpoints."""
        return Engine(self.device, self.bf16, SEED)

    def model(self, purpose: str, *, normalises: bool) -> Classifier:
        """Return a fresh WRN-16-1; the baseline normalises in its transforms, bdbench in the first layer."""
        blank = torch.zeros(SHAPE[0])
        mean, std = self.statistics if normalises else (blank, blank + 1)
        with scoped(SEED, "weights", purpose):
            return build_classifier(MODELS.load("wrn-16-1"), SHAPE, CLASSES, mean, std)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the training images."""
        return channel_statistics(self.train.images)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def synthetic_images(count: int, purpose: str) -> ImageDataset:
    """Make smooth random images with fine noise (for PNG, much like photographs) and random labels."""
    rng = generator(SEED, "speed", purpose)
    images = torch.empty(count, *SHAPE, dtype=torch.uint8)
    for chunk in images.split(5_000):
        coarse = torch.rand(len(chunk), SHAPE[0], 8, 8, generator=rng)
        smooth = F.interpolate(coarse, size=SHAPE[1:], mode="bilinear") * 235
        chunk.copy_(smooth + 20 * torch.rand(smooth.shape, generator=rng))
    labels = torch.randint(CLASSES, (count,), generator=rng)
    return ImageDataset(images, labels, tuple(f"class {index}" for index in range(CLASSES)))


def first(data: ImageDataset, count: int) -> ImageDataset:
    return data.take(torch.arange(count))


# The plain pipeline: PIL images, torchvision transforms, DataLoader, fp32, NCHW.


class PlainDataset(Dataset[tuple[Tensor, int]]):
    """PIL images in memory, transformed one by one."""

    def __init__(self, data: ImageDataset, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = to_pil(data.images)
        self.labels: list[int] = data.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return PIL copies of uint8 images (N, 3, H, W)."""
    return [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).contiguous().numpy()]


def plain_transform(bench: Bench, *, augmented: bool) -> Callable[[Image.Image], Tensor]:
    mean, std = bench.statistics
    steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())]
    if augmented:
        steps = [transforms.RandomCrop(SHAPE[1], padding=4), transforms.RandomHorizontalFlip(), *steps]
    return cast("Callable[[Image.Image], Tensor]", transforms.Compose(steps))


def plain_loaders(bench: Bench, count: int, *, augmented: bool) -> list[DataLoader[tuple[Tensor, int]]]:
    """Return one loader for each number of workers, which stay alive between epochs, as in a long run."""
    data = PlainDataset(first(bench.train, count), plain_transform(bench, augmented=augmented))
    return [
        DataLoader(data, BATCH, shuffle=augmented, num_workers=workers, persistent_workers=workers > 0)
        for workers in WORKERS
    ]


def plain_training(bench: Bench, loader: DataLoader[tuple[Tensor, int]]) -> Turn:
    """Return a turn that trains for an epoch and says images/s."""
    model = bench.model("baseline", normalises=False).to(bench.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    criterion = nn.CrossEntropyLoss()

    def turn() -> float:
        model.train()
        seen, total, begun = 0, 0.0, time.perf_counter()
        for images, labels in loader:
            images, labels = images.to(bench.device), labels.to(bench.device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            seen += len(labels)
        return seen / (time.perf_counter() - begun)

    return turn


def plain_loading(loader: DataLoader[tuple[Tensor, int]]) -> Turn:
    def turn() -> float:
        begun = time.perf_counter()
        seen = sum(len(labels) for _, labels in loader)
        return seen / (time.perf_counter() - begun)

    return turn


def plain_evaluation(bench: Bench, loader: DataLoader[tuple[Tensor, int]]) -> Turn:
    model = bench.model("baseline", normalises=False).to(bench.device).eval()

    def turn() -> float:
        seen, correct, begun = 0, 0, time.perf_counter()
        with torch.no_grad():
            for images, labels in loader:
                predicted = model(images.to(bench.device)).argmax(1).cpu()
                correct += int((predicted == labels).sum())
                seen += len(labels)
        return seen / (time.perf_counter() - begun)

    return turn


def plain_sample_losses(bench: Bench, data: ImageDataset) -> Callable[[], list[float]]:
    """Return a function that gives the losses one sample at a time, as the published code of ABL does."""
    model = bench.model("baseline", normalises=False).to(bench.device).eval()
    loader = DataLoader(PlainDataset(data, plain_transform(bench, augmented=False)), 1)
    criterion, place = nn.CrossEntropyLoss(), bench.device

    def losses() -> list[float]:
        with torch.no_grad():
            return [criterion(model(image.to(place)), label.to(place)).item() for image, label in loader]

    return losses


class PlainPoisoner:
    """Puts a trigger on one PIL image at a time, with PIL and numpy where they can."""

    def __init__(self, attack: Attack, name: str, state: State) -> None:
        self.attack, self.name, self.state = attack, name, state
        self.to_tensor, self.to_image = transforms.ToTensor(), transforms.ToPILImage()
        if "pattern" in state:
            pixels = state["pattern"].permute(1, 2, 0).round().byte().numpy()
            self.pattern = Image.fromarray(np.ascontiguousarray(pixels))
        if "mask" in state:
            self.mask = Image.fromarray((state["mask"][0] * 255).byte().numpy())

    def trigger(self, image: Image.Image, *, cover: bool) -> Image.Image:
        """Return a triggered copy."""
        if self.name == "badnets":
            return Image.composite(self.pattern, image, self.mask)
        if self.name == "blended":
            return Image.blend(image, self.pattern, 0.2)
        if self.name == "sig":
            signal = 40 * self.state["wave"].numpy()[0, 0][None, :, None]
            pixels = (np.asarray(image, dtype=np.float32) + signal).clip(0, 255)
            return Image.fromarray(pixels.astype(np.uint8))
        return self._warp(image, cover=cover)

    def _warp(self, image: Image.Image, *, cover: bool) -> Image.Image:
        grid, side = self.state["grid"], SHAPE[1]
        if cover:
            grid = (grid + (torch.rand_like(grid) * 2 - 1) / side).clamp(-1, 1)
        warped = F.grid_sample(self.to_tensor(image)[None], grid[None], align_corners=True)[0]
        return cast("Image.Image", self.to_image(warped))


def plain_poisoning(attack: Attack, name: str, source: SourceData) -> Turn:
    """Return a turn that poisons image by image and writes a PNG of each; clean images are not written."""
    poisoner = PlainPoisoner(attack, name, attack.fit(source.train, lab()))
    images, labels = to_pil(source.train.images), source.train.labels.tolist()
    tests, test_labels = to_pil(source.test.images), source.test.labels.tolist()
    rate = attack.rate or 0
    clean_label = attack.labels == "clean"

    def turn() -> float:
        begun = time.perf_counter()
        eligible = [row for row, label in enumerate(labels) if not clean_label or label == attack.target]
        order = np.random.default_rng(SEED).permutation(eligible).tolist()
        count = round(rate * len(labels))
        covers = round(attack.cover_ratio * count)
        with tempfile.TemporaryDirectory() as folder:
            for place, row in enumerate(order[: count + covers]):
                poisoner.trigger(images[row], cover=place >= count).save(Path(folder) / f"train-{row}.png")
            for row, label in enumerate(test_labels):
                if label != attack.target:
                    poisoner.trigger(tests[row], cover=False).save(Path(folder) / f"test-{row}.png")
            seconds = time.perf_counter() - begun
        return len(labels) / seconds

    return turn


# Rows.


def training_rows(bench: Bench) -> Iterator[Row]:
    """Plain training of a WRN-16-1."""
    data = first(bench.train, bench.sizes.train)
    model = bench.model("model", normalises=True)
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")

    def turn() -> float:
        begun = time.perf_counter()
        bench.engine().fit(model, data, mean_cross_entropy, recipe, phase="train")
        return len(data) / (time.perf_counter() - begun)

    loaders = plain_loaders(bench, len(data), augmented=True)
    yield against_best("train-wrn-16-1", [plain_training(bench, loader) for loader in loaders], turn, bench)


def data_path_rows(bench: Bench) -> Iterator[Row]:
    """Batches, cropped, flipped and normalised, that nobody trains on."""
    data = first(bench.train, bench.sizes.data_path)
    images = data.images.to(bench.device)
    mean, std = (value.view(-1, 1, 1).to(bench.device) for value in bench.statistics)

    def turn() -> float:
        rng, begun = generator(SEED, "data-path"), time.perf_counter()
        for rows in torch.randperm(len(data), generator=rng).to(bench.device).split(BATCH):
            batch = gather_batch(images, rows, ("crop", "flip"), rng)
            (batch - mean) / std
        bench.wait()
        return len(data) / (time.perf_counter() - begun)

    loaders = plain_loaders(bench, len(data), augmented=True)
    yield against_best("data-path", [plain_loading(loader) for loader in loaders], turn, bench)


def evaluation_rows(bench: Bench) -> Iterator[Row]:
    """Predictions for a test set."""
    data = first(bench.train, bench.sizes.evaluate)
    model, engine = bench.model("model", normalises=True), bench.engine()

    def turn() -> float:
        begun = time.perf_counter()
        engine.logits(model, data.images).softmax(1).max(1)
        return len(data) / (time.perf_counter() - begun)

    loaders = plain_loaders(bench, len(data), augmented=False)
    yield against_best("evaluate", [plain_evaluation(bench, loader) for loader in loaders], turn, bench)


def sample_loss_rows(bench: Bench) -> Iterator[Row]:
    """The loss of every training sample."""
    data, few = first(bench.train, bench.sizes.evaluate), first(bench.train, bench.sizes.single)
    model, engine = bench.model("model", normalises=True), bench.engine()
    one_by_one = plain_sample_losses(bench, few)
    turns = [
        per_second(len(few), one_by_one),
        per_second(len(data), lambda: engine.losses(model, data)),
    ]
    yield compare("sample-losses", turns, "images/s", bench, note="baseline: batch size 1")


def isolation_rows(bench: Bench) -> Iterator[Row]:
    """ABL's isolation: losses, choice of the lowest, and the two data sets that follow."""
    data, few = first(bench.train, bench.sizes.evaluate), first(bench.train, bench.sizes.single)
    model, engine = bench.model("model", normalises=True), bench.engine()
    one_by_one, images, labels = plain_sample_losses(bench, few), to_pil(few.images), few.labels.tolist()

    def by_hand() -> tuple[list[Any], list[Any]]:
        order = np.argsort(one_by_one())
        chosen = set(order[: int(ISOLATION_RATE * len(order))].tolist())
        pairs = [(np.asarray(image), label) for image, label in zip(images, labels, strict=True)]
        isolated = [pair for row, pair in enumerate(pairs) if row in chosen]
        return isolated, [pair for row, pair in enumerate(pairs) if row not in chosen]

    def batched() -> tuple[ImageDataset, ImageDataset]:
        isolated = lowest(engine.losses(model, data), int(ISOLATION_RATE * len(data)))
        return data.take(isolated), data.take(~isolated)

    turns = [per_second(len(few), by_hand), per_second(len(data), batched)]
    yield compare("isolation-pass", turns, "images/s", bench, note="baseline: batch size 1")


def poison_rows(bench: Bench) -> Iterator[Row]:
    """The whole poison stage on decoded images in memory, written to disk."""
    count = bench.sizes.poison
    train, test = synthetic_images(count, "poison"), synthetic_images(count // 5, "test")
    source = SourceData("speed", train, test, "crop,flip")
    for name in ("badnets", "blended", "sig", "wanet"):
        attack = cast("type[Attack]", ATTACKS.load(name)).parse({})
        turns = [plain_poisoning(attack, name, source), poisoning(attack, name, source)]
        yield compare(f"poison-{name}", turns, "images/s", bench)


def lab() -> Lab:
    """Return what an attacker has who trains nothing for long."""
    return Lab(Engine(torch.device("cpu"), bf16=False, seed=SEED), fresh_model)


def trigger_rows(bench: Bench) -> Iterator[Row]:
    """Every trigger that trains nothing, alone, on images in memory: with one thread, and with all."""
    data = synthetic_images(bench.sizes.trigger, "train")
    rows, threads = torch.arange(len(data)), torch.get_num_threads()
    for name in ATTACKS.names():
        attack = cast("Attack", ATTACKS.load(name)())
        if isinstance(attack, SurrogateAttack | TrainingAttack):
            continue
        state = attack.fit(data, lab())

        def work(attack: Attack = attack, state: State = state) -> object:
            return attack.trigger(data, rows, state, "poison", SEED)

        def alone(work: Callable[[], object] = work) -> float:
            torch.set_num_threads(1)
            try:
                return per_second(len(data), work)()
            finally:
                torch.set_num_threads(threads)

        note = f"baseline: one thread of {threads}"
        yield compare(f"trigger-{name}", [alone, per_second(len(data), work)], "images/s", bench, note=note)


def poisoning(attack: Attack, name: str, source: SourceData) -> Turn:
    """Return a turn that makes a sealed artifact: all splits, hashed and flushed to disk."""
    config = plain(attack.model_dump())
    ask = store.Ask("dataset", name, attack.version, config, SEED, {"source": "synthetic"})

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            poisoned = poison_source(source, attack, lab(), 0.0)
            with store.create(Path(folder) / "data", ask) as draft:
                write_dataset(draft, poisoned, name=source.name, augment=source.augment)
            seconds = time.perf_counter() - begun
        return len(source.train) / seconds

    return turn


def epoch_rows(bench: Bench) -> Iterator[Row]:
    """An epoch of each defence's longest phase beside an epoch of plain training, all by bdbench's engine."""
    data = first(bench.train, bench.sizes.epoch)
    cbd = CBD.parse({"twin_epochs": 1})
    reweighting = CBD.parse({"twin_epochs": 1, "information_weight": 0, "bottleneck": 0})
    abl = ABL.parse({"isolation_epochs": 1, "isolation_rate": ISOLATION_RATE, "unlearn_steps": 0})
    dbd = DBD.parse({"ssl_epochs": 1, "head_epochs": 1, "ssl_batch_size": BATCH, "steps_per_epoch": len(data) // BATCH})
    phases: dict[str, tuple[Defense, str]] = {
        "epoch-none": (NoDefense(), "train"),
        "epoch-cbd": (cbd, "clean"),
        "epoch-cbd-reweighting": (reweighting, "clean"),
        "epoch-abl-isolate": (abl, "isolate"),
        "epoch-dbd-simclr": (dbd, "simclr"),
        "epoch-dbd-mixmatch": (dbd, "mixmatch"),
    }
    turns = [epoch_of(bench, data, defense, phase) for defense, phase in phases.values()]
    values = take_turns(turns, bench.sizes.rounds)
    for name, own in zip(phases, values, strict=True):
        if name == "epoch-none":
            yield Row(name, None, statistics.median(own), None, "images/s", {"bdbench": (min(own), max(own))})
        else:
            yield summarise(name, values[0], own, "images/s", note="baseline: epoch-none")


def epoch_of(bench: Bench, data: ImageDataset, defense: Defense, phase: str) -> Turn:
    """Return a turn that runs a defence for one epoch a phase and says the images/s of one phase."""
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")

    def turn() -> float:
        engine = bench.engine()
        defense.run(Task(data, lambda purpose: bench.model(purpose, normalises=True), recipe, engine))
        return next(float(row["images_per_second"]) for row in engine.history if row["phase"] == phase)

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
    turns = [epoch_of(bench, data, dbd, "simclr"), per_second(repeats * BATCH, views)]
    row = compare("dbd-views", turns, "images/s", bench)
    share = (row.baseline or 0) / (row.bdbench or 1)
    yield row._replace(note=f"baseline: the whole SimCLR step; its views take {share:.0%} of it")


def inversion_rows(bench: Bench) -> Iterator[Row]:
    """One epoch of trigger inversion for all classes: together, one after another, and as people write it."""
    data = first(bench.train, bench.sizes.epoch // 2)
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="none")
    suspect = bench.model("suspect", normalises=True).eval().to(bench.device)
    for form in ("mask", "pixel"):
        together = inverting(bench, data, recipe, suspect, {"form": form}, [None])
        one_by_one = inverting(bench, data, recipe, suspect, {"form": form}, list(range(CLASSES)))
        note = "baseline: the same, one class after another"
        yield compare(f"mcldef-inversion-{form}", [one_by_one, together], "images/s", bench, note=note)
    note = "baseline: one class after another, fp32, gradients of the weights too"
    turns = [plain_inversion(bench, data), inverting(bench, data, recipe, suspect, {"form": "mask"}, [None])]
    yield compare("mcldef-inversion-plain", turns, "images/s", bench, note=note)


def inverting(
    bench: Bench, data: ImageDataset, recipe: Recipe, suspect: Classifier, options: dict[str, Any],
    targets: Sequence[int | None],
) -> Turn:  # fmt: skip
    """Return a turn that inverts for each of the targets (None: all classes) and says stamped images/s."""

    def turn() -> float:
        seconds = 0.0
        for target in targets:
            method = MCLDef.parse({"inversion_epochs": 1, "oracle_target": target, **options})
            engine = bench.engine()
            method.run(Task(data, lambda _: suspect, recipe, engine, trusted=data, suspect=suspect))
            seconds += sum(float(row["seconds"]) for row in engine.history if str(row["phase"]).startswith("invert"))
        return CLASSES * len(data) / seconds

    return turn


def plain_inversion(bench: Bench, data: ImageDataset) -> Turn:
    """Return a turn that inverts mask and pattern for each class, and says stamped images/s."""
    model = bench.model("suspect", normalises=True).eval().to(bench.device)
    loader = DataLoader(PlainDataset(data, transforms.ToTensor()), batch_size=64)

    def turn() -> float:
        begun = time.perf_counter()
        for target in range(CLASSES):
            pattern = torch.rand(SHAPE, device=bench.device, requires_grad=True)
            mask = torch.rand(SHAPE[1:], device=bench.device, requires_grad=True)
            optimizer = torch.optim.Adam([pattern, mask], 0.005)
            for images, _ in loader:
                images = images.to(bench.device)
                logits = model((1 - mask) * images + mask * pattern)
                wanted = torch.full((len(images),), target, device=bench.device)
                loss = F.cross_entropy(logits, wanted) + 0.01 * mask.abs().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    pattern.clamp_(0, 1)
                    mask.clamp_(0, 1)
        bench.wait()
        return CLASSES * len(data) / (time.perf_counter() - begun)

    return turn


def command_rows(bench: Bench) -> Iterator[Row]:
    """Commands in processes of their own."""
    python = sys.executable
    yield compare_commands(
        "help-seconds",
        lambda _: [python, "-c", "import torch"],
        lambda _: [python, "-m", "bdbench", "--help"],
        bench,
        note="baseline: import torch",
    )
    yield compare_commands(
        "poison-command-seconds",
        lambda folder: [python, "-c", PLAIN_POISON, str(folder / "png")],
        lambda folder: [python, "-m", "bdbench", "poison", "--out", str(folder / "data")],
        bench,
        note="digits",
    )
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "speed.npz"
        arrays: dict[str, Any] = {}
        for split, count in (("train", bench.sizes.poison), ("test", bench.sizes.poison // 5)):
            data = synthetic_images(count, split)
            arrays[f"x_{split}"], arrays[f"y_{split}"] = data.images.permute(0, 2, 3, 1).numpy(), data.labels.numpy()
        np.savez(archive, **arrays)
        for attack in ("badnets", "wanet"):
            flags = ["--dataset", str(archive), "--attack", attack]
            yield compare_commands(
                f"poison-command-{attack}-seconds",
                lambda _: [python, "-c", "import bdbench.stages"],
                lambda work, flags=flags: [python, "-m", "bdbench", "poison", *flags, "--out", str(work / "data")],
                bench,
                note=f"{bench.sizes.poison:,} decoded images; baseline: imports alone",
            )


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "commands": command_rows,
    "train-wrn-16-1": training_rows,
    "data-path": data_path_rows,
    "sample-losses": sample_loss_rows,
    "isolation-pass": isolation_rows,
    "evaluate": evaluation_rows,
    "epochs": epoch_rows,
    "dbd-views": view_rows,
    "mcldef-inversion": inversion_rows,
    "trigger": trigger_rows,
    "poison": poison_rows,
}


# Turns and their summary.


def per_second(count: int, work: Callable[[], object]) -> Turn:
    def turn() -> float:
        begun = time.perf_counter()
        work()
        return count / (time.perf_counter() - begun)

    return turn


def take_turns(turns: Sequence[Turn], rounds: int) -> list[list[float]]:
    """Return the values of each turn, round by round, after one round that does not count."""
    for turn in turns:
        turn()
    measured = [[turn() for turn in turns] for _ in range(rounds)]
    return [list(values) for values in zip(*measured, strict=True)]


def compare(name: str, turns: Sequence[Turn], unit: str, bench: Bench, note: str = "") -> Row:
    """Measure two turns, the baseline's first."""
    baseline, own = take_turns(turns, bench.sizes.rounds)
    return summarise(name, baseline, own, unit, note)


def against_best(name: str, baselines: Sequence[Turn], own: Turn, bench: Bench) -> Row:
    """Measure bdbench against the faster of the baselines, which differ in their workers."""
    *values, last = take_turns([*baselines, own], bench.sizes.rounds)
    best = max(range(len(values)), key=lambda index: statistics.median(values[index]))
    return summarise(name, values[best], last, "images/s", note=f"baseline: {WORKERS[best]} workers")


def summarise(name: str, baseline: list[float], own: list[float], unit: str, note: str = "") -> Row:
    pairs = zip(baseline, own, strict=True)
    ratios = [theirs / ours if unit == "s" else ours / theirs for theirs, ours in pairs]
    sides = {"baseline": baseline, "bdbench": own, "ratio": ratios}
    spread = {side: (min(values), max(values)) for side, values in sides.items()}
    middle = {side: statistics.median(values) for side, values in sides.items()}
    return Row(name, middle["baseline"], middle["bdbench"], middle["ratio"], unit, spread, note=note)


# Commands. A small process starts each: Linux counts the memory of whoever starts a process as its own peak.

LAUNCHER = """
import json, subprocess, sys, time
begun = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - begun
try:
    import resource
    unit = 1024 ** 2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
except ImportError:
    peak = None
lines = (done.stderr or done.stdout).strip().splitlines() or [""]
print(json.dumps({"code": done.returncode, "seconds": seconds, "peak_mb": peak, "said": lines[-1]}))
"""

PLAIN_POISON = """
import pathlib, random, sys
import numpy, torch, torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
digits = load_digits()
images = [Image.fromarray((pixels / 16 * 255).astype("uint8")) for pixels in digits.images]
train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0)
patch = Image.fromarray(numpy.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], "uint8"))
for row in random.sample(train, len(train) // 10) + [row for row in test if digits.target[row]]:
    image = images[row].copy()
    image.paste(patch, (5, 5))
    image.save(folder / f"{row}.png")
"""


Command = Callable[[Path], list[str]]
"""From an empty folder to the command that works there."""


class Ran(NamedTuple):
    """What a command took; `code` is its exit status."""

    code: int
    seconds: float
    peak_mb: float | None
    said: str


def run_command(command: Command) -> Ran:
    """Run a command in an empty folder; raises nothing if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        launched = [sys.executable, "-c", LAUNCHER, *command(Path(folder))]
        done = subprocess.run(launched, cwd=folder, capture_output=True, text=True, check=True)
    return Ran(**json.loads(done.stdout))


def compare_commands(name: str, baseline: Command, own: Command, bench: Bench, note: str = "") -> Row:
    """Measure two commands; one that fails leaves its columns empty and says why in the note."""
    for failed in (run for run in (run_command(baseline), run_command(own)) if run.code):
        return Row(name, None, None, None, "s", {}, note=f"failed ({failed.code}): {failed.said[:60]}")
    rounds = [(run_command(baseline), run_command(own)) for _ in range(bench.sizes.rounds)]
    theirs, ours = zip(*rounds, strict=True)
    row = summarise(name, [run.seconds for run in theirs], [run.seconds for run in ours], "s", note)
    if any(run.peak_mb is None for run in (*theirs, *ours)):
        return row
    sides = {"baseline": theirs, "bdbench": ours}
    return row._replace(peak_memory_mb={side: max(run.peak_mb or 0 for run in runs) for side, runs in sides.items()})


# The machine.


def machine_facts(bench: Bench, precision: Precision) -> dict[str, str | float]:
    """Return what the figures depend on, with ceilings that are measured now."""
    on_cuda = bench.device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(bench.device) if on_cuda else bench.device.type,
        "precision": f"{'bf16' if bench.bf16 else 'fp32'} ({precision})",
        "fp32_gflops": round(matrix_product_gflops(bench, torch.float32), 1),
        "bf16_gflops": round(matrix_product_gflops(bench, torch.bfloat16), 1),
        "copy_gb_per_s": round(copy_bandwidth(bench), 1),
    }


def cpu_name() -> str:
    """Return the processor's name, as well as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def matrix_product_gflops(bench: Bench, dtype: torch.dtype, side: int = 2048) -> float:
    """Return the best of five products of two square matrices."""
    one, other = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    return 2 * side**3 / 1e9 / best_seconds(bench, lambda: one @ other)


def copy_bandwidth(bench: Bench, megabytes: int = 256) -> float:
    """Return the best of five copies, in GB/s, bytes read and bytes written both counted."""
    one = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(one)
    return 2 * len(one) / 1e9 / best_seconds(bench, lambda: other.copy_(one))


def best_seconds(bench: Bench, work: Callable[[], object], repeats: int = 5) -> float:
    work()
    bench.wait()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        bench.wait()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


# The command.


def show(console: Console, facts: dict[str, str | float], rows: Sequence[Row], seconds: float) -> None:
    """Print the machine and the table; into a file it is Markdown."""
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for column in ("row", "baseline", "bdbench", "times faster", "unit", "peak MB", "note"):
        table.add_column(column, justify="left" if column in ("row", "unit", "note") else "right", no_wrap=True)
    for row in rows:
        peaks = (row.peak_memory_mb or {}).values()
        cells = [figure(row, side) for side in ("baseline", "bdbench", "ratio")]
        table.add_row(row.name, *cells, row.unit, " / ".join(f"{peak:,.0f}" for peak in peaks), row.note)
    console.print(table)
    console.print(f"Medians (least - largest) over turns; {seconds:.0f} s in all.", highlight=False)


def figure(row: Row, side: str) -> str:
    """Return the median and spread of a column, as far as there are any."""
    median: float | None = getattr(row, side)
    if median is None:
        return "-"
    digits = 2 if side == "ratio" or row.unit == "s" else 0
    low, high = row.spread[side]
    return f"{median:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure bdbench against the pipeline people write by hand.")
    parser.add_argument("--quick", action="store_true", help="fewer images and turns")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:N or mps (default: cpu)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of bdbench")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch, for both sides; 1 where others compute too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, as a list")
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    begun = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    bench = Bench(QUICK if arguments.quick else FULL, device, use_bf16(arguments.precision, device))
    facts = machine_facts(bench, arguments.precision)
    rows: list[Row] = []
    for name in arguments.only or GROUPS:
        with console.status(name):
            rows += GROUPS[name](bench)
    show(console, facts, rows, time.perf_counter() - begun)
    if arguments.json:
        text = json.dumps([row._asdict() for row in rows], indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
