"""What every row of `speed.py` is made of: sizes, synthetic data, and turns that two sides take."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import baseline
import torch
import torch.nn.functional as F
from limits import Ceilings, Limit, measure_ceilings, wait_for
from torch import Tensor, nn
from torchvision import transforms

from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.protocol.networks import channel_statistics
from bdbench.registry import MODELS
from bdbench.seeds import generator, scoped
from bdbench.training.engine import Engine

BATCH = 128
CLASSES = 10
CHANNELS, SIDE = 3, 32
SHAPE = (CHANNELS, SIDE, SIDE)
SEED = 0

Turn = Callable[[], float]
"""One measurement: does its work once and returns what it got, in the row's unit."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sizes:
    """How many images each kind of row works on, and how often each side takes its turn.

    Attributes:
        rounds: turns of each side that count.
        train, train_large: an epoch of WRN-16-1, of the larger networks.
        epoch, inversion: of a defense's phase.
        forward: passes without gradient; single: one image at a time.
        decode, png: images that bdbench decodes, and those of the PNG tree that is scaled up.
        poison: the whole poison stage; cifar: stages in processes of their own.
        sweeps: turns of whole sweeps, processes all of them, so that nothing has to warm up.
        growth: from how many images to how many.
    """

    rounds: int
    train: int
    train_large: int
    data_path: int
    epoch: int
    inversion: int
    forward: int
    single: int
    decode: int
    png: int
    trigger: int
    poison: int
    cifar: int
    sweeps: int
    growth: tuple[int, int]


FULL = Sizes(
    rounds=5, train=5_000, train_large=512, data_path=10_000, epoch=5_000, inversion=1_024, forward=5_000, single=500,
    decode=10_000, png=2_000, trigger=10_000, poison=50_000, cifar=50_000, sweeps=3,
    growth=(5_000, 50_000),
)  # fmt: skip
GPU = replace(FULL, train=50_000, train_large=50_000, epoch=20_000, inversion=2_500, forward=50_000)
"""A GPU is through 5,000 images in tens of milliseconds: whole epochs of CIFAR-10."""
QUICK = Sizes(
    rounds=3, train=1_024, train_large=128, data_path=2_560, epoch=1_024, inversion=64, forward=1_024, single=200,
    decode=2_000, png=500, trigger=1_000, poison=5_000, cifar=10_000, sweeps=1,
    growth=(1_000, 10_000),
)  # fmt: skip
QUICK_RATE = 1_150
"""Images of a training of WRN-16-1 a second where `QUICK` takes its ten minutes."""
REHEARSAL = Sizes(
    rounds=1, train=2 * BATCH, train_large=32, data_path=2 * BATCH, epoch=2 * BATCH, inversion=32, forward=2 * BATCH,
    single=10, decode=100, png=100, trigger=100, poison=200, cifar=500, sweeps=1, growth=(100, 1_000),
)  # fmt: skip
"""Enough to see that every row works; its figures mean nothing."""


def fitted(sizes: Sizes, factor: float, largest: Sizes) -> Sizes:
    """Return sizes times a factor, as far as rows that train depend on them: whole batches, at least those of a
    rehearsal, at most the largest. What commands are given to work on only shrinks.
    """

    def fit(name: str, whole: int, most: int) -> int:
        wanted: int = round(getattr(sizes, name) * factor / whole) * whole
        least: int = getattr(REHEARSAL, name)
        return max(least, min(wanted, most))

    trained = {name: fit(name, BATCH, getattr(largest, name)) for name in ("train", "epoch", "forward")}
    trained["train_large"] = fit("train_large", 32, largest.train_large)
    passed = {name: fit(name, 1, getattr(sizes, name)) for name in ("inversion", "single", "cifar")}
    few = max(REHEARSAL.growth[0], min(round(sizes.growth[0] * factor), sizes.growth[0]))
    return replace(sizes, **trained, **passed, growth=(few, 10 * few))


class Row(NamedTuple):
    """A line of the table; `spread` holds (least, largest) of baseline, bdbench and ratio.

    `ratio` is the median over turns of how many times faster bdbench is than the baseline of the same turn;
    `limit_share` what share of the machine's ceiling bdbench reaches (see `limits`), where there is one.
    """

    name: str
    baseline: float | None
    bdbench: float | None
    ratio: float | None
    unit: str
    limit_share: float | None
    spread: Mapping[str, tuple[float, float]]
    peak_memory_mb: Mapping[str, float] | None = None
    note: str = ""


@dataclass
class Bench:
    """What all rows share: sizes, place, precision and data; and until when a group takes turns (`time.monotonic`)."""

    sizes: Sizes
    device: torch.device
    bf16: bool
    until: float = math.inf

    @cached_property
    def ceilings(self) -> Ceilings:
        """What the machine can do, measured once a run."""
        return measure_ceilings(self.device, bf16=self.bf16)

    def computing(self, flops: float) -> Limit:
        """Return the limit of work that costs so many FLOPs, in bdbench's precision."""
        return Limit(flops, self.ceilings.bf16 if self.bf16 and self.ceilings.bf16 else self.ceilings.fp32)

    def copying(self, moved: float) -> Limit:
        """Return the limit of work that has to move so many bytes, reading and writing both counted."""
        return Limit(moved, self.ceilings.copy)

    @cached_property
    def train(self) -> ImageDataset:
        """Synthetic training images, enough for every row that takes its `first` ones."""
        sizes = self.sizes
        return synthetic_images(max(sizes.train, sizes.data_path, sizes.epoch, sizes.forward, 2 * BATCH), "train")

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the training images."""
        return channel_statistics(self.train.images)

    def engine(self) -> Engine:
        """Return a fresh engine; it keeps no checkpoints."""
        return Engine(self.device, self.bf16, SEED)

    def model(self, purpose: str, name: str = "wrn-16-1") -> Classifier:
        """Return a fresh network of bdbench's."""
        with scoped(SEED, "weights", purpose):
            return build_classifier(MODELS.load(name), SHAPE, CLASSES, *self.statistics)

    def plain_network(self, name: str = "wrn-16-1", *, normalises: bool = False) -> nn.Module:
        """Return the same architecture as a plain module; its images come normalised from their transforms, or not."""
        with scoped(SEED, "weights", "baseline"):
            features = MODELS.load(name)(SHAPE)
            network = baseline.classifier(features, features.size, CLASSES)
        if normalises:
            network = nn.Sequential(transforms.Normalize(*(value.tolist() for value in self.statistics)), network)
        return network.to(self.device)

    def plain_images(self, data: ImageDataset, *, augmented: bool) -> baseline.ArrayImages:
        """Return images as the baseline wants them."""
        mean, std = (value.tolist() for value in self.statistics)
        transform = baseline.transform_for(SIDE, mean, std, augmented=augmented)
        return baseline.ArrayImages(pixels_last(data.images), data.labels.tolist(), transform)

    def plain_loaders(self, data: ImageDataset, *, augmented: bool) -> dict[int, baseline.Loader]:
        """Return the baseline's loaders, by their number of workers."""
        images = self.plain_images(data, augmented=augmented)
        return baseline.loaders(images, BATCH, shuffle=augmented, pinned=self.device.type == "cuda")

    def wait(self) -> None:
        """Wait for the device."""
        wait_for(self.device)


Rows = Callable[[Bench], Iterator[Row]]
"""A group of rows."""


def synthetic_images(count: int, purpose: str, side: int = SIDE) -> ImageDataset:
    """Make smooth random images with fine noise (for PNG, much like photographs) and random labels."""
    rng = generator(SEED, "speed", purpose)
    images = torch.empty(count, CHANNELS, side, side, dtype=torch.uint8)
    for chunk in images.split(5_000):
        coarse = torch.rand(len(chunk), CHANNELS, 8, 8, generator=rng)
        smooth = F.interpolate(coarse, size=(side, side), mode="bilinear") * 235
        chunk.copy_(smooth + 20 * torch.rand(smooth.shape, generator=rng))
    labels = torch.randint(CLASSES, (count,), generator=rng)
    return ImageDataset(images, labels, tuple(f"class {index}" for index in range(CLASSES)))


def first(data: ImageDataset, count: int) -> ImageDataset:
    """Return the first images of a dataset."""
    return data.take(torch.arange(count))


def pixels_last(images: Tensor) -> baseline.Pixels:
    """Return uint8 images (N, 3, H, W) as an array (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Let bdbench keep decoded sources in a folder of the benchmark's."""
    before = os.environ.get("BDBENCH_CACHE")
    os.environ["BDBENCH_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["BDBENCH_CACHE"]
        else:
            os.environ["BDBENCH_CACHE"] = before


# Turns and their summary.


def per_second(count: int, work: Callable[[], object]) -> Turn:
    """Return a turn that does the work and says how many of `count` it did a second."""

    def turn() -> float:
        begun = time.perf_counter()
        work()
        return count / (time.perf_counter() - begun)

    return turn


def seconds_of(work: Callable[[], object]) -> Turn:
    """Return a turn that does the work and says its seconds."""

    def turn() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return turn


def take_turns(turns: Sequence[Callable[[], Result]], rounds: int, until: float = math.inf) -> list[list[Result]]:
    """Return what each turn gives, round by round, after one round that does not count.

    Of the rounds that count at least one is taken, the others as long as one more would end by `until`.
    """
    for turn in turns:
        turn()
    measured: list[list[Result]] = []
    seconds = 0.0
    while len(measured) < rounds and (not measured or time.monotonic() + seconds <= until):
        begun = time.monotonic()
        measured.append([turn() for turn in turns])
        seconds = time.monotonic() - begun
    return [list(values) for values in zip(*measured, strict=True)]


def fastest(candidates: Mapping[int, Turn]) -> int:
    """Return the key of the turn with the highest rate; each runs twice, the second time counts."""
    rates = take_turns(list(candidates.values()), 1)
    return max(zip(candidates, rates, strict=True), key=lambda item: item[1])[0]


def compare(
    name: str, turns: tuple[Turn, Turn], unit: str, bench: Bench, *, limit: Limit | None = None, note: str = ""
) -> Row:
    """Measure two turns, the baseline's first."""
    theirs, ours = take_turns(turns, bench.sizes.rounds, bench.until)
    return summarise(name, theirs, ours, unit, limit=limit, note=note)


def compare_workers(
    name: str, loaders: Mapping[int, baseline.Loader], plain: Callable[[baseline.Loader], Turn], own: Turn,
    bench: Bench, *, limit: Limit,
) -> Row:  # fmt: skip
    """Measure bdbench against the baseline with that number of workers that suits it best."""
    turns = {workers: plain(loader) for workers, loader in loaders.items()}
    workers = fastest(turns)
    return compare(name, (turns[workers], own), "images/s", bench, limit=limit, note=workers_note(workers))


def workers_note(workers: int) -> str:
    """Say which baseline was the fastest."""
    return f"baseline: {workers} workers, the best of {', '.join(map(str, baseline.WORKERS))}"


def summarise(
    name: str, theirs: Sequence[float] | None, ours: Sequence[float], unit: str, *, limit: Limit | None = None,
    note: str = "",
) -> Row:  # fmt: skip
    """Make a row of the values of each turn; a side without baseline has no ratio."""
    sides = {"bdbench": ours}
    if theirs is not None:
        sides["baseline"] = theirs
        sides["ratio"] = [times_faster(*pair, unit) for pair in zip(theirs, ours, strict=True)]
    middle = {side: statistics.median(values) for side, values in sides.items()}
    spread = {side: (min(values), max(values)) for side, values in sides.items()}
    share = None if limit is None else limit.share(middle["bdbench"], unit)
    return Row(name, middle.get("baseline"), middle["bdbench"], middle.get("ratio"), unit, share, spread, note=note)


def times_faster(theirs: float, ours: float, unit: str) -> float:
    """Return how many times faster ours is: less is better for seconds, more for rates."""
    return theirs / ours if unit == "s" else ours / theirs
