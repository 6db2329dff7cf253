"""Images that do not fit are streamed: the same batches, the same models, and clear words when it cannot be."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import are_equal, toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench import stages
from bdbench.data import ImageDataset, MappedFile
from bdbench.errors import ArtifactError, OptionError
from bdbench.progress import Silent
from bdbench.seeds import generator
from bdbench.training.devices import memory_for_images
from bdbench.training.engine import Engine
from bdbench.training.feeding import AHEAD, Feed
from bdbench.training.loop import mean_cross_entropy

CPU = torch.device("cpu")
IMAGE = 3 * 8 * 8
"""Bytes of a toy image."""


def feed_of(data: ImageDataset, *, streamed: bool, size: int = 16) -> Feed:
    """A feed that holds all images, or no more than it needs to stream batches of a size."""
    feed = Feed(data, CPU, (AHEAD + 1) * size * IMAGE if streamed else data.images.nbytes)
    assert feed.streamed == streamed
    return feed


def mapped(folder: Path, data: ImageDataset) -> ImageDataset:
    """The same dataset, its images mapped from a file."""
    path = folder / "train.safetensors"
    save_file({"images": data.images}, path)
    return ImageDataset(load_file(path)["images"], data.labels, data.class_names, MappedFile.of(path))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("rows", "sizes"), [(48, [16, 16, 16]), (50, [16, 16, 16, 2]), (3, [3]), (0, [])])
def test_batches_hold_the_images_of_their_rows_in_order(streamed: bool, rows: int, sizes: list[int]) -> None:
    data = toy_data(60)
    order = torch.randperm(60, generator=generator(0, "order"))[:rows]
    batches = [batch for batch in feed_of(data, streamed=streamed).batches(order, 16) if len(batch)]
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat([data.images[:0], *batches]), data.images[order])


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_taken_is_a_copy(streamed: bool) -> None:
    data = toy_data(60)
    before = data.images.clone()
    feed_of(data, streamed=streamed).take(torch.arange(5)).zero_()
    assert torch.equal(data.images, before)


def test_a_data_set_of_just_the_limit_is_not_streamed() -> None:
    data = toy_data(60)
    assert not Feed(data, CPU, 60 * IMAGE).streamed
    assert Feed(data, CPU, 60 * IMAGE - 1).streamed


@pytest.mark.parametrize("augment", ["none", "crop,flip"])
def test_streaming_trains_a_bit_equal_model(tmp_path: Path, augment: str) -> None:
    data = mapped(tmp_path, toy_data(60))
    weights = [
        weights_of(
            toy_engine(image_memory=memory).fit(
                toy_model(data), data, mean_cross_entropy, toy_recipe(augment=augment), phase="train"
            )
        )
        for memory in (None, (AHEAD + 1) * 16 * IMAGE)
    ]
    assert are_equal(*weights)


def test_rows_are_all_that_is_trained_on() -> None:
    """And the result is that of a dataset of these rows alone."""
    data, rows = toy_data(60), torch.arange(10, 51)
    part = data.take(rows)
    models = [
        toy_engine().fit(toy_model(data), given, mean_cross_entropy, toy_recipe(), phase="train", rows=chosen)
        for given, chosen in ((data, rows), (part, None))
    ]
    assert are_equal(*(weights_of(model) for model in models))


def test_a_limit_below_the_batches_says_how_much_is_needed() -> None:
    data = toy_data(60)
    need = (AHEAD + 1) * 16 * IMAGE
    with pytest.raises(OptionError, match=r"3 batches of 16, 192 bytes each; raise --image-memory") as said:
        list(Feed(data, CPU, need - 1).batches(torch.arange(60), 16))
    found = re.search(r"to at least (\S+) or lower the batch size", str(said.value))
    assert found is not None
    assert need <= int(float(found[1]) * 1e9) <= need + 10**6


def test_the_limit_that_is_advised_is_enough() -> None:
    """Of a size that six digits would round down."""
    data = toy_data(400, 3, 64)
    need = (AHEAD + 1) * 128 * data.images[0].nbytes
    assert float(f"{need / 1e9:g}") * 1e9 < need
    with pytest.raises(OptionError) as said:
        list(Feed(data, CPU, need - 1).batches(torch.arange(400), 128))
    found = re.search(r"to at least (\S+) or", str(said.value))
    assert found is not None
    list(Feed(data, CPU, int(float(found[1]) * 1e9)).batches(torch.arange(400), 128))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("change", ["cut", "rewritten", "gone"])
def test_a_file_that_changes_is_noticed_before_it_is_read(tmp_path: Path, streamed: bool, change: str) -> None:
    data = mapped(tmp_path, toy_data(60))
    batches = feed_of(data, streamed=streamed).batches(torch.arange(60), 16)
    next(batches)
    file = tmp_path / "train.safetensors"
    if change == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif change == "rewritten":
        os.utime(file, ns=(0, 0))
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match=r"train\.safetensors changed or went while it was in use"):
        list(batches)


class Spoiler(Silent):
    """Touches a file when the second epoch is over, and keeps what it was told of the images."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.told = file, list[int]()

    def advance(self, amount: int, text: str = "") -> None:
        self.told.append(amount)
        if self.file and text.startswith("epoch 2"):
            os.utime(self.file, ns=(0, 0))


def test_a_run_goes_on_when_its_file_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdbench.stages.models.Engine", partial(Engine, checkpoint_seconds=0.0))
    data = stages.poison("digits", out=tmp_path / "data")
    file = data.path / "train.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    run = partial(stages.defend, data.path, options={"epochs": 4, "batch_size": 32})
    with pytest.raises(ArtifactError, match="changed or went"):
        run(out=tmp_path / "model", progress=Spoiler(file))
    os.utime(file, ns=times)
    watch = Spoiler()
    resumed = run(out=tmp_path / "model", progress=watch)
    assert watch.told[0] == 2 * len(data.train)
    # Far less than the images need, more than three batches of 32 images of 256 bytes.
    other = run(out=tmp_path / "other", image_memory=4e-5)
    assert are_equal(weights_of(resumed.classifier()), weights_of(other.classifier()))


@pytest.mark.parametrize("method", ["oracle", "abl", "cbd", "dbd"])
def test_every_training_defense_takes_streamed_images(tmp_path: Path, method: str) -> None:
    data = stages.poison("digits", out=tmp_path / "data")
    small = {"epochs": 1} | {
        "abl": {"isolation_epochs": 1, "unlearn_steps": 2, "unlearn_step_limit": 0},
        "cbd": {"twin_epochs": 1},
    }.get(method, {})
    small |= {"ssl_epochs": 1, "head_epochs": 1, "steps_per_epoch": 4} if method == "dbd" else {}
    models = [
        stages.defend(data.path, method, options=small, out=tmp_path / name, image_memory=memory)
        for name, memory in (("held", None), ("streamed", 5e-5))
    ]
    assert are_equal(*(weights_of(model.classifier()) for model in models))


def test_the_cpu_offers_half_of_its_memory() -> None:
    assert memory_for_images(CPU) > 1e8


def test_an_engine_feeds_the_same_data_from_one_copy() -> None:
    engine, data = toy_engine(), toy_data(60)
    assert engine.feed(data) is engine.feed(data)
    assert engine.feed(toy_data(60)) is not engine.feed(data)


def test_a_file_that_changed_is_noticed_before_losses_are_taken(tmp_path: Path) -> None:
    data = mapped(tmp_path, toy_data(60))
    os.utime(tmp_path / "train.safetensors", ns=(0, 0))
    with pytest.raises(ArtifactError, match="changed or went"):
        toy_engine().losses(toy_model(data), data)
