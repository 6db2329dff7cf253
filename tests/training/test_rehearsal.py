"""Estimates before a training: right for known steps, and without any effect on what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_of
from pretend import small
from torch import Tensor
from toys import are_equal, toy_data, toy_model, toy_recipe, weights_of

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.models.classifier import Classifier
from bdbench.protocol.planning import plan_text
from bdbench.registry import DEFENSES
from bdbench.training import rehearsal
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.training.rehearsal import Rehearsal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: now[0])
    return now


def second_an_image(clock: list[float], seconds: float = 1.0) -> Any:
    """A loss that takes a second an image, or another time."""

    def loss(model: Classifier, batch: Batch) -> Tensor:
        clock[0] += seconds * len(batch.labels)
        return mean_cross_entropy(model, batch)

    return loss


@pytest.mark.parametrize(
    ("limits", "images"),
    [({}, 3 * 120), ({"rows": torch.arange(40)}, 3 * 40), ({"epoch_steps": 5}, 3 * 80), ({"max_steps": 4}, 64)],
)
def test_a_phase_is_expected_to_take_what_its_images_take(
    limits: dict[str, Any], images: int, clock: list[float]
) -> None:
    data = toy_data(120)
    engine = Rehearsal(torch.device("cpu"), bf16=False, seed=0)
    engine.fit(toy_model(data), data, second_an_image(clock), toy_recipe(epochs=3), phase="train", **limits)
    assert engine.seconds == {"train": images}


def test_short_steps_are_timed_together(clock: list[float]) -> None:
    data = toy_data(120)
    engine = Rehearsal(torch.device("cpu"), bf16=False, seed=0)
    taken = []

    def loss(model: Classifier, batch: Batch) -> Tensor:
        taken.append(len(batch.labels))
        return second_an_image(clock, 0.002)(model, batch)

    engine.fit(toy_model(data), data, loss, toy_recipe(epochs=3), phase="train")
    assert engine.seconds["train"] == pytest.approx(0.002 * 3 * 120)
    assert taken == [16] * (1 + 4 + 4)  # 4 steps of 0.032 s fit into 0.15 s


def test_what_comes_before_each_epoch_counts_with_its_passes(clock: list[float]) -> None:
    data, model = toy_data(128), toy_model(toy_data(128))
    engine = Rehearsal(torch.device("cpu"), bf16=False, seed=0)

    def embed(images: Tensor) -> Tensor:
        clock[0] += len(images) / 128
        return torch.zeros(len(images), 1)

    def before_epoch(_: int) -> None:
        clock[0] += 5
        assert engine._map(model, embed, data.images).shape == (128, 1)

    engine.fit(
        model, data, second_an_image(clock), toy_recipe(epochs=2), phase="train", before_epoch=before_epoch
    )  # fmt: skip
    assert engine.seconds["train"] == 2 * 128 + 2 * (5 + 1)
    assert engine.seconds["passes"] == 0


def test_what_comes_before_each_epoch_but_the_first_counts_too(clock: list[float]) -> None:
    data = toy_data(128)
    engine = Rehearsal(torch.device("cpu"), bf16=False, seed=0)

    def before_epoch(epoch: int) -> None:
        clock[0] += 5 * min(epoch, 1)

    for epochs, seconds in ((1, 128), (4, 4 * (128 + 5))):
        engine.fit(
            toy_model(data), data, second_an_image(clock), toy_recipe(epochs=epochs), phase=f"{epochs}",
            before_epoch=before_epoch,
        )  # fmt: skip
        assert engine.seconds[f"{epochs}"] == seconds


@pytest.mark.parametrize("name", sorted(DEFENSES.rows))
def test_an_estimate_leaves_no_trace_in_the_model(
    name: str, toys: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    method = DEFENSES.load(name)
    needs = needs_of(name, toys, tmp_path)
    options = small(method) | ({"holdout": 0.7} if "holdout" in method.model_fields else {})  # of 12 images

    def made(estimate: bool) -> ModelArtifact:
        return stages.defend(
            toys.path, name, preset="tiny", options=options, out=tmp_path / f"{estimate}",
            estimate=estimate, **needs,
        )  # fmt: skip

    first, other = made(estimate=True), made(estimate=False)
    assert are_equal(weights_of(first.classifier()), weights_of(other.classifier()))
    assert [*first.history["phase"]] == [*other.history["phase"]]


def test_the_plan_names_the_longer_phases() -> None:
    assert plan_text("cbd", {"twin": 20.0, "clean": 225.0, "passes": 0.2}) == (
        "cbd: about 4 min 05 s (twin 20 s, clean 3 min 45 s)"
    )
    assert plan_text("none", {"train": 0.2}) == "none: about 1 s"
