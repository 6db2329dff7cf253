"""Every method on a second device that refuses to meet the first, and steps of training that never wait for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_of
from pretend import THERE, pretended, small
from torch import Tensor
from toys import (
    ATTACK_NAMES,
    TRAINS_NOTHING,
    toy_attack,
    toy_data,
    toy_engine,
    toy_lab,
    toy_model,
    toy_recipe,
    toy_source,
)

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.models.classifier import Classifier
from bdbench.protocol.poisoning import poison_source
from bdbench.registry import DEFENSES, DETECTORS
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.training.views import contrastive_view

WHOLE: dict[str, dict[str, Any]] = {"mcldef": {"oracle_target": 0}, "anp": {"holdout": 0.7}, "rnp": {"holdout": 0.7}}
WHOLE |= {"fine-pruning": {"holdout": 0.7, "tolerance": 1.0}}
WHOLE |= {"neural-cleanse": {"oracle_target": 0}, "mcr": {"holdout": 0.7, "tolerance": 1.0}}
WHOLE |= {"unit": {"holdout": 0.7, "tolerance": 1.0, "epochs": 2}}
"""Options with which a method does not end early, having found nothing."""


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what defenses need is made once."""
    return tmp_path_factory.mktemp("needed")


@pytest.mark.parametrize("name", sorted(DEFENSES.rows))
def test_every_defense_trains_and_is_judged_there_without_waiting_in_its_steps(
    name: str, toys: DatasetArtifact, needed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bdbench.defenses.repair.mcldef.SUCCESS", 0.0)
    monkeypatch.setattr("bdbench.defenses.repair.neural_cleanse.SUCCESS", 0.0)
    method = DEFENSES.load(name)
    few = {"batch_size": 3} if method.needs_trusted else {}  # of 12 images, or of the half of them
    needs = needs_of(name, toys, needed)
    with pretended(monkeypatch) as device:
        made = stages.defend(
            toys.path, name, preset="tiny", options=small(method) | few | WHOLE.get(name, {}), out=tmp_path / name,
            **needs,
        )  # fmt: skip
        stages.evaluate(made.path, data=toys.path)
    assert device.steps >= 2 or name in TRAINS_NOTHING
    assert device.waits == []


@pytest.mark.parametrize("name", DETECTORS.names())
def test_every_detector_scans_there(name: str, toys: DatasetArtifact, tmp_path: Path, needed: Path) -> None:
    suspect = needs_of("retrain", toys, needed)["without"].with_name("toys-suspect")
    here = stages.scan(toys.path, name, suspect=suspect, out=tmp_path / "here", precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
        with pretended(patch):
            there = stages.scan(toys.path, name, suspect=suspect, out=tmp_path / "there", precision="fp32")
    assert there.samples["score"].tolist() == pytest.approx(here.samples["score"].tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ATTACK_NAMES)
def test_every_attack_poisons_there_without_waiting_in_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch) as device:
        lab = replace(toy_lab(), engine=toy_engine(device=THERE))
        poisoned = poison_source(toy_source(), toy_attack(name), lab, trusted=0.05)
    assert all(type(value) is Tensor for value in poisoned.trigger_state.values())
    assert device.waits == []


def test_a_loss_that_mixes_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data()

    def loss(model: Classifier, batch: Batch) -> Tensor:
        return (model(batch.images)[:, 0] * torch.ones(len(batch.labels))).mean()

    with pretended(monkeypatch), pytest.raises(RuntimeError, match="meets"):
        toy_engine(device=THERE).fit(toy_model(data), data, loss, toy_recipe(), phase="train")


def waits_of(work: Any, patch: pytest.MonkeyPatch) -> list[str]:
    """Where the host waits in steps whose loss does some work on the images first."""

    def loss(model: Classifier, batch: Batch) -> Tensor:
        work(batch.images)
        return mean_cross_entropy(model, batch)

    data = toy_data(48)
    with pretended(patch) as device:
        toy_engine(device=THERE).fit(toy_model(data), data, loss, toy_recipe(epochs=1), phase="train")
    return device.waits


@pytest.mark.parametrize(
    "work",
    [
        lambda images: images.sum().item(),
        lambda images: bool((images > 2).any()),
        lambda images: images.cpu(),
        lambda images: images[images > 0.5],
        lambda images: (images > 0.5).nonzero(),
        lambda images: images + torch.rand(len(images), 1, 1, 1).to(images.device),
    ],
)
def test_a_wait_in_a_step_is_seen(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(waits_of(work, monkeypatch)) == 3


def test_contrastive_views_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of(contrastive_view, monkeypatch) == []


def test_what_is_indexed_here_cannot_be_indexed_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch), pytest.raises(RuntimeError, match="meets"):
        torch.arange(3)[torch.zeros(1, dtype=torch.int64, device=THERE)]
