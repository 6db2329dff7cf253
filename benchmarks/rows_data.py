"""Rows without a network: decoding, poisoning, triggers, artifacts on disk, tables."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import cast

import baseline
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import (
    SEED,
    SIDE,
    Bench,
    Row,
    Rows,
    Turn,
    cache_in,
    compare,
    per_second,
    pixels_last,
    seconds_of,
    summarise,
    synthetic_images,
    take_turns,
)
from PIL import Image
from torch import Tensor

from bdbench.artifacts import manifests, store
from bdbench.artifacts.dataset import DatasetArtifact, write_dataset
from bdbench.artifacts.made import Stopwatch, plain
from bdbench.attacks.base import Attack, Lab, State, TrainingAttack
from bdbench.attacks.parts.surrogates import SurrogateAttack
from bdbench.attacks.ssba import SSBA
from bdbench.data import ImageDataset, PoisonedDataset, SourceData
from bdbench.datasets.paths import PathSource
from bdbench.progress import Silent
from bdbench.protocol import judging, metric_list, metrics
from bdbench.protocol.networks import fresh_model
from bdbench.protocol.poisoning import poison_source
from bdbench.registry import ATTACKS
from bdbench.reports import results, tables
from bdbench.training.engine import Engine

RUNS = 1_000


def decode_rows(bench: Bench) -> Iterator[Row]:
    """PNG images in a Parquet file, as Hugging Face stores them: opened the first time, and from the cache."""
    data = synthetic_images(bench.sizes.decode, "decode")
    moved = bench.copying(2 * data.images[0].nbytes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speed.parquet"
        write_parquet(data, file)
        source = PathSource.parse({"path": file})
        kept = Path(folder) / "kept"

        def first_time() -> None:
            with tempfile.TemporaryDirectory() as fresh, cache_in(Path(fresh)):
                source.load(Silent())

        def again() -> None:
            with cache_in(kept):
                source.load(Silent())

        turns = [per_second(len(data), work) for work in (partial(baseline.read_parquet, file), first_time, again)]
        plainly, decoded, cached = take_turns(turns, bench.sizes.rounds, bench.until)
    yield summarise("decode", plainly, decoded, "images/s", note="with hashing the file and storing a decoded copy")
    note = "baseline: the first opening"
    yield summarise("decode-cached", decoded, cached, "images/s", limit=moved, note=note)


def write_parquet(data: ImageDataset, file: Path) -> None:
    """Write images as PNG in the Hugging Face layout: image struct<bytes, path>, label int64."""
    encoded = [{"bytes": png(image), "path": f"{row}.png"} for row, image in enumerate(to_pil(data.images))]
    pq.write_table(pa.table({"image": encoded, "label": data.labels.numpy()}), file)


def png(image: Image.Image) -> bytes:
    """Return an image as the content of a PNG file."""
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return PIL copies of uint8 images (N, 3, H, W)."""
    return [Image.fromarray(pixels) for pixels in pixels_last(images)]


# Poisoning.


def poison_rows(bench: Bench) -> Iterator[Row]:
    """The whole poison stage on decoded images in memory, written to disk: all images, or those that differ."""
    source = synthetic_source(bench.sizes.poison)
    for name in ("badnets", "blended", "sig", "wanet"):
        attack = attack_of(name)
        plainly = plain_poisoning(attack, name, source)
        whole, differing = (poisoning(attack, name, source, differences=chosen) for chosen in (False, True))
        theirs, ours, fewer = take_turns((plainly, whole, differing), bench.sizes.rounds, bench.until)
        yield summarise(f"poison-{name}", theirs, ours, "images/s", note="every image written")
        note = "with --differences: the baseline's images written"
        yield summarise(f"poison-{name}-differences", theirs, fewer, "images/s", note=note)


def synthetic_source(count: int, side: int = SIDE) -> SourceData:
    """Return a source with a fifth as many test images."""
    train, test = synthetic_images(count, "poison", side), synthetic_images(count // 5, "test", side)
    return SourceData("speed", train, test, "crop,flip")


def attack_of(name: str) -> Attack:
    """Return an attack with its defaults."""
    return cast("type[Attack]", ATTACKS.load(name)).parse({})


def lab() -> Lab:
    """Return what an attacker has who trains nothing for long."""
    return Lab(Engine(torch.device("cpu"), bf16=False, seed=SEED), fresh_model)


def plain_trigger(attack: Attack, name: str, state: State, *, cover: bool) -> baseline.Trigger:
    """Return the baseline's form of an attack's trigger, from the pattern, wave or grid that the attack made."""
    if name == "badnets":
        mask = Image.fromarray((state["mask"][0] * 255).byte().numpy())
        return baseline.patch(to_pil(state["pattern"].round().byte()[None])[0], mask)
    if name == "blended":
        return baseline.blend(to_pil(state["pattern"].round().byte()[None])[0], attack.model_dump()["alpha"])
    if name == "sig":
        return baseline.add_wave(attack.model_dump()["delta"] * state["wave"].numpy()[0, 0])
    return baseline.warp(state["grid"], 1 / len(state["grid"]) if cover else 0.0)


def plain_poisoning(attack: Attack, name: str, source: SourceData) -> Turn:
    """Return a turn that poisons image by image and writes a PNG of each; clean images are not written."""
    state = attack.fit(source.train, lab())
    shown, cover = (plain_trigger(attack, name, state, cover=is_cover) for is_cover in (False, True))
    images, labels = to_pil(source.train.images), source.train.labels.tolist()
    tests, test_labels = to_pil(source.test.images), source.test.labels.tolist()
    count = round((attack.rate or 0) * len(labels))
    covers = round(attack.cover_ratio * count)

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settle()
            begun = time.perf_counter()
            eligible = [row for row, label in enumerate(labels) if attack.labels != "clean" or label == attack.target]
            order = np.random.default_rng(SEED).permutation(eligible).tolist()
            poisoned = dict.fromkeys(order[:count], shown) | dict.fromkeys(order[count : count + covers], cover)
            tested = [row for row, label in enumerate(test_labels) if label != attack.target]
            baseline.poison_to_png(images, poisoned, Path(folder), "train")
            baseline.poison_to_png(tests, dict.fromkeys(tested, shown), Path(folder), "test")
            seconds = time.perf_counter() - begun
        return len(labels) / seconds

    return turn


def poisoning(attack: Attack, name: str, source: SourceData, *, differences: bool = False) -> Turn:
    """Return a turn that makes a sealed artifact, hashed and flushed to disk: of all splits, or of what differs."""
    origin = {"fingerprint": source.fingerprint} if differences else None

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settle()
            begun = time.perf_counter()
            seal(poison_source(source, attack, lab(), 0.0), attack, name, Path(folder) / "data", origin)
            seconds = time.perf_counter() - begun
        return len(source.train) / seconds

    return turn


def settle() -> None:
    """Have the disk write what others left to it: a turn that flushes what it wrote would wait for that too."""
    getattr(os, "sync", lambda: None)()


def seal(
    poisoned: PoisonedDataset, attack: Attack, name: str, path: Path, origin: Mapping[str, str] | None = None
) -> None:
    """Write a dataset artifact; with an origin, what differs from it alone."""
    ask = manifests.Ask("dataset", name, attack.version, plain(attack.model_dump()), SEED, {"source": "synthetic"})
    with store.create(path, ask) as draft:
        write_dataset(draft, poisoned, name="speed", augment="crop,flip", origin=origin)
        draft.made |= Stopwatch().made()


def trigger_rows(bench: Bench) -> Iterator[Row]:
    """Every trigger that trains nothing, alone, on images in memory: with one thread, and with all."""
    data = synthetic_images(bench.sizes.trigger, "train")
    rows, threads = torch.arange(len(data)), torch.get_num_threads()
    for name in ATTACKS.names():
        if name == "none":
            continue
        attack = attack_of(name)
        if isinstance(attack, SurrogateAttack | TrainingAttack | SSBA):
            continue
        work = partial(attack.trigger, data, rows, attack.fit(data, lab()), "poison", SEED)

        def alone(work: Callable[[], object] = work) -> float:
            torch.set_num_threads(1)
            try:
                return per_second(len(data), work)()
            finally:
                torch.set_num_threads(threads)

        note = f"baseline: one thread of {threads}"
        yield compare(f"trigger-{name}", (alone, per_second(len(data), work)), "images/s", bench, note=note)


# On disk.


def artifact_rows(bench: Bench) -> Iterator[Row]:
    """A dataset artifact: sealed, and its training split opened and verified."""
    source, attack = synthetic_source(bench.sizes.poison), attack_of("badnets")
    poisoned = poison_source(source, attack, lab(), 0.0)
    few = synthetic_images(bench.sizes.png, "png")
    factor = len(poisoned.visible) / len(few)
    splits = (poisoned.visible, poisoned.test, poisoned.triggered)
    with tempfile.TemporaryDirectory() as folder:
        path, tree, saved = (Path(folder) / name for name in ("data", "png", "data.pt"))
        tensors = {f"{row}": (split.images, split.labels) for row, split in enumerate(splits)}

        def settled(work: Callable[[], object]) -> Turn:
            def turn() -> float:
                shutil.rmtree(path, ignore_errors=True)
                settle()
                return seconds_of(work)()

            return turn

        moved = bench.copying(2 * sum(split.images.nbytes for split in splits))
        turns = (
            settled(lambda: torch.save(tensors, saved)),
            settled(lambda: seal(poisoned, attack, "badnets", path)),
        )
        note = f"{len(poisoned.visible):,} images; baseline: torch.save, neither hashed nor flushed"
        yield compare("artifact-write", turns, "s", bench, limit=moved, note=note)

        write_tree(few, tree)
        reading = seconds_of(lambda: baseline.read_folder(tree))
        opening = seconds_of(lambda: DatasetArtifact.open(path).train)
        hashed = bench.copying(poisoned.visible.images.nbytes)
        note = f"{len(poisoned.visible):,} images; baseline: {len(few):,} PNG files, time scaled by {factor:g}"
        turns = (lambda: factor * reading()), opening
        yield compare("artifact-open", turns, "s", bench, limit=hashed, note=note)


def write_tree(data: ImageDataset, root: Path) -> None:
    """Write a PNG per image, one folder per class."""
    for label in range(data.num_classes):
        (root / str(label)).mkdir(parents=True)
    for row, (image, label) in enumerate(zip(to_pil(data.images), data.labels.tolist(), strict=True)):
        image.save(root / str(label) / f"{row}.png")


def table_rows(bench: Bench) -> Iterator[Row]:
    """The table of 1,000 evaluations, read from their folders."""
    with tempfile.TemporaryDirectory() as folder:
        write_evaluations(Path(folder), RUNS)
        rows = results.read_rows([Path(folder)])
        turns = [
            seconds_of(lambda: tables.render(results.read_rows([Path(folder)]), "markdown")),
            seconds_of(lambda: tables.render(rows, "markdown")),
        ]
        whole, rendering = take_turns(turns, bench.sizes.rounds, bench.until)
    alone = statistics.median(rendering)
    yield summarise("table-1000", None, whole, "s", note=f"every file verified; {alone:.2f} s of it without reading")


def write_evaluations(root: Path, count: int) -> None:
    """Write evaluations, 10 seeds of every setting: one is made, the others are copies with other facts."""
    hits = torch.arange(10_000) % 10 > 0
    rates = {name: metrics.rate(hits) for name in metric_list.RATES}
    ask = manifests.Ask("evaluation", "evaluate", 1, {}, 0, {"model": "m", "dataset": "d"})
    facts = {
        "dataset": "speed", "model": "wrn-16-1", "attack_options": {}, "defense_options": {}, "preset": "paper",
        "seconds": 100.0, "peak_memory_bytes": 2**30, "reads_truth": False, "findings": {}, "dataset_id": "d",
        "model_id": "m", "attack": "badnets", "defense": "none", "seed": 0, "attack_seed": 0, "device": "cpu",
        "precision": "fp32",
    }  # fmt: skip
    one = root / "0"
    with store.create(one, ask) as draft:
        judging.metrics_frame(rates, {}).to_parquet(draft.folder / "metrics.parquet", index=False)
        draft.facts, draft.made = facts, Stopwatch().made()
    made = manifests.read_manifest(one)
    for number in range(count):
        setting, seed = divmod(number, 10)
        attack, defense = f"attack-{setting // 5}", ("none", "abl", "cbd", "dbd", "mcldef")[setting % 5]
        asked = replace(ask, seed=seed, inputs={"model": f"m{number}", "dataset": f"d{setting // 5}"})
        said = {**facts, "dataset_id": f"{attack}-{seed}", "attack": attack, "defense": defense, "seed": seed}
        folder = root / str(number)
        folder.mkdir(exist_ok=True)
        if number:
            shutil.copy(one / "metrics.parquet", folder)
        manifest = replace(made, id=asked.id, ask=asked, facts=said)
        sealed = replace(manifest, seal=manifest.expected_seal)
        (folder / manifests.MANIFEST).write_text(json.dumps(asdict(sealed)), encoding="utf-8")


ROWS: dict[str, Rows] = {
    "decode": decode_rows,
    "artifact": artifact_rows,
    "table-1000": table_rows,
    "trigger": trigger_rows,
    "poison": poison_rows,
}
