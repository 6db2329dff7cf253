"""BAN: the loss under noise, what moves, and the whole method on a small backdoored model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_batch, weights_of

from bdbench.defenses.parts import noise as noise_part
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair import ban
from bdbench.defenses.repair.ban import BAN
from bdbench.defenses.repair.ft import FineTuning
from bdbench.models.classifier import Classifier
from bdbench.seeds import scoped

NORM = "features.layers.1"


def tuned(engine: Watched | None = None, count: int = 16, recipe: Any = None, **options: Any) -> Classifier:
    settings = {"epochs": 1, "batch_size": 16, "weight_decay": 0.0} | (recipe or {})
    return BAN.parse(options).run(task_of(engine, trusted_data(count), **settings)).model


def loss_of(**options: Any) -> float:
    engine = Watched()
    tuned(engine, **options)
    (loss,) = engine.losses_of("tune")
    return float(loss)


def clean_loss() -> float:
    data = trusted_data(16)
    return F.cross_entropy(suspect_model().train()(toy_batch(data).images), data.labels).item()


def test_without_noise_the_loss_is_cross_entropy_once_and_as_often_as_the_weight_says() -> None:
    assert loss_of(eps=0.0, noise_weight=0.5) == pytest.approx(1.5 * clean_loss(), rel=1e-5)
    assert loss_of(eps=0.3, noise_weight=0.0) == pytest.approx(clean_loss(), rel=1e-5)


def test_noise_makes_the_loss_larger() -> None:
    assert loss_of(eps=0.3, noise_weight=0.5) > 1.5 * clean_loss()
    assert loss_of(eps=0.6, noise_weight=0.5) > loss_of(eps=0.3, noise_weight=0.5)


def test_the_loss_of_the_first_step_by_hand() -> None:
    engine = Watched()
    tuned(engine, eps=0.2, noise_steps=2, noise_weight=0.4)
    network, batch = suspect_model().train(), engine.batches[0]
    norm = network.get_submodule(NORM)
    assert isinstance(norm, nn.BatchNorm2d)

    def at(d: Tensor, x: Tensor) -> Tensor:
        changed = {f"{NORM}.weight": norm.weight * (1 + d), f"{NORM}.bias": norm.bias * (1 + x)}
        return F.cross_entropy(called(network, changed, batch.images), batch.labels)

    with scoped(0, "tune", "global", 0):
        d, x = torch.empty(2, 6).uniform_(-0.2, 0.2)
    for _ in range(2):
        slopes = torch.autograd.grad(at(d.requires_grad_(), x.requires_grad_()), (d, x))
        d, x = (value.detach() + 0.1 * slope.sign() for value, slope in zip((d, x), slopes, strict=True))
    expected = at(torch.zeros(6), torch.zeros(6)) + 0.4 * at(d, x)
    assert engine.losses_of("tune") == [pytest.approx(expected.item(), rel=1e-5)]


def test_noise_stays_within_twice_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(*args: Any, **settings: Any) -> Tensor:
        seen.append(noise_part.harmful(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(ban, "harmful", watched)
    tuned(recipe={"epochs": 4}, eps=0.3, noise_steps=3)
    assert len(seen) == 4
    assert max(float(noise.abs().max()) for noise in seen) <= 0.6 + 1e-6
    assert all(float(noise.abs().max()) > 0.3 for noise in seen)
    assert len({float(noise.sum()) for noise in seen}) == 4  # drawn again for each batch


def test_a_step_moves_all_weights_along_the_gradient_of_the_whole_loss() -> None:
    """Without noise and with a weight of 1 it is a step of fine-tuning of twice the rate."""
    recipe = {"momentum": 0.0, "nesterov": False}
    found = tuned(recipe=recipe | {"lr": 0.05}, eps=0.0, noise_weight=1.0)
    task = task_of(None, trusted_data(16), epochs=1, batch_size=16, weight_decay=0.0, lr=0.1, **recipe)
    expected = FineTuning().run(task).model
    for (name, weight), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(weight, suspect_model().get_parameter(name)), name


def test_running_statistics_follow_the_pass_without_noise() -> None:
    found, expected = tuned(eps=0.9), suspect_model().train()
    expected(toy_batch(trusted_data(16)).images)
    after, wanted = weights_of(found), weights_of(expected)
    torch.testing.assert_close(after[f"{NORM}.running_mean"], wanted[f"{NORM}.running_mean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[f"{NORM}.running_var"], wanted[f"{NORM}.running_var"], rtol=1e-4, atol=1e-5)


@cache
def repaired(method: type[BAN | FineTuning]) -> tuple[float, float]:
    recipe = {"epochs": 25, "lr": 0.02, "weight_decay": 5e-4}
    suspect = suspect_model()
    found = accuracies(method().run(task_of(None, trusted_data(80), suspect, **recipe)).model)
    assert are_equal(weights_of(suspect), backdoored_weights())
    return found


def test_the_backdoor_goes_where_fine_tuning_as_long_leaves_it() -> None:
    assert repaired(BAN)[0] > 0.95
    assert repaired(BAN)[1] < 0.3
    assert repaired(FineTuning)[1] > 0.7


def test_it_chooses_nothing_and_takes_all_trusted_images() -> None:
    engine = Watched()
    task = task_of(engine, trusted_data(32), epochs=1)
    assert dict(BAN().run(task).findings) == {}
    assert len(engine.data["tune"]) == 32
