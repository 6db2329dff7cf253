"""Datasets that store what differs from their source: the same images, less space, clear words without the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import are_equal, seal_again, weights_of

from bdbench import files, stages
from bdbench.artifacts import dataset
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.datasets.base import Source
from bdbench.errors import ArtifactError, DamagedError, OriginWarning

pytestmark = pytest.mark.filterwarnings("ignore::bdbench.errors.OriginWarning")


def archive(folder: Path, *, offset: int = 0) -> Path:
    """120 training and 60 test images of four classes."""
    rng = np.random.default_rng(offset)
    arrays = {}
    for split, count in (("train", 120), ("test", 60)):
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 4
    path = folder / "some.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DatasetArtifact, DatasetArtifact]:
    """A dataset with covers, whole and as differences."""
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    source = archive(tmp_path)
    whole, small = (
        stages.poison(source, "wanet", options={"rate": 0.1}, differences=small, out=tmp_path / f"small-{small}")
        for small in (False, True)
    )
    return whole, small


def test_all_that_is_read_is_equal(both: tuple[DatasetArtifact, DatasetArtifact]) -> None:
    whole, small = both
    assert small.id == whole.id
    for name in ("train", "test", "triggered", "trusted", "unpoisoned"):
        one, other = getattr(whole, name), getattr(small, name)
        assert torch.equal(one.images, other.images), name
        assert torch.equal(one.labels, other.labels), name
    assert not (small.path / "train.safetensors").exists()
    assert files.folder_bytes(small.path) < files.folder_bytes(whole.path)


def test_the_place_of_the_images_is_named_before_they_are_read(
    both: tuple[DatasetArtifact, DatasetArtifact], tmp_path: Path
) -> None:
    small = DatasetArtifact.open(both[1].path)
    (tmp_path / "some.npz").unlink()
    told = pytest.warns(OriginWarning, match=f"differs from {tmp_path / 'some.npz'}: images are read from there")
    with told, pytest.raises(ArtifactError, match="which cannot be opened"):
        _ = small.train


def test_it_is_verified_trained_on_and_judged_as_a_whole_one(
    both: tuple[DatasetArtifact, DatasetArtifact], tmp_path: Path
) -> None:
    models = []
    for data in both:
        verify(data.path)
        model = stages.defend(data.path, options={"epochs": 1}, out=tmp_path / f"{data.path.name}-model")
        rates = stages.evaluate(model.path, data=data.path).metrics
        models.append((weights_of(model.classifier()), rates))
    assert are_equal(models[0][0], models[1][0])
    assert models[0][1].equals(models[1][1])


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.full((12,), 500)},
        {"source_rows": torch.arange(-500, 0)},
        {"images": torch.zeros(3, 3, 8, 8)},
        None,
    ],
    ids=["rows", "source", "images", "none"],
)
def test_differences_that_do_not_fit_their_source_are_damage(
    both: tuple[DatasetArtifact, DatasetArtifact], change: dict[str, torch.Tensor]
) -> None:
    file = both[1].path / "delta.safetensors"
    save_file(load_file(file) | change if change else {"x": torch.zeros(1)}, file)
    seal_again(both[1].path, json.loads((both[1].path / "manifest.json").read_text()))
    with pytest.raises(DamagedError, match=r"delta\.safetensors: .*--force"):
        _ = DatasetArtifact.open(both[1].path).train


def test_a_truth_of_other_samples_is_damage(both: tuple[DatasetArtifact, DatasetArtifact]) -> None:
    for data in both:
        table = pq.ParquetFile(data.path / "truth.parquet").read()
        pq.write_table(table.slice(0, 5), data.path / "truth.parquet")
        seal_again(data.path, json.loads((data.path / "manifest.json").read_text()))
        with pytest.raises(DamagedError, match="the truth: "):
            _ = DatasetArtifact.open(data.path).unpoisoned


def test_without_its_source_it_says_so(both: tuple[DatasetArtifact, DatasetArtifact], tmp_path: Path) -> None:
    (tmp_path / "some.npz").unlink()
    shutil.rmtree(tmp_path / "cache")
    data = DatasetArtifact.open(both[1].path)
    with pytest.raises(
        ArtifactError, match=r"holds only what differs from .*some\.npz, which cannot be opened.*--differences"
    ):
        _ = data.train
    assert len(data.triggered)  # stored as a whole


def test_reading_differences_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where poisoning might have: whoever looks at a dataset did not ask for a download."""
    asked: list[Mapping[str, Any]] = []
    small = stages.poison("digits", source_options={"images": 200}, differences=True, out=tmp_path / "data")
    open_source = dataset.open_source

    def watched(dataset: str, options: Mapping[str, Any]) -> Source:
        asked.append(options)
        return open_source(dataset, options)

    monkeypatch.setattr(dataset, "open_source", watched)
    _ = DatasetArtifact.open(small.path).train
    assert [options["download"] for options in asked] == [False]


def test_another_source_in_its_place_is_noticed(both: tuple[DatasetArtifact, DatasetArtifact], tmp_path: Path) -> None:
    archive(tmp_path, offset=1)
    with pytest.raises(ArtifactError, match="has other images now"):
        _ = DatasetArtifact.open(both[1].path).test


def test_a_damaged_difference_is_noticed(both: tuple[DatasetArtifact, DatasetArtifact]) -> None:
    file = both[1].path / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed"):
        _ = DatasetArtifact.open(both[1].path).train


def test_a_part_of_a_registered_source_is_found_again(tmp_path: Path) -> None:
    small = stages.poison("digits", source_options={"images": 200}, differences=True, out=tmp_path / "data")
    assert len(DatasetArtifact.open(small.path).train) == 190
