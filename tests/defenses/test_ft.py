"""FT and FT-SAM: what is trained, and the step uphill by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_batch, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended
from bdbench.defenses.parts.sharpness import uphill
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.ft import FineTuning, FineTuningSAM
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch, mean_cross_entropy

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def fine_tuned(trainable: str = "all", **recipe: Any) -> Classifier:
    return FineTuning.parse({"trainable": trainable}).run(task_of(**{"epochs": 2} | recipe)).model


def changed(model: Classifier) -> set[str]:
    """Which parts of the state differ from the suspect's: the head, the weights of the features, their statistics."""
    before, after = weights_of(suspect_model()), weights_of(model)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {True: "statistics", False: "features"}
    return {"head" if name.startswith("head") else kinds[name.endswith(STATISTICS)] for name in names}


# FT


def test_all_of_the_network_is_trained() -> None:
    assert changed(fine_tuned()) == {"head", "features", "statistics"}


def test_a_linear_probe_leaves_features_and_their_statistics_bit_for_bit() -> None:
    assert changed(fine_tuned("head")) == {"head"}


def test_tuned_features_leave_the_head_bit_for_bit() -> None:
    assert changed(fine_tuned("features")) == {"features", "statistics"}


def test_the_suspect_stays_as_it_is() -> None:
    suspect = suspect_model()
    for method in (FineTuning(), FineTuningSAM()):
        model = method.run(task_of(suspect=suspect, epochs=1)).model
        assert model is not suspect
        assert not model.training
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))


def test_a_tiny_learning_rate_changes_next_to_nothing() -> None:
    model = fine_tuned(lr=1e-9)
    weights = dict(suspect_model().named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, weights[name].detach(), atol=1e-6, rtol=0)


def test_fine_tuning_takes_the_recipe_and_the_trusted_images() -> None:
    engine, trusted = Watched(), trusted_data()
    task = task_of(engine, trusted, epochs=3)
    FineTuning().run(task)
    assert engine.recipes == {"tune": task.recipe}
    assert engine.data["tune"] is trusted


def test_labels_matter() -> None:
    trusted = trusted_data()
    other = ImageDataset(trusted.images, trusted.labels.flip(0), trusted.class_names)
    models = [FineTuning().run(task_of(trusted=data, epochs=1)).model for data in (trusted, other)]
    assert not are_equal(weights_of(models[0]), weights_of(models[1]))


def test_the_loss_falls() -> None:
    engine = Watched()
    FineTuning().run(task_of(engine, epochs=20, lr=0.01))
    losses = engine.losses_of("tune")
    assert losses[-1] < losses[0]


def test_classes_without_a_trusted_image_are_told() -> None:
    trusted = trusted_data()
    some = trusted.take(trusted.labels > 1)
    assert FineTuning().run(task_of(trusted=some, epochs=1)).findings["missing_classes"] == [0, 1]
    assert "missing_classes" not in FineTuning().run(task_of(epochs=1)).findings


@pytest.mark.parametrize("missing", ["suspect", "trusted"])
def test_nothing_to_mend_or_to_mend_with_is_refused(missing: str) -> None:
    with pytest.raises(OptionError, match="this method needs the undefended model and trusted images"):
        FineTuning().run(replace(task_of(), **{missing: None}))


# the step uphill


class Point(nn.Module):
    """A module that is its weights, two numbers and one that is never trained."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.tensor([7.0], dtype=torch.float64), requires_grad=False)


HESSIAN = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def quadratic(weights: Mapping[str, Tensor]) -> Tensor:
    """w' H w / 2."""
    at = weights["at"]
    return at @ HESSIAN @ at / 2


def slope_uphill(point: Point, rho: float, *, adaptive: bool) -> Tensor:
    uphill(point, quadratic, rho, adaptive=adaptive).backward()  # type: ignore[arg-type]
    assert point.at.grad is not None
    return point.at.grad


def test_the_gradient_is_that_a_step_uphill() -> None:
    # w = (2, 3): g = (4, 3), |g| = 5, e = 10 * g / 5 = (8, 6), H (w + e) = (20, 9)
    assert slope_uphill(Point(2.0, 3.0), 10.0, adaptive=False).tolist() == pytest.approx([20.0, 9.0])


def test_the_adaptive_step_is_measured_in_units_of_the_weights() -> None:
    # w = (3, -4): g = (6, -4), |w| g = (18, -16), of length sqrt(580), w^2 g = (54, -64)
    length = math.sqrt(580)
    step = [2.0 * 54 / length, -2.0 * 64 / length]
    found = slope_uphill(Point(3.0, -4.0), 2.0, adaptive=True)
    assert found.tolist() == pytest.approx([2 * (3 + step[0]), -4 + step[1]])


def test_the_adaptive_step_has_length_rho_in_those_units() -> None:
    point = Point(3.0, -4.0)
    moved: list[Tensor] = []

    def loss(weights: Mapping[str, Tensor]) -> Tensor:
        moved.append(weights["at"].detach())
        return quadratic(weights)

    uphill(point, loss, 0.7, adaptive=True)  # type: ignore[arg-type]
    assert len(moved) == 2
    assert ((moved[1] - moved[0]) / moved[0].abs()).norm().item() == pytest.approx(0.7)


def test_a_weight_that_is_0_is_not_moved_by_the_adaptive_step() -> None:
    # g = (4, 0): the second weight stays at 0, and so does its slope
    assert slope_uphill(Point(2.0, 0.0), 1.0, adaptive=True)[1] == 0


def test_no_step_is_the_plain_gradient() -> None:
    for adaptive in (True, False):
        assert slope_uphill(Point(2.0, 3.0), 0.0, adaptive=adaptive).tolist() == [4.0, 3.0]


def test_at_the_bottom_there_is_no_way_up_and_no_nan() -> None:
    assert slope_uphill(Point(0.0, 0.0), 1.0, adaptive=False).tolist() == [0.0, 0.0]


def test_the_loss_is_that_a_step_uphill() -> None:
    # at w + e = (10, 9): 2 * 100 / 2 + 81 / 2
    found = uphill(Point(2.0, 3.0), quadratic, 10.0, adaptive=False)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(140.5)


# FT-SAM


def test_without_a_step_and_smoothing_it_is_fine_tuning() -> None:
    plain = FineTuning().run(task_of(epochs=2, lr=0.01)).model
    same = FineTuningSAM.parse({"rho": 0.0, "smoothing": 0.0}).run(task_of(epochs=2, lr=0.01)).model
    for name, value in weights_of(same).items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, weights_of(plain)[name], rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_a_step_by_the_batch_at_the_weights() -> None:
    suspect, data = suspect_model(), trusted_data()
    task = task_of(suspect=suspect, trusted=data, epochs=1, batch_size=32)  # one step
    model = FineTuningSAM.parse({"rho": 5.0}).run(task).model
    plain = copied(suspect).train()
    plain(toy_batch(data).images)
    for name, value in weights_of(model).items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, weights_of(plain)[name], rtol=1e-4, atol=1e-5)


def first_loss(**options: Any) -> float:
    engine = Watched()
    FineTuningSAM.parse(options).run(task_of(engine, epochs=1, batch_size=32))
    return float(engine.losses_of("tune")[0])


def test_the_other_classes_share_the_whole_smoothing() -> None:
    """Of four classes the label gets 0.7 and each other 0.1."""
    batch, model = toy_batch(trusted_data()), copied(suspect_model()).train()
    target = torch.full((32, 4), 0.1).scatter(1, batch.labels[:, None], 0.7)
    expected = F.cross_entropy(model(batch.images), target).item()
    assert first_loss(rho=0.0, smoothing=0.3) == pytest.approx(expected, rel=1e-5)


def test_a_step_uphill_has_a_larger_loss() -> None:
    assert first_loss(rho=0.5) > first_loss(rho=0.0)
    assert first_loss(rho=0.5, adaptive=False) != first_loss(rho=0.5)


def losing(method: FineTuning | FineTuningSAM, **recipe: Any) -> tuple[float, float]:
    defended: Defended = method.run(task_of(trusted=trusted_data(64), **{"epochs": 40, "lr": 0.1} | recipe))
    return accuracies(defended.model)


@pytest.mark.parametrize("method", [FineTuning(), FineTuningSAM.parse({"rho": 0.5})], ids=["ft", "ft-sam"])
def test_the_backdoor_fades_and_the_accuracy_holds(method: FineTuning | FineTuningSAM) -> None:
    before = accuracies(suspect_model())
    right, taken = losing(method)
    assert right >= 0.9
    assert taken <= before[1] / 2


def test_a_linear_probe_learns_from_a_frozen_batch_norm() -> None:
    """Its loss is that of the network as it is used, not of batches that are normalised by themselves."""
    engine = Watched()
    FineTuning.parse({"trainable": "head"}).run(task_of(engine, epochs=1, batch_size=32))
    batch = toy_batch(trusted_data())
    with torch.no_grad():
        expected = mean_cross_entropy(suspect_model(), Batch(batch.images, batch.labels, batch.rows, 0)).item()
    assert engine.losses_of("tune")[0] == pytest.approx(expected, rel=1e-5)
