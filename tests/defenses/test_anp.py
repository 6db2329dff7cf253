"""ANP: the noise, the loss, which masks fall, and the whole method on a small backdoored model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended
from bdbench.defenses.parts.masks import Masks
from bdbench.defenses.parts.noise import harmful, noisy
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.anp import ANP
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen, named_norms
from bdbench.seeds import scoped
from bdbench.training.loop import mean_cross_entropy

NORM = "features.layers.1"
RECIPE: dict[str, Any] = {"epochs": 4, "lr": 0.2, "weight_decay": 0.0}
OPTIONS: dict[str, Any] = {"steps_per_epoch": 50}


def norms() -> Mapping[str, nn.modules.batchnorm._BatchNorm]:
    return named_norms(suspect_model(), "anp")


def learned(suspect: Classifier, data: ImageDataset, recipe: Mapping[str, Any], **options: Any) -> Tensor:
    """The masks of the toy network's six channels."""
    task = task_of(trusted=data, suspect=suspect, **RECIPE | recipe)
    return ANP.parse(OPTIONS | options).learn(task, frozen(suspect), data).masks.by_norm()[NORM]


class Walk(NamedTuple):
    defended: Defended
    suspect: Classifier
    engine: Watched


@cache
def walk() -> Walk:
    suspect, engine = suspect_model(), Watched()
    task = task_of(engine, trusted_data(80), suspect, **RECIPE)
    return Walk(ANP.parse(OPTIONS).run(task), suspect, engine)


# the noise


def test_noise_disturbs_weights_and_biases_by_their_own_share() -> None:
    name, norm = next(iter(norms().items()))
    noise = torch.stack([torch.full((6,), 0.5), torch.full((6,), -0.25)])
    changed = noisy({name: norm}, noise, [torch.full((6,), 0.1)])
    torch.testing.assert_close(changed[f"{name}.weight"], 0.6 * norm.weight)
    torch.testing.assert_close(changed[f"{name}.bias"], 0.75 * norm.bias)
    torch.testing.assert_close(noisy({name: norm}, noise)[f"{name}.weight"], 1.5 * norm.weight)


def test_noise_is_in_the_order_of_the_norms() -> None:
    two = {"a": nn.BatchNorm2d(2), "b": nn.BatchNorm2d(3)}
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [1.0] * 5])
    changed = noisy(two, noise)
    torch.testing.assert_close(changed["a.weight"], torch.tensor([1.1, 1.2]))
    torch.testing.assert_close(changed["b.weight"], torch.tensor([1.3, 1.4, 1.5]))


@pytest.mark.parametrize("steps", [1, 4])
def test_noise_goes_up_the_loss_by_eps_in_all(steps: int) -> None:
    slope = torch.tensor([[1.0, -3.0, 0.5, -0.1, 2.0, 1.0], [-1.0, 1.0, 1.0, -1.0, 1.0, -1.0]])
    with scoped(0, "noise"):
        drawn = torch.empty(2, 6).uniform_(-0.4, 0.4)
    with scoped(0, "noise"):
        found = harmful(norms(), lambda noise: (slope * noise).sum(), 0.4, steps, project=False)
    torch.testing.assert_close(found, drawn + 0.4 * slope.sign())
    assert drawn.abs().max() <= 0.4
    assert 0.4 < found.abs().max() <= 0.8
    with scoped(0, "noise"):
        clipped = harmful(norms(), lambda noise: (slope * noise).sum(), 0.4, steps, project=True)
    assert clipped.abs().max() <= 0.4


# the loss


def test_the_loss_of_the_first_step_by_hand() -> None:
    data, suspect, engine = trusted_data(16), suspect_model(), Watched()
    task = task_of(engine, data, suspect, epochs=1, batch_size=16)
    ANP.parse({"steps_per_epoch": 1, "eps": 0.3, "alpha": 0.25, "noise_steps": 2}).learn(task, frozen(suspect), data)

    network = suspect_model().train()
    (norm,) = (part for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    batch = engine.batches[0]

    def at(d: Tensor, x: Tensor) -> Tensor:
        changed = {f"{NORM}.weight": norm.weight * (1 + d), f"{NORM}.bias": norm.bias * (1 + x)}
        return F.cross_entropy(called(network, changed, batch.images), batch.labels)

    with scoped(0, "mask", "global", 0):
        d, x = torch.empty(2, 6).uniform_(-0.3, 0.3)
    for _ in range(2):
        slopes = torch.autograd.grad(at(d.requires_grad_(), x.requires_grad_()), (d, x))
        d, x = (value.detach() + 0.15 * slope.sign() for value, slope in zip((d, x), slopes, strict=True))
    expected = 0.25 * at(torch.zeros(6), torch.zeros(6)) + 0.75 * at(d, x)
    assert engine.losses_of("mask") == [pytest.approx(expected.item(), rel=1e-5)]


def test_without_noise_the_masks_learn_by_cross_entropy_alone() -> None:
    data, suspect, engine = trusted_data(16), suspect_model(), Watched()
    task = task_of(engine, data, suspect, epochs=1, batch_size=16, lr=0.5, momentum=0.9, weight_decay=0)
    options = ANP.parse({"steps_per_epoch": 3, "eps": 0.0, "alpha": 1.0})
    found = options.learn(task, frozen(suspect), data).masks.by_norm()[NORM]

    network = suspect_model().train()
    masks = Masks(network, "anp")
    optimizer = torch.optim.SGD(masks.parameters(), 0.5, 0.9)
    for batch in engine.batches:
        masks.clamp()
        optimizer.zero_grad()
        F.cross_entropy(called(network, masks.changed(), batch.images), batch.labels).backward()
        optimizer.step()
    masks.clamp()
    torch.testing.assert_close(found, masks.by_norm()[NORM])
    assert found.min() < 1


def test_batches_are_drawn_with_replacement_whatever_the_number_of_images() -> None:
    engine = Watched()
    task = task_of(engine, trusted_data(16), epochs=2, batch_size=64)
    ANP.parse({"steps_per_epoch": 2}).learn(task, frozen(suspect_model()), trusted_data(16))
    assert [len(batch.rows) for batch in engine.batches] == [64] * 4
    assert len({tuple(batch.rows.tolist()) for batch in engine.batches}) == 4
    assert set(torch.cat([batch.rows for batch in engine.batches]).tolist()) == set(range(16))


def test_masks_are_in_their_range_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    changed = Masks.changed

    def watched(masks: Masks) -> dict[str, Tensor]:
        seen.extend(factor.detach().clone() for factor in masks.factors)
        return changed(masks)

    monkeypatch.setattr(Masks, "changed", watched)
    seen.append(learned(suspect_model(), trusted_data(16), {"epochs": 1, "lr": 20.0}, steps_per_epoch=8))
    assert len(seen) == 9
    assert all(values.min() >= 0 and values.max() <= 1 for values in seen)
    assert any(values.min() == 0 for values in seen)


# which masks fall


@cache
def with_a_sleeper() -> dict[str, Tensor]:
    """Weights of a model whose last channel is silent on clean images, and speaks loudly for class 0 under noise."""
    data = toy_data(120)
    recipe = toy_recipe(epochs=10, lr=0.1, weight_decay=0)
    model = toy_engine().fit(toy_model(data), data, mean_cross_entropy, recipe, phase="train")
    norm = model.get_submodule(NORM)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 1.0, -4.0
        heads = model.head.weight.view(4, 6, 4)  # the embedding has four places of each channel
        heads[:, 5] = 0
        heads[0, 5] = 200.0
    return weights_of(model)


def sleeper() -> Classifier:
    model = toy_model(toy_data())
    model.load_state_dict(with_a_sleeper())
    return model.eval()


def test_the_mask_of_a_channel_that_only_hurts_under_noise_falls_first() -> None:
    data = trusted_data(80)
    logits = toy_engine().logits(sleeper(), data.images)
    assert (logits.argmax(1) == data.labels).double().mean() > 0.9
    under_noise = learned(sleeper(), data, {"epochs": 1}, steps_per_epoch=20)
    assert under_noise.argmin() == 5
    assert under_noise[5] < 0.5 < under_noise[:5].min()
    assert learned(sleeper(), data, {"epochs": 1}, steps_per_epoch=20, eps=0.0)[5] == 1


# the whole method


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    assert accuracies(walk().suspect) == (1.0, 1.0)
    benign, attacked = accuracies(walk().defended.model)
    assert benign > 0.9
    assert attacked < 0.1
    assert sum(walk().defended.findings["pruned"].values()) in range(1, 6)


def test_the_suspect_stays_and_the_result_has_its_running_statistics() -> None:
    """The masks learn in training mode; the statistics that move meanwhile belong to a copy that is thrown away."""
    assert are_equal(weights_of(walk().suspect), backdoored_weights())
    after = weights_of(walk().defended.model)
    for name, value in backdoored_weights().items():
        assert name == f"{NORM}.weight" or torch.equal(after[name], value)
    assert not walk().defended.model.training


def test_the_recipe_is_that_of_the_masks() -> None:
    recipe = walk().engine.recipes["mask"]
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.2, 4, 16)
    assert len(walk().engine.batches) == 200


@pytest.mark.parametrize(("preset", "steps"), [("paper", 2000), ("fast", 300), ("tiny", 200)])
def test_presets_have_their_steps(preset: str, steps: int) -> None:
    assert ANP.presets[preset]["epochs"] * ANP().steps_per_epoch == steps
    assert ANP.presets[preset]["weight_decay"] == 0


def test_every_option_changes_the_masks() -> None:
    def found(**options: Any) -> Tensor:
        return learned(suspect_model(), trusted_data(32), {"epochs": 1, "lr": 0.2}, **{"steps_per_epoch": 12} | options)

    plain = found()
    assert torch.equal(plain, found())
    for changed in ({"eps": 0.8}, {"noise_steps": 3}, {"project": True}, {"alpha": 0.9}, {"steps_per_epoch": 13}):
        assert not torch.equal(plain, found(**changed)), changed


def test_images_of_the_loss_are_batches_of_the_tuned_half() -> None:
    assert len(walk().engine.data["mask"]) == 40
    assert walk().defended.findings["held_out"] == 40
