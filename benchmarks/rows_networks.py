"""Rows that run a network: training, the data path beside it, and passes over all samples."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import baseline
import torch
from limits import Limit, count_flops
from measuring import (
    BATCH,
    SEED,
    Bench,
    Row,
    Rows,
    Turn,
    compare,
    compare_workers,
    fastest,
    first,
    per_second,
    summarise,
    take_turns,
    workers_note,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from bdbench.data import ImageDataset, MappedFile
from bdbench.defenses.base import lowest
from bdbench.defenses.training.dbd import ranked_groups
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.augment import augmented
from bdbench.training.feeding import AHEAD
from bdbench.training.loop import mean_cross_entropy
from bdbench.training.recipe import Recipe

AUGMENT = ("crop", "flip")
ISOLATION_RATE = 0.01
CREDIBLE_RATE = 0.5
HUNDRED_EPOCHS = 100 * 50_000
COUNTED = 4
"""Images whose FLOPs are counted."""


def training_rows(network: str, bench: Bench) -> Iterator[Row]:
    """An epoch of plain training."""
    sizes = bench.sizes
    data = first(bench.train, sizes.train if network == "wrn-16-1" else sizes.train_large)
    model, plain = bench.model("model", network), bench.plain_network(network)
    optimizer = baseline.sgd(plain)

    def by_hand(loader: baseline.Loader) -> Turn:
        return per_second(len(data), lambda: baseline.train_epoch(plain, loader, optimizer, bench.device))

    own = per_second(len(data), lambda: train_epoch(bench, model, data))
    limit = bench.computing(training_flops(bench, network))
    loaders = bench.plain_loaders(data, augmented=True)
    row = compare_workers(f"train-{network}", loaders, by_hand, own, bench, limit=limit)
    seconds = HUNDRED_EPOCHS / (row.bdbench or 1)
    yield row._replace(note=f"{row.note}; at that speed 100 epochs of CIFAR-10 take {seconds:,.0f} s")


def train_epoch(bench: Bench, model: Classifier, data: ImageDataset, image_memory: int | None = None) -> None:
    """Train a model for an epoch with bdbench's engine."""
    recipe = Recipe(epochs=1, batch_size=min(BATCH, len(data)), augment=",".join(AUGMENT))
    engine = replace(bench.engine(), image_memory=image_memory)
    engine.fit(model, data, mean_cross_entropy, recipe, phase="train")


def training_rate(bench: Bench) -> float:
    """Return the images/s of a training of WRN-16-1, by a few steps after the first ones."""
    model, data = bench.model("first look"), first(bench.train, 2 * BATCH)
    turn = per_second(len(data), lambda: train_epoch(bench, model, data))  # an epoch ends with a look at its loss
    turn()
    return turn()


def streaming_rows(bench: Bench) -> Iterator[Row]:
    """An epoch on images that lie in a file and may not stay on the device, beside one on images that do."""
    held = first(bench.train, bench.sizes.train)
    model, cap = bench.model("model"), (AHEAD + 1) * BATCH * held.images[0].nbytes
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.safetensors"
        save_file({"images": held.images}, file)
        mapped = ImageDataset(load_file(file)["images"], held.labels, held.class_names, MappedFile.of(file))
        turns = (
            per_second(len(held), lambda: train_epoch(bench, model, held)),
            per_second(len(held), lambda: train_epoch(bench, model, mapped, cap)),
        )
        note = (
            f"baseline: images in memory; streamed: {held.images.nbytes / cap:.0f} times the cap of {cap / 1e6:.1f} MB"
        )
        yield compare("train-streamed", turns, "images/s", bench, note=note)


def training_flops(bench: Bench, network: str) -> float:
    """Return the FLOPs of an image in a training step."""
    model, few = bench.model("counted", network), first(bench.train, COUNTED)
    return count_flops(lambda: train_epoch(bench, model, few)) / COUNTED


def data_path_rows(bench: Bench) -> Iterator[Row]:
    """Batches, cropped, flipped and normalised, that nobody trains on."""
    data, trained = first(bench.train, bench.sizes.data_path), first(bench.train, bench.sizes.train)
    mean, std = (value.view(-1, 1, 1).to(bench.device) for value in bench.statistics)
    feed, model = bench.engine().feed(data), bench.model("model")

    def batches() -> None:
        rng = generator(SEED, "data-path")
        for taken in feed.batches(torch.randperm(len(data), generator=rng), BATCH):
            (augmented(taken, AUGMENT, rng) - mean).div_(std).contiguous(memory_format=torch.channels_last)
        bench.wait()

    def by_hand(loader: baseline.Loader) -> Turn:
        return per_second(len(data), lambda: baseline.load_epoch(loader))

    loaders = bench.plain_loaders(data, augmented=True)
    plain = {workers: by_hand(loader) for workers, loader in loaders.items()}
    workers = fastest(plain)
    training = per_second(len(trained), lambda: train_epoch(bench, model, trained))
    turns = [plain[workers], per_second(len(data), batches), training]
    theirs, ours, steps = take_turns(turns, bench.sizes.rounds, bench.until)
    share = statistics.median(step / own for step, own in zip(steps, ours, strict=True))
    note = f"{share:.1%} of a WRN-16-1 training step; {workers_note(workers)}"
    # A byte read and a float written for every value.
    yield summarise("data-path", theirs, ours, "images/s", limit=bench.copying(5 * data.images[0].numel()), note=note)


def evaluation_rows(bench: Bench) -> Iterator[Row]:
    """Predictions for a test set."""
    data = first(bench.train, bench.sizes.forward)
    model, plain, engine = bench.model("model"), bench.plain_network(), bench.engine()

    def by_hand(loader: baseline.Loader) -> Turn:
        return per_second(len(data), lambda: baseline.accuracy(plain, loader, bench.device))

    own = per_second(len(data), lambda: engine.logits(model, data.images).softmax(1).max(1))
    loaders = bench.plain_loaders(data, augmented=False)
    yield compare_workers("evaluate", loaders, by_hand, own, bench, limit=forward_limit(bench))


def sample_loss_rows(bench: Bench) -> Iterator[Row]:
    """The loss of every training sample."""
    data, few = first(bench.train, bench.sizes.forward), first(bench.train, bench.sizes.single)
    model, plain, engine = bench.model("model"), bench.plain_network(), bench.engine()
    loader = one_by_one(bench, few)
    turns = (
        per_second(len(few), lambda: baseline.losses(plain, loader, bench.device)),
        per_second(len(data), lambda: engine.losses(model, data)),
    )
    note, limit = "baseline: batch size 1", forward_limit(bench)
    yield compare("sample-losses", turns, "images/s", bench, limit=limit, note=note)


def isolation_rows(bench: Bench) -> Iterator[Row]:
    """ABL's isolation: losses, choice of the lowest, and the two datasets that follow."""
    data, few = first(bench.train, bench.sizes.forward), first(bench.train, bench.sizes.single)
    model, plain, engine = bench.model("model"), bench.plain_network(), bench.engine()
    images = bench.plain_images(few, augmented=False)
    loader = one_by_one(bench, few)

    def by_hand() -> object:
        found = baseline.losses(plain, loader, bench.device)
        return baseline.isolate(images.pixels, images.labels, found, ISOLATION_RATE)

    def batched() -> tuple[ImageDataset, ImageDataset]:
        isolated = lowest(engine.margins(model, data), int(ISOLATION_RATE * len(data)))
        return data.take(isolated), data.take(~isolated)

    turns = per_second(len(few), by_hand), per_second(len(data), batched)
    note, limit = "baseline: batch size 1", forward_limit(bench)
    yield compare("isolation-pass", turns, "images/s", bench, limit=limit, note=note)


def credibility_rows(bench: Bench) -> Iterator[Row]:
    """DBD's split before an epoch: losses of all samples, and of each class those half that keep their labels."""
    data = first(bench.train, bench.sizes.forward)
    model, plain, engine = bench.model("model"), bench.plain_network(), bench.engine()
    images = bench.plain_images(data, augmented=False)

    def split() -> tuple[Tensor, Tensor]:
        losses, credible = engine.margins(model, data), torch.zeros(len(data), dtype=torch.bool)
        for rows in ranked_groups(data.labels, "class"):
            credible[rows] = lowest(losses[rows], int(CREDIBLE_RATE * len(rows)))
        return torch.nonzero(credible).flatten(), torch.nonzero(~credible).flatten()

    def by_hand(loader: baseline.Loader) -> Turn:
        def halve() -> object:
            found = baseline.losses(plain, loader, bench.device)
            return baseline.isolate(images.pixels, images.labels, found, CREDIBLE_RATE)

        return per_second(len(data), halve)

    loaders = bench.plain_loaders(data, augmented=False)
    own = per_second(len(data), split)
    yield compare_workers("credibility-pass", loaders, by_hand, own, bench, limit=forward_limit(bench))


def one_by_one(bench: Bench, data: ImageDataset) -> baseline.Loader:
    """Return the baseline's loader of single images."""
    return DataLoader(bench.plain_images(data, augmented=False), 1)


def forward_limit(bench: Bench) -> Limit:
    """Return the limit of passes of a WRN-16-1 without gradient."""
    model, few = bench.model("counted"), first(bench.train, COUNTED)
    return bench.computing(count_flops(lambda: bench.engine().logits(model, few.images)) / COUNTED)


ROWS: dict[str, Rows] = {
    "train-wrn-16-1": partial(training_rows, "wrn-16-1"),
    "train-preact-resnet-18": partial(training_rows, "preact-resnet-18"),
    "train-resnet-18": partial(training_rows, "resnet-18"),
    "train-streamed": streaming_rows,
    "data-path": data_path_rows,
    "sample-losses": sample_loss_rows,
    "isolation-pass": isolation_rows,
    "credibility-pass": credibility_rows,
    "evaluate": evaluation_rows,
}
