"""Every reader, given damaged or prepared content: what it says is right, or an error that a user can mend."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import MADE, seal_again, toy_data, toy_model

from bdbench.artifacts import store
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.artifacts.manifests import MANIFEST, Ask, read_manifest
from bdbench.artifacts.model import ModelArtifact, write_model
from bdbench.datasets import npz
from bdbench.datasets.images import Encoded, decode_readable
from bdbench.datasets.parquet import Choices, plan_parquet
from bdbench.defenses.base import Round
from bdbench.errors import ArtifactError, BdbenchError, DataError, OptionError
from bdbench.progress import Silent
from bdbench.reading import read_json, read_toml
from bdbench.sweeps.grid import read_grid
from bdbench.sweeps.records import read_record
from bdbench.training import checkpoints

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
few = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=CHECKS,
    database=None,
)
Damage = tuple[list[tuple[int, int]], int | None, bytes]
DAMAGE = st.tuples(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=4),
    st.none() | st.integers(0, 2**20),
    st.binary(max_size=8),
).filter(any)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["../x", "\x1b["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def damaged(content: bytes, damage: Damage) -> bytes:
    """Flip bits, put bytes in, cut the end off."""
    changes, end, more = damage
    changed = bytearray(content)
    for place, bits in changes:
        changed[place % len(changed)] ^= bits
    if more:
        place = (end or 0) % len(changed)
        changed[place:place] = more
    elif end is not None:
        del changed[end % len(changed) :]
    return bytes(changed)


# images and tables of images


def encoded(file_format: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"])
@few
@given(DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_pixels_or_unreadable(file_format: str, damage: Damage) -> None:
    content = damaged(encoded(file_format), damage)
    found = decode_readable([[Encoded("x", content)]], 1, None, "reading", Silent())
    assert (len(found.images), len(found.unreadable)) in ((1, 0), (0, 1))


@few
@given(DAMAGE)
def test_a_damaged_npz_has_the_same_arrays_or_is_an_error(tmp_path: Path, damage: Damage) -> None:
    images, labels = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8), np.arange(6) % 2
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    (tmp_path / "set.npz").write_bytes(damaged((tmp_path / "set.npz").read_bytes(), damage))
    with suppress(DataError):
        arrays, _ = npz._read(tmp_path / "set.npz")
        np.testing.assert_array_equal(arrays["images"], images)
        np.testing.assert_array_equal(arrays["labels"], labels)


@few
@given(DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_damaged_parquet_is_read_or_an_error(tmp_path: Path, damage: Damage) -> None:
    file = tmp_path / "set.parquet"
    images = [{"bytes": encoded("PNG"), "path": None}] * 12
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2] * 4}), file)
    file.write_bytes(damaged(file.read_bytes(), damage))
    with suppress(DataError):
        plan_parquet(file, "set", "crop", None, 0.2, Choices()).decode(Silent())


# text


@few
@given(DAMAGE)
def test_damaged_toml_and_json_are_read_or_an_error(tmp_path: Path, damage: Damage) -> None:
    (tmp_path / "x").write_bytes(damaged(b'[attack.x]\nuse = "badnets"\nrate = 0.1\ncolour = [1, 2]\n', damage))
    with suppress(OptionError):
        assert isinstance(read_toml(tmp_path / "x")[1], dict)
    (tmp_path / "x").write_bytes(damaged(b'{"a": [1, 2.5e3, "\\u00e4"], "b": null}', damage))
    with suppress(ValueError):
        read_json(tmp_path / "x")


GRID = (
    b'datasets = ["digits"]\nattacks = ["badnets", "x"]\ndefenses = ["none", "abl"]\nmodels = ["auto"]\n'
    b'seeds = [0, 1]\ntrusted = 0.05\npreset = "fast"\n[attack.x]\nuse = "sig"\nrate = 0.1\n[recipe]\nepochs = 2\n'
    b"[[exclude]]\nseed = 1\n"
)


@few
@given(DAMAGE)
def test_a_damaged_grid_is_read_or_an_error(tmp_path: Path, damage: Damage) -> None:
    (tmp_path / "x").write_bytes(damaged(GRID, damage))
    with suppress(BdbenchError):
        read_grid(tmp_path / "x")


RECORD: dict[str, Any] = {
    "name": "x", "cell": {"seed": 1}, "asked": {}, "state": "running", "seconds": 1.0, "total": 5, "done": 2,
}  # fmt: skip


@few
@given(st.sampled_from([*sorted(RECORD), "started", "reason", "evaluation"]), VALUES)
def test_a_record_of_a_sweep_is_whole_or_none(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / ".sweep" / "cells").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".sweep" / "cells" / "x.json").write_text(json.dumps(RECORD | {key: value}))
    if found := read_record(tmp_path, "x"):
        assert found["done"] / max(1, found["total"]) + found["seconds"] >= 0
        assert found["name"] == "x"


# artifacts


@pytest.fixture
def copied(toys: DatasetArtifact, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(toys.path, tmp_path / "copy")
    yield tmp_path / "copy"
    shutil.rmtree(tmp_path / "copy")


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside JSON."""
    found: list[tuple[Any, Any]] = []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        found += [(value, key), *places_in(item)]
    return found


@few
@given(DAMAGE)
def test_a_damaged_manifest_says_the_same_or_is_an_error(toys: DatasetArtifact, copied: Path, damage: Damage) -> None:
    (copied / MANIFEST).write_bytes(damaged((toys.path / MANIFEST).read_bytes(), damage))
    with suppress(ArtifactError):
        assert read_manifest(copied) == toys.manifest


@few
@given(st.integers(0, 10**6), VALUES)
def test_a_prepared_manifest_is_whole_or_an_error(toys: DatasetArtifact, copied: Path, number: int, value: Any) -> None:
    raw = copy.deepcopy(json.loads((toys.path / MANIFEST).read_text()))
    places = places_in(raw)
    container, key = places[number % len(places)]
    container[key] = value
    seal_again(copied, raw)
    with suppress(ArtifactError):
        verify(copied)


@pytest.mark.parametrize("name", ["train.safetensors", "originals.safetensors", "truth.parquet", "triggered.parquet"])
@few
@given(DAMAGE)
def test_prepared_files_of_an_artifact_are_read_or_an_error(
    toys: DatasetArtifact, copied: Path, name: str, damage: Damage
) -> None:
    (copied / name).write_bytes(damaged((toys.path / name).read_bytes(), damage))
    if (copied / name).read_bytes() != (toys.path / name).read_bytes():
        shutil.copy(toys.path / MANIFEST, copied)
        with pytest.raises(ArtifactError):
            verify(copied)
    seal_again(copied, json.loads((toys.path / MANIFEST).read_text()))
    try:
        verify(copied)
        _ = DatasetArtifact.open(copied).unpoisoned
    except ArtifactError:
        pass
    finally:
        shutil.copy(toys.path / name, copied)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelArtifact:
    """A model that would have set aside 6 of 20 samples after each of two epochs."""
    path, data = tmp_path_factory.mktemp("model") / "m", toy_data(20)
    with store.create(path, Ask("model", "abl", 1, {}, 0, {"dataset": "d"})) as draft:
        rounds = [Round("isolate", epoch, torch.arange(6) * 3) for epoch in (1, 2)]
        write_model(draft, "convnet", toy_model(data), data, [], rounds=rounds)
        draft.made |= MADE
    return ModelArtifact.open(path)


@few
@given(DAMAGE)
def test_prepared_rounds_name_samples_or_are_an_error(model: ModelArtifact, tmp_path: Path, damage: Damage) -> None:
    shutil.copytree(model.path, tmp_path / "copy", dirs_exist_ok=True)
    file = tmp_path / "copy" / "rounds.parquet"
    file.write_bytes(damaged((model.path / file.name).read_bytes(), damage))
    seal_again(file.parent, json.loads((model.path / MANIFEST).read_text()))
    with suppress(ArtifactError):
        for _, _, rows in ModelArtifact.open(file.parent).rounds_of(20):
            assert set(rows.tolist()) <= set(range(20))
            assert len(rows) == len(rows.unique())


# checkpoints


@few
@given(DAMAGE)
def test_a_damaged_checkpoint_is_the_same_state_or_none(tmp_path: Path, damage: Damage) -> None:
    torch.manual_seed(0)
    saved, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = copy.deepcopy(fresh.state_dict())
    checkpoints.save(tmp_path, "key", checkpoints.Point(7, False, [{"loss": 1.0}]), {"network": saved})
    file = tmp_path / "key.safetensors"
    file.write_bytes(damaged(file.read_bytes(), damage))
    notes: list[str] = []
    point = checkpoints.load(tmp_path, "key", {"network": fresh}, notes.append)
    expected = before if point is None else saved.state_dict()
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in expected.items())
    assert point == checkpoints.Point(7, False, [{"loss": 1.0}]) if point else notes
