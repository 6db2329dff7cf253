"""MM-BM and UNIT: costs, first bounds and choice by hand, and both on a small backdoored model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backdoored import Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_data, toy_engine, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended
from bdbench.defenses.parts.bounding import Bounds, bounded
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.mm_bm import MMBM, Tightening, first_of_each
from bdbench.defenses.repair.unit import UNIT, Narrowing, first_bounds
from bdbench.errors import OptionError

RELU = "features.layers.2"
ONCE = {"schedule": "constant", "augment": "none"}


def narrow(patience: int = 2, epochs: int = 9) -> Narrowing:
    return Narrowing(bounded(copied(suspect_model()), [RELU], "place", (3, 8, 8)), 1.0, patience, epochs)


def tighten(epochs: int = 5) -> Tightening:
    return Tightening(bounded(copied(suspect_model()), [RELU], "channel", (3, 8, 8)), 1.0, epochs)


def mm_bm(engine: Watched | None = None, trusted: ImageDataset | None = None, **options: Any) -> Defended:
    recipe = {"epochs": 50, "batch_size": 32, "lr": 0.1} | ONCE
    return MMBM.parse(options).run(task_of(engine, trusted or trusted_data(64), **recipe))


def unit(engine: Watched | None = None, epochs: int = 40, **options: Any) -> Defended:
    recipe = {"epochs": epochs, "batch_size": 16, "lr": 0.02} | ONCE
    chosen = {"patience": 1, "tolerance": 0.1} | options
    return UNIT.parse(chosen).run(task_of(engine, trusted_data(64), **recipe))


# bounds that are trained


def test_bounds_are_written_where_they_are_not_negative_and_the_weights_stay() -> None:
    limits = Bounds(bounded(copied(suspect_model()), [RELU], "channel", (3, 8, 8)))
    limits.start([torch.tensor([-1.0, 0, 1, 2, 3, 4]).view(6, 1, 1)])
    network = limits.write()
    assert network.get_buffer(f"{RELU}.upper_bound").flatten().tolist() == [0, 0, 1, 2, 3, 4]
    kept = {name: value for name, value in weights_of(network).items() if not name.endswith("upper_bound")}
    assert are_equal(kept, weights_of(suspect_model()))
    assert not network.training


def test_logits_of_bounds_are_those_of_the_network_they_are_written_to() -> None:
    limits = Bounds(bounded(copied(suspect_model()), [RELU], "channel", (3, 8, 8)))
    limits.start([torch.tensor(0.3)])
    images = toy_data(8).images.float() / 255
    assert torch.equal(limits.logits(images), limits.write()(images))
    assert not torch.equal(limits.logits(images), suspect_model()(images))


# MM-BM


@pytest.mark.parametrize(
    ("right", "costs"), [(95, [1, 1.2, 1.44, 1.728, 1.728]), (94, [1, 1 / 1.2, 0.694, 0.579, 0.579])]
)
def test_the_cost_changes_after_40_60_and_80_percent_of_the_epochs(right: int, costs: list[float]) -> None:
    limits, found = tighten(), []
    for _ in range(5):
        limits.count(torch.arange(100) < right)
        assert limits.finish_epoch() is False
        found.append(float(limits.cost))
    assert found == pytest.approx(costs, abs=1e-3)
    assert limits.kept == pytest.approx(right / 100)


def test_the_length_is_summed_over_layers() -> None:
    network = bounded(copied(suspect_model()), ["features.layers.1", RELU], "channel", (3, 8, 8))
    limits = Tightening(network, 1.0, 5)
    limits.start([torch.tensor(3.0), torch.tensor(4.0)])
    assert limits.length().item() == pytest.approx(7 * 6**0.5)


def test_the_first_usable_images_of_each_class_are_taken() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 2])
    usable = torch.tensor([True, True, False, True, True, True, False])
    assert first_of_each(labels, usable, 1).tolist() == [0, 1]
    assert first_of_each(labels, usable, 2).tolist() == [0, 1, 3, 4]
    assert first_of_each(labels, usable, 9).tolist() == [0, 1, 3, 4, 5]


def test_a_higher_cost_gives_smaller_bounds() -> None:
    small, large = (mm_bm(cost=cost).findings["mean_bounds"][RELU] for cost in (0.01, 2.0))
    assert large < small < 8


def test_bounds_against_a_backdoor_leave_the_weights_alone() -> None:
    suspect = suspect_model()
    recipe = {"epochs": 50, "batch_size": 32, "lr": 0.1} | ONCE
    result = MMBM.parse({"cost": 0.05}).run(task_of(None, trusted_data(64), suspect, **recipe))
    right, taken = accuracies(result.model)
    assert right >= 0.95
    assert taken <= 0.7
    assert result.findings["images"] == 64
    changed = {
        name
        for name, value in weights_of(result.model).items()
        if not torch.equal(value, weights_of(suspect).get(name, value + 1))
    }
    assert changed == {f"{name}.upper_bound" for name in result.findings["mean_bounds"]}
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))
    assert suspect.wrapper is None


def test_images_that_the_suspect_gets_wrong_are_left_out() -> None:
    trusted = trusted_data(64)
    wrong = ImageDataset(trusted.images, (trusted.labels + 1) % 4, trusted.class_names)
    with pytest.raises(OptionError, match="classifies 0 trusted images right, and 'mm-bm' needs 2"):
        mm_bm(trusted=wrong)


# UNIT


def test_first_bounds_are_means_and_deviations_of_each_place() -> None:
    data, model = toy_data(40), suspect_model()
    (found,) = first_bounds(toy_engine(), model, [RELU], data.images, 4.0)
    maps = model.features.layers(((data.images.float() / 255) - model.mean) / model.std).detach()  # type: ignore[operator, union-attr]
    expected = maps.mean(0) + 4 * maps.std(0, correction=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.shape == (6, 8, 8)


@pytest.mark.parametrize(
    ("measured", "costs"),
    [
        ([0.9, 0.9, 0.9, 0.9], [1, 2, 2, 4]),
        ([0.8, 0.8, 0.8, 0.8], [1, 2**-1.5, 2**-1.5, 0.125]),
        ([0.9, 0.8, 0.9, 0.9], [1, 1, 1, 2]),
    ],
)
def test_patience_in_a_row_changes_the_cost(measured: list[float], costs: list[float]) -> None:
    limits, found = narrow(), []
    for value in measured:
        limits.finish_epoch(value, 0.85)
        found.append(float(limits.cost))
    assert found == pytest.approx(costs)


def test_the_tightest_bounds_that_keep_the_accuracy_are_kept() -> None:
    limits = narrow()
    for bound, measured in ((5.0, 0.95), (3.0, 0.85), (2.0, 0.84), (4.0, 0.9)):
        limits.start([torch.tensor(bound)])
        limits.finish_epoch(measured, 0.85)
    assert float(limits.smallest) == 3
    assert limits.best()[0].unique().tolist() == [3]
    assert limits.sweep[:4, 0].tolist() == [5, 3, 2, 4]


def test_an_accuracy_is_compared_and_told_alike() -> None:
    """In float32 3 of 160 would be 0.0188, and in float64 they are 0.0187."""
    limits = narrow()
    limits.finish_epoch(3 / 160, 0.0)
    assert round(limits.sweep[0, 1].item(), 4) == round(3 / 160, 4)


def test_the_bounds_that_are_returned_are_those_that_were_measured() -> None:
    """The authors' code stores those of before the step after which it measures."""
    engine = Watched()
    result = unit(engine)
    sweep = {tried["setting"]: tried["accuracy"] for tried in result.findings["sweep"]}
    held = 12  # a fifth of 16 images of each of four classes is 3
    assert result.findings["held_out"] == held
    assert len(engine.data["bound"]) == 64 - held
    means = [buffer.mean().item() for name, buffer in result.model.named_buffers() if name.endswith("upper_bound")]
    assert sum(means) == pytest.approx(result.findings["chosen"])
    keeping = [size for size, measured in sweep.items() if measured >= result.findings["accuracy_floor"]]
    assert result.findings["chosen"] == min(keeping)
    assert len(sweep) >= 30


def test_tight_bounds_weaken_a_backdoor() -> None:
    suspect = suspect_model()
    result = unit()
    right, taken = accuracies(result.model)
    assert right >= 0.85
    assert taken < accuracies(suspect)[1]
    kept = {name: value for name, value in weights_of(result.model).items() if not name.endswith("upper_bound")}
    assert are_equal(kept, weights_of(suspect))


def test_where_no_bounds_keep_the_accuracy_the_suspect_comes_back() -> None:
    suspect = suspect_model()
    recipe = {"epochs": 2, "batch_size": 16, "lr": 1e-6} | ONCE
    task = task_of(None, trusted_data(64), suspect, **recipe)
    result = UNIT.parse({"deviations": 0.0, "tolerance": 0.0, "cost": 0.0}).run(task)
    assert result.findings["unchanged"]
    assert result.findings["said"].startswith("no setting keeps the accuracy on 12 held-out images")
    assert result.model is suspect
    assert suspect.wrapper is None


@pytest.mark.parametrize("run", [mm_bm, unit])
def test_a_wrapped_suspect_is_refused(run: Callable[..., Defended], monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = bounded(suspect_model(), [RELU], "channel", (3, 8, 8))
    monkeypatch.setattr("backdoored.suspect_model", lambda: suspect)
    with pytest.raises(OptionError, match="has the wrapper 'upper-bounds' already"):
        run()


class Smooth(nn.Module):
    """A network without ReLUs and without maps."""

    size = 192

    def __init__(self, _: tuple[int, int, int]) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, images: Tensor) -> Tensor:
        return self.act(images.flatten(1))


@pytest.mark.parametrize(
    ("method", "said"), [(MMBM(), "'mm-bm' bounds maps of activations"), (UNIT(), "'unit' bounds what ReLUs give")]
)
def test_a_network_without_what_is_bounded_is_refused(method: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        method.run(task_of(None, trusted_data(64), toy_model(toy_data(), features=Smooth)))
