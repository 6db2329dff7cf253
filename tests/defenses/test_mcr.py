"""MCR: the curve by hand, what is chosen of it, and the whole method on a small backdoored model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import are_equal, toy_data, toy_model, weights_of

from bdbench.defenses.base import Defended
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.mcr import POINTS, Curve, ModeConnectivity, detached
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator


def ends() -> tuple[Classifier, Classifier]:
    return toy_model(toy_data(), "first"), toy_model(toy_data(), "last")


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


def defend(engine: Watched | None = None, recipe: dict[str, Any] | None = None, **options: Any) -> Defended:
    task = task_of(engine, trusted_data(64), **{"epochs": 3, "lr": 0.05} | (recipe or {}))
    return ModeConnectivity.parse({"curve_epochs": 3, "curve_lr": 0.05} | options).run(task)


# the curve


def test_a_curve_begins_and_ends_at_its_ends_whatever_the_bend() -> None:
    first, last = ends()
    curve = Curve(first, last)
    with torch.no_grad():
        for bend in curve.bend:
            bend.normal_(generator=generator(0, "bend"))
    for point, end in ((0.0, first), (1.0, last)):
        assert are_equal(curve.at(torch.tensor(point)), detached(end))


def test_an_untrained_curve_is_a_straight_line() -> None:
    first, last = ends()
    at = flat(Curve(first, last).at(torch.tensor(0.3)))
    torch.testing.assert_close(at, 0.7 * flat(detached(first)) + 0.3 * flat(detached(last)))


@pytest.mark.parametrize("point", [0.0, 0.25, 0.5, 1.0])
def test_the_bend_pulls_with_the_weight_that_it_has_in_the_point(point: float) -> None:
    """d/dbend = 2 t (1 - t) times the gradient at the point, and the ends get none."""
    first, last = ends()
    curve = Curve(first, last)
    images = torch.rand(6, 3, 8, 8, generator=generator(0, "images"))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    F.cross_entropy(called(first.eval(), curve.at(torch.tensor(point)), images), labels).backward()
    there = {name: weight.detach().requires_grad_() for name, weight in curve.at(torch.tensor(point)).items()}
    slopes = torch.autograd.grad(F.cross_entropy(called(first, there, images), labels), list(there.values()))
    for bend, slope in zip(curve.bend, slopes, strict=True):
        torch.testing.assert_close(bend.grad, 2 * point * (1 - point) * slope)
    assert [name for name, _ in curve.named_parameters()] == [f"bend.{place}" for place in range(len(slopes))]
    assert all(weight.grad is None for end in (first, last) for weight in end.parameters())


def test_points_go_from_the_ends_to_the_middle() -> None:
    from_ends = [min(point, 1 - point) for point in POINTS]
    assert from_ends == pytest.approx(sorted(from_ends))
    assert sorted(POINTS) == pytest.approx([place / 10 for place in range(1, 10)])


# the whole method


def test_a_point_of_0_is_the_suspect_and_a_point_of_1_its_fine_tuned_copy() -> None:
    engine = Watched()
    suspect, tuned = defend(point=0.0).model, defend(engine, point=1.0).model
    assert are_equal(detached(suspect), detached(suspect_model()))
    assert not are_equal(detached(tuned), detached(suspect_model()))
    assert list(engine.data) == ["tune", "curve"]
    assert len(engine.data["curve"]) == 64


def test_the_point_is_chosen_on_images_that_nothing_was_trained_with() -> None:
    engine = Watched()
    findings = defend(engine).findings
    assert [tried["setting"] for tried in findings["sweep"]] == list(POINTS)
    assert findings["held_out"] == 32
    assert len(engine.data["tune"]) == len(engine.data["curve"]) == 32
    kept = [tried["setting"] for tried in findings["sweep"] if tried["accuracy"] >= findings["accuracy_floor"]]
    assert findings["chosen"] == kept[-1]


def test_where_no_point_keeps_the_accuracy_the_suspect_comes_back() -> None:
    suspect = suspect_model()
    task = task_of(None, trusted_data(64), suspect, epochs=1, lr=100.0)
    result = ModeConnectivity.parse({"tolerance": 0, "curve_epochs": 1, "curve_lr": 100.0}).run(task)
    assert result.findings["unchanged"]
    assert result.findings["said"].startswith("no setting keeps the accuracy on 32 held-out images: the best has 0.")
    assert result.model is suspect
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))


def test_gradients_of_a_step_are_not_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """BackdoorBench lets them pile up over the whole training of its curve."""
    steps: list[float] = []
    take = torch.optim.SGD.step

    def step(optimizer: torch.optim.SGD, *given: Any) -> Any:
        slopes = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        steps.append(sum(float(slope.abs().sum()) for slope in slopes if slope is not None))
        return take(optimizer, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    # a bend that does not move, at the same images: gradients that pile up would grow with every step
    defend(recipe={"epochs": 1, "batch_size": 64, "momentum": 0, "lr": 1e-9}, curve_lr=1e-9, curve_epochs=20, point=0.5)
    curve = steps[1:]
    assert len(curve) == 20
    assert max(curve[10:]) < 2 * max(curve[:10])


def test_a_backdoor_is_lost_on_the_way() -> None:
    result = defend(recipe={"epochs": 20, "lr": 0.3}, curve_epochs=30, curve_lr=0.3)
    right, taken = accuracies(result.model)
    assert right >= 0.9
    assert taken <= 0.5
    assert not result.model.training
