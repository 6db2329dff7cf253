"""AWM: masks on weights, the perturbation they learn against, and the whole method on a small backdoored model."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_batch, toy_data, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair import awm
from bdbench.defenses.repair.awm import AWM, WeightMasks, scaled
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.seeds import generator

CONV = "features.layers.0.weight"
RECIPE: dict[str, Any] = {"epochs": 15, "lr": 0.03, "weight_decay": 0.0, "momentum": 0.9}
OPTIONS: dict[str, Any] = {"radius": 30.0}


class Walk(NamedTuple):
    defended: Defended
    suspect: Classifier
    engine: Watched


@cache
def walk() -> Walk:
    suspect, engine = suspect_model(), Watched()
    task = task_of(engine, trusted_data(80), suspect, **RECIPE)
    return Walk(AWM.parse(OPTIONS).run(task), suspect, engine)


def random_masks(model: Classifier) -> WeightMasks:
    masks = WeightMasks(model)
    with torch.no_grad():
        for factor in masks.factors:
            factor.copy_(torch.rand(factor.shape, generator=generator(0, "masks")))
    return masks


# the masks


def test_masks_of_one_are_the_suspect() -> None:
    masks, suspect = WeightMasks(suspect_model()), suspect_model()
    assert masks.names == [CONV]
    assert masks.mean() == 1
    assert are_equal(weights_of(masks.folded(suspect)), weights_of(suspect))


def test_folded_masks_answer_as_masks_beside_the_weights() -> None:
    suspect = suspect_model()
    masks, images = random_masks(suspect), toy_batch(trusted_data()).images
    torch.testing.assert_close(masks.folded(suspect)(images), called(suspect, masks.changed(suspect), images))
    assert not torch.allclose(masks.folded(suspect)(images), suspect(images))


def test_masks_are_clamped() -> None:
    masks = WeightMasks(suspect_model())
    with torch.no_grad():
        masks.factors[0][0], masks.factors[0][1] = 2.0, -1.0
    masks.clamp()
    assert masks.factors[0][0].eq(1).all()
    assert masks.factors[0][1].eq(0).all()
    assert masks.size().item() == masks.factors[0].numel() * 5 / 6


def test_masks_are_in_their_range_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    changed = WeightMasks.changed

    def watched(masks: WeightMasks, model: Classifier) -> dict[str, Tensor]:
        seen.extend(factor.detach().clone() for factor in masks.factors)
        return changed(masks, model)

    monkeypatch.setattr(WeightMasks, "changed", watched)
    AWM.parse(OPTIONS).run(task_of(None, trusted_data(32), **RECIPE | {"epochs": 2, "lr": 0.5}))
    assert len(seen) > 4
    assert all(values.min() >= 0 and values.max() <= 1 for values in seen)
    assert seen[-1].min() == 0


def test_a_network_without_convolutions_is_refused() -> None:
    class Flat(nn.Module):
        size = 192

        def __init__(self, _: tuple[int, int, int]) -> None:
            super().__init__()

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    with pytest.raises(OptionError, match="method 'awm' masks convolutions, and this network has none"):
        WeightMasks(toy_model(toy_data(), features=Flat))


# the perturbation


def test_a_perturbation_is_scaled_into_the_ball_as_a_whole() -> None:
    delta = torch.tensor([3.0, -1.0, 0.0, 4.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(scaled(delta, 4.0), delta / 2)
    assert torch.equal(scaled(delta, 8.0), delta)
    assert torch.equal(scaled(0 * delta, 8.0), 0 * delta)


def perturbation(data: ImageDataset, engine: Watched | None = None, **options: Any) -> Tensor:
    task = task_of(engine, data, **RECIPE)
    return AWM.parse(options)._perturbation(task, frozen(suspect_model()), data, 1)


def test_the_perturbation_changes_answers_and_never_asks_for_labels() -> None:
    data = trusted_data(32)
    shuffled = ImageDataset(data.images, data.labels.roll(1), data.class_names)
    found = perturbation(data, perturb_epochs=3, radius=30.0)
    assert torch.equal(found, perturbation(shuffled, perturb_epochs=3, radius=30.0))
    assert found.abs().sum() <= 30.0001
    images, model = toy_batch(data).images, suspect_model()
    answers = model(images).argmax(1)
    assert (model((images + found).clamp(0, 1)).argmax(1) == answers).double().mean() < 0.8


def test_the_first_step_of_a_perturbation_by_hand() -> None:
    data, engine = trusted_data(16), Watched()
    found = perturbation(data, engine, perturb_lr=0.5)
    images, model = engine.batches[0].images, frozen(suspect_model())
    delta = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss = F.cross_entropy(model(images + delta), model(images).argmax(1))
    (slope,) = torch.autograd.grad(loss, delta)
    assert engine.losses_of("perturb-1") == [pytest.approx(-loss.item(), rel=1e-5)]
    torch.testing.assert_close(found, 0.5 * slope)


# the loss of the masks


def test_the_loss_of_the_first_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = 2 * torch.rand(1, 3, 8, 8, generator=generator(0, "delta")) - 1
    monkeypatch.setattr(awm, "universal", lambda *_, **__: delta)
    data, engine = trusted_data(16), Watched()
    options = AWM.parse({"alpha": 0.7, "sparsity": 1e-3, "radius": 1000.0})
    options.run(task_of(engine, data, epochs=1, batch_size=16))
    images, model = engine.batches[0].images, suspect_model()  # in evaluation mode
    perturbed = (images + delta).clamp(0, 1)
    labels = engine.batches[0].labels
    expected = 0.7 * F.cross_entropy(model(images), labels) + 0.3 * F.cross_entropy(model(perturbed), labels)
    assert engine.losses_of("mask-1") == [pytest.approx(expected.item() + 1e-3 * 6 * 3 * 9, rel=1e-5)]


def test_masks_and_perturbations_take_turns_on_the_trusted_images() -> None:
    """The official code takes test images."""
    phases = list(walk().engine.data)
    assert phases[:4] == ["perturb-1", "mask-1", "perturb-2", "mask-2"]
    assert len(phases) == 2 * 15
    assert all(torch.equal(data.images, trusted_data(80).images) for data in walk().engine.data.values())
    assert len(walk().defended.findings["perturbation_norms"]) == 15
    assert max(walk().defended.findings["perturbation_norms"]) <= 30.0001


def test_adam_goes_on_from_epoch_to_epoch_at_the_rate_of_the_schedule() -> None:
    engine = Watched()
    AWM.parse(OPTIONS).run(task_of(engine, trusted_data(16), epochs=2, lr=0.1, schedule="cosine"))
    assert engine.optimizers["mask-1"] is engine.optimizers["mask-2"]
    assert engine.recipes["mask-1"].lr == pytest.approx(0.1)
    assert engine.recipes["mask-2"].lr == pytest.approx(0.05)


# the whole method


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    assert accuracies(walk().suspect) == (1.0, 1.0)
    benign, attacked = accuracies(walk().defended.model)
    assert benign > 0.9
    assert attacked < 0.2


def test_only_weights_of_convolutions_change_and_only_towards_zero() -> None:
    assert are_equal(weights_of(walk().suspect), backdoored_weights())
    before, after = backdoored_weights(), weights_of(walk().defended.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {CONV}
    share = after[CONV] / before[CONV]
    assert share.min() >= 0
    assert share.max() <= 1
    assert walk().defended.findings["mask_mean"] == pytest.approx(share.mean().item(), abs=1e-3)
    assert not walk().defended.model.training
