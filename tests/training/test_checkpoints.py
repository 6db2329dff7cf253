"""A checkpoint puts modules and optimisers back bit for bit, or does nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bdbench.training import checkpoints
from bdbench.training.checkpoints import Point

POINT = Point(5, False, [{"phase": "train", "epoch": 1, "loss": 0.1234567890123456789}])


def load(folder: Path, key: str, objects: dict[str, Any]) -> Point | None:
    return checkpoints.load(folder, key, objects, lambda _: None)


def trained(optimizer: type[torch.optim.Optimizer], seed: int, steps: int, **settings: Any) -> dict[str, Any]:
    """A small network after some steps, with its optimiser."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    rule = optimizer(model.parameters(), **settings)
    for _ in range(steps):
        take_step(model, rule)
    return {"model": model, "optimizer": rule}


def take_step(model: nn.Module, rule: torch.optim.Optimizer) -> None:
    rule.zero_grad()
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    rule.step()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    ],
)
def test_training_goes_on_bit_equal_after_a_checkpoint(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    first = trained(optimizer, 0, 3, **settings)
    checkpoints.save(tmp_path, "train", POINT, first)
    second = trained(optimizer, 1, 2, **settings)
    assert load(tmp_path, "train", second) == POINT
    for _ in range(2):
        take_step(first["model"], first["optimizer"])
        take_step(second["model"], second["optimizer"])
    for one, other in zip(first["model"].state_dict().values(), second["model"].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_that_has_not_begun_can_be_kept(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "train", POINT, trained(torch.optim.Adam, 0, 0))
    assert load(tmp_path, "train", trained(torch.optim.Adam, 0, 0)) == POINT


def test_objects_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    objects = {"model": nn.Linear(1, 1), "model2": nn.Linear(1, 1)}
    wanted = {name: item.weight.item() for name, item in objects.items()}
    checkpoints.save(tmp_path, "train", POINT, objects)
    fresh = {"model": nn.Linear(1, 1), "model2": nn.Linear(1, 1)}
    load(tmp_path, "train", fresh)
    assert {name: item.weight.item() for name, item in fresh.items()} == wanted


def test_each_phase_has_its_own_checkpoint(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "twin", POINT, {})
    assert load(tmp_path, "clean", {}) is None


def test_without_a_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    assert load(tmp_path, "train", {"model": layer}) is None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_checkpoint_cut_short_counts_as_none(tmp_path: Path, keep: int) -> None:
    checkpoints.save(tmp_path, "train", POINT, {"model": nn.Linear(2, 2)})
    file = tmp_path / "train.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    assert load(tmp_path, "train", {"model": layer}) is None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("metadata", [None, {}, {"point": "{"}, {"point": "{}"}, {"point": "3"}, {"point": '{"a": 1}'}])
def test_a_checkpoint_without_a_point_counts_as_none(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"model/weight": torch.zeros(2, 2)}, tmp_path / "train.safetensors", metadata=metadata)
    assert load(tmp_path, "train", {}) is None


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoints.save(tmp_path, "train", Point(step, False, []), {"model": nn.Linear(2, 2)})
    assert [file.name for file in tmp_path.iterdir()] == ["train.safetensors"]
    assert load(tmp_path, "train", {}) == Point(10, False, [])


def damaged(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -8, -16, 9, 20, 40, 80, 120, 200])
def test_one_flipped_bit_counts_as_no_checkpoint_and_is_told(tmp_path: Path, place: int) -> None:
    checkpoints.save(tmp_path, "train", POINT, {"model": nn.Linear(2, 2)})
    damaged(tmp_path / "train.safetensors", place)
    layer, notes = nn.Linear(2, 2), list[str]()
    before = layer.weight.clone()
    assert checkpoints.load(tmp_path, "train", {"model": layer}, notes.append) is None
    assert torch.equal(layer.weight, before)
    assert "train.safetensors is damaged and made again" in notes[0]


def test_a_checkpoint_of_another_key_counts_as_none(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "twin", POINT, {"model": nn.Linear(2, 2)})
    (tmp_path / "twin.safetensors").rename(tmp_path / "clean.safetensors")
    assert load(tmp_path, "clean", {"model": nn.Linear(2, 2)}) is None


@pytest.mark.parametrize("other", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2))])
def test_a_checkpoint_of_other_objects_counts_as_none_and_changes_nothing(tmp_path: Path, other: nn.Module) -> None:
    checkpoints.save(tmp_path, "train", POINT, {"first": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
    objects = {"first": nn.Linear(2, 2), "model": other}
    before = {name: [value.clone() for value in item.state_dict().values()] for name, item in objects.items()}
    assert load(tmp_path, "train", objects) is None
    for name, item in objects.items():
        assert all(map(torch.equal, item.state_dict().values(), before[name]))


def test_the_state_of_an_optimizer_of_other_parameters_counts_as_none(tmp_path: Path) -> None:
    saved = trained(torch.optim.Adam, 0, 2)
    checkpoints.save(tmp_path, "train", POINT, {"optimizer": saved["optimizer"]})
    other = torch.optim.Adam(nn.Linear(9, 9).parameters())
    assert load(tmp_path, "train", {"optimizer": other}) is None


def test_a_tensor_file_has_the_mode_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    checkpoints.save_tensors({"a": torch.zeros(1)}, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
