"""Fixtures: small sources, poisoned datasets made once a session, an engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toys import toy_engine, toy_file, toy_source

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.data import SourceData
from bdbench.training.engine import Engine

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded sources and trained features out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=[1, 3], ids=["gray", "colour"])
def source(request: pytest.FixtureRequest) -> SourceData:
    return toy_source(channels=request.param)


@pytest.fixture
def colour_source() -> SourceData:
    return toy_source()


@pytest.fixture
def engine() -> Engine:
    return toy_engine()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DatasetArtifact:
    """The digits, BadNets at 10 %; tests only read it."""
    place = tmp_path_factory.mktemp("digits") / "runs" / "digits"
    return stages.poison("digits", "badnets", source_options={"image_size": 8}, out=place)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> DatasetArtifact:
    """120 gray 8x8 images of four classes, 12 of them poisoned, and 12 trusted ones; tests only read it."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDBENCH_CACHE", str(folder / "cache"))
        return stages.poison(toy_file(folder, train=132), "badnets", trusted=1 / 11, out=folder / "runs" / "toys")


@pytest.fixture
def toy_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy source as an .npz file."""
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    return toy_file(tmp_path)
