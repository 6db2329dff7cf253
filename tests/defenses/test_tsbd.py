"""TSBD: weight changes and the flat gradient by hand, and the whole method on a small backdoored model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import are_equal, toy_batch, toy_data, toy_model, weights_of

from bdbench.defenses.base import Defended
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.parts.sharpness import trained, uphill, with_flat_gradient
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.ft import FineTuning
from bdbench.defenses.repair.tsbd import TSBD, among_largest, changes, largest
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.resnet import ResNet18
from bdbench.models.wide_resnet import WideResNet

CONV = "features.layers.0.weight"


def flat_gradient(model: Classifier, radius: float, share: float) -> list[Tensor]:
    """Gradients of all weights of a model in evaluation mode, on 12 images."""
    batch = toy_batch(toy_data(12))

    def at(weights: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(called(model, weights, batch.images), batch.labels)

    loss = with_flat_gradient(model, at, radius, share)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def gradient(model: Classifier) -> list[Tensor]:
    batch = toy_batch(toy_data(12))
    return list(torch.autograd.grad(F.cross_entropy(model(batch.images), batch.labels), list(model.parameters())))


def climbed(model: Classifier, radius: float) -> Classifier:
    """A copy, every tensor of whose weights took a step of this length uphill."""
    moved, slopes = copied(model), gradient(model)
    with torch.no_grad():
        for weight, slope in zip(moved.parameters(), slopes, strict=True):
            weight.add_(radius * slope / slope.norm())
    return moved


# the flat gradient


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_is_a_mean_of_those_here_and_uphill(share: float) -> None:
    model = copied(suspect_model()).eval()
    here, there = gradient(model), gradient(climbed(model, 0.1))
    for found, one, other in zip(flat_gradient(model, 0.1, share), here, there, strict=True):
        torch.testing.assert_close(found, (1 - share) * one + share * other)


def test_a_step_of_no_length_is_the_plain_gradient() -> None:
    model = copied(suspect_model()).eval()
    for found, plain in zip(flat_gradient(model, 0.0, 0.7), gradient(model), strict=True):
        torch.testing.assert_close(found, plain)


def test_every_tensor_takes_a_step_of_its_own_length() -> None:
    """Sharpness-aware minimisation has one length for all of them together."""
    model = copied(suspect_model()).eval()
    weights, steps = trained(model), []

    def at(moved: Mapping[str, Tensor]) -> Tensor:
        steps.append([float((moved[name] - weight).detach().norm()) for name, weight in weights.items()])
        batch = toy_batch(toy_data(12))
        return F.cross_entropy(called(model, moved, batch.images), batch.labels)

    with_flat_gradient(model, at, 0.1, 0.7)
    assert steps[1] == pytest.approx([0.1] * len(weights), rel=1e-4)
    steps.clear()
    uphill(model, at, 0.1, adaptive=False)
    assert sum(step**2 for step in steps[1]) == pytest.approx(0.1**2, rel=1e-4)


def test_a_tensor_without_a_gradient_stays_where_it_is() -> None:
    model = copied(suspect_model())

    def at(weights: Mapping[str, Tensor]) -> Tensor:
        idle = torch.stack([0 * weight.sum() for weight in weights.values()]).sum()
        return idle + (weights["head.bias"] - 1).square().sum()

    loss = with_flat_gradient(model, at, 0.5, 1.0)
    assert loss.isfinite()


# what is set to zero


def test_weights_that_did_not_change_have_no_changes() -> None:
    model = suspect_model()
    (change,) = changes(model, copied(model)).values()
    assert not change.any()


def test_the_change_of_a_filter_is_the_sum_of_its_weights_changes() -> None:
    before, after = suspect_model(), copied(suspect_model())
    with torch.no_grad():
        after.get_parameter(CONV)[2].sub_(0.5)
    found = changes(before, after)
    assert list(found) == [CONV]
    sums = found[CONV].flatten(1).sum(1)
    torch.testing.assert_close(sums, torch.tensor([0, 0, 0.5 * 27, 0, 0, 0]))


@pytest.mark.parametrize(("network", "convolutions"), [(WideResNet, 13), (ResNet18, 17)])
def test_shortcuts_are_left_alone(network: type[torch.nn.Module], convolutions: int) -> None:
    model = toy_model(toy_data(8), features=network)
    names = list(changes(model, model))
    assert len(names) == convolutions
    assert not any("shortcut" in name for name in names)


def test_exactly_the_share_of_the_weights_of_the_chosen_filters_is_taken() -> None:
    """Two layers of 4 and 2 filters of 3 weights; half of 6 filters are 3, half of their 9 weights are 4."""
    one = torch.tensor([[9.0, 1, 1], [0, 0, 0], [5, 5, 5], [2, 2, 2]])
    other = torch.tensor([[7.0, 8, 0], [1, 1, 1]])
    found = largest({"one": one, "other": other}, 0.5, 0.5)
    # sums 11, 0, 15, 6 and 15, 3: filters 0 and 2 of one, 0 of the other; 9, 8 and 7 and one of the fives
    assert found["one"][0].tolist() == [True, False, False]
    assert found["other"][0].tolist() == [True, True, False]
    assert int(found["one"][2].sum()) == 1
    assert sum(int(part.sum()) for part in found.values()) == 4


@pytest.mark.parametrize(("filters", "weights", "count"), [(0, 1, 0), (1, 0, 0), (1, 1, 12), (0.5, 1, 6), (0.24, 1, 0)])
def test_shares_of_nothing_and_of_all(filters: float, weights: float, count: int) -> None:
    equal = torch.zeros(4, 3)  # all equally, and not at all, changed
    assert int(largest({"all": equal}, filters, weights)["all"].sum()) == count


def test_the_largest_are_counted_whatever_is_equal() -> None:
    assert int(among_largest(torch.ones(7), 3).sum()) == 3


def test_a_network_without_convolutions_is_refused() -> None:
    class Plain(torch.nn.Module):
        size = 192

        def __init__(self, _: tuple[int, int, int]) -> None:
            super().__init__()

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    model = toy_model(toy_data(8), features=Plain)
    with pytest.raises(OptionError, match="'tsbd' works on convolutions, and this network has none"):
        changes(model, model)


# the whole method


def defend(engine: Watched | None = None, recipe: dict[str, Any] | None = None, **options: Any) -> Defended:
    chosen = {"epochs": 2, "lr": 0.05} | (recipe or {})
    return TSBD.parse({"unlearn_lr": 0.02, "unlearn_epochs": 30} | options).run(
        task_of(engine, trusted_data(64), **chosen)
    )


@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"radius": 0.0}])
def test_without_a_penalty_and_zeros_it_is_fine_tuning(options: dict[str, float]) -> None:
    found = defend(weight_share=0.0, unlearn_epochs=1, **options).model
    tuned = FineTuning().run(task_of(None, trusted_data(64), epochs=2, lr=0.05)).model
    for name, value in tuned.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_unlearning_ends_when_the_accuracy_is_low_and_the_suspect_stays() -> None:
    engine, suspect = Watched(), suspect_model()
    task = task_of(engine, trusted_data(64), suspect, epochs=1)
    findings = TSBD.parse({"unlearn_lr": 0.02, "unlearn_epochs": 30}).run(task).findings
    assert findings["took"]
    assert findings["unlearned_accuracy"] <= 0.25
    assert 1 <= len(engine.losses_of("unlearn")) < 30
    assert engine.losses_of("unlearn")[-1] < engine.losses_of("unlearn")[0] < 0
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))


def test_a_model_that_answers_one_class_has_unlearned_however_few_classes_there_are() -> None:
    """Of 64 images 24 are of one class: a model that answers it always has an accuracy of 0.375."""
    trusted = trusted_data(96).take(torch.cat([torch.arange(0, 96, 4), torch.arange(1, 96, 2)[:40]]))
    engine = Watched()
    findings = TSBD.parse({"unlearn_lr": 0.02, "unlearn_epochs": 30}).run(task_of(engine, trusted, epochs=1)).findings
    assert findings["took"]
    assert len(engine.losses_of("unlearn")) < 30


def test_unlearning_never_grows_beyond_all_limits() -> None:
    """Ten times the loss of guessing is where it stops to pull."""
    engine = Watched()
    defend(engine, unlearn_lr=1.0, unlearn_stop=0.0, unlearn_epochs=20)
    assert min(engine.losses_of("unlearn")) >= -10 * torch.tensor(4.0).log().item() - 1e-4


def test_an_unlearning_that_did_not_take_is_told() -> None:
    findings = defend(unlearn_lr=1e-6, unlearn_epochs=1).findings
    assert not findings["took"]
    assert findings["unlearned_accuracy"] > 0.9


def test_all_of_the_trusted_images_are_used_and_nothing_else_chooses() -> None:
    engine = Watched()
    findings = defend(engine, filter_share=0.5).findings
    assert {phase: len(data) for phase, data in engine.data.items()} == {"unlearn": 64, "tune": 64}
    # half of 6 filters of 27 weights, 70 % of them
    assert findings["zeroed"] == {CONV: int(0.7 * 81)}
    assert "sweep" not in findings


def test_a_backdoor_is_lost() -> None:
    result = defend(recipe={"epochs": 20, "lr": 0.2}, filter_share=0.5)
    right, taken = accuracies(result.model)
    assert right >= 0.95
    assert taken <= 0.4
    assert not result.model.training
