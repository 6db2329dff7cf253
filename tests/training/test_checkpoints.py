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
    assert checkpoints.load(tmp_path, "train", second) == POINT
    for _ in range(2):
        take_step(first["model"], first["optimizer"])
        take_step(second["model"], second["optimizer"])
    for one, other in zip(first["model"].state_dict().values(), second["model"].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_that_has_not_begun_can_be_kept(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "train", POINT, trained(torch.optim.Adam, 0, 0))
    assert checkpoints.load(tmp_path, "train", trained(torch.optim.Adam, 0, 0)) == POINT


def test_objects_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    objects = {"model": nn.Linear(1, 1), "model2": nn.Linear(1, 1)}
    wanted = {name: item.weight.item() for name, item in objects.items()}
    checkpoints.save(tmp_path, "train", POINT, objects)
    fresh = {"model": nn.Linear(1, 1), "model2": nn.Linear(1, 1)}
    checkpoints.load(tmp_path, "train", fresh)
    assert {name: item.weight.item() for name, item in fresh.items()} == wanted


def test_each_phase_has_its_own_checkpoint(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "twin", POINT, {})
    assert checkpoints.load(tmp_path, "clean", {}) is None


def test_without_a_checkpoint_nothing_is_changed(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    assert checkpoints.load(tmp_path, "train", {"model": layer}) is None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_checkpoint_cut_short_counts_as_none(tmp_path: Path, keep: int) -> None:
    checkpoints.save(tmp_path, "train", POINT, {"model": nn.Linear(2, 2)})
    file = tmp_path / "train.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    assert checkpoints.load(tmp_path, "train", {"model": layer}) is None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("metadata", [None, {}, {"point": "{"}, {"point": "{}"}, {"point": "3"}, {"point": '{"a": 1}'}])
def test_a_checkpoint_without_a_point_counts_as_none(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"model/weight": torch.zeros(2, 2)}, tmp_path / "train.safetensors", metadata=metadata)
    assert checkpoints.load(tmp_path, "train", {}) is None


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoints.save(tmp_path, "train", Point(step, False, []), {"model": nn.Linear(2, 2)})
    assert [file.name for file in tmp_path.iterdir()] == ["train.safetensors"]
    assert checkpoints.load(tmp_path, "train", {}) == Point(10, False, [])
