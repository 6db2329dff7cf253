"""Networks that make triggers, and the budget of victims that are trained with them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import are_equal, toy_batch, toy_data

from bdbench.attacks.input_aware import InputAware
from bdbench.attacks.parts.generators import fresh, in_equal_batches, restored, step_along, weights_of
from bdbench.attacks.parts.victims import VictimAttack, epochs_of

CPU = torch.device("cpu")


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))


class Seen:
    """A function of images that remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return images.sum((1, 2, 3))


@pytest.mark.parametrize(("count", "sizes"), [(0, [16]), (1, [16]), (16, [16]), (33, [16, 16, 16])])
def test_every_batch_is_of_one_size(count: int, sizes: list[int]) -> None:
    seen = Seen()
    images = torch.rand(count, 3, 8, 8)
    torch.testing.assert_close(in_equal_batches(seen, images), images.sum((1, 2, 3)))
    assert seen.sizes == sizes


@pytest.mark.parametrize(("side", "size"), [(32, 16), (64, 4), (224, 1)])
def test_batches_of_larger_images_are_smaller(side: int, size: int) -> None:
    seen = Seen()
    in_equal_batches(seen, torch.rand(2, 1, side, side))
    assert set(seen.sizes) == {size}


def test_a_result_can_be_changed_and_has_no_gradient() -> None:
    made = in_equal_batches(small_net(), torch.rand(2, 3, 8, 8))
    made += 1
    assert not made.requires_grad
    assert not made.is_inference()


def test_a_network_comes_back_from_a_state_in_evaluation_mode() -> None:
    network = fresh(small_net, 0, "test", CPU)
    network(torch.rand(5, 3, 8, 8))  # moves the statistics
    state = weights_of(network, "one.") | weights_of(fresh(small_net, 0, "other", CPU), "two.")
    again = restored(small_net, state, "one.")
    assert are_equal(dict(again.state_dict()), dict(network.state_dict()))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_state_is_a_copy() -> None:
    network = fresh(small_net, 0, "test", CPU)
    state = weights_of(network, "")
    before = {name: value.clone() for name, value in state.items()}
    network[0].weight.data.zero_()
    network[1].weight.data.zero_()
    restored(small_net, state, "")(torch.rand(2, 3, 8, 8))
    assert are_equal(state, before)


def test_restoring_draws_nothing() -> None:
    state = weights_of(fresh(small_net, 0, "test", CPU), "")
    before = torch.get_rng_state()
    restored(small_net, state, "")
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_networks_go_by_seed_and_purpose() -> None:
    one, same, seed, purpose = (
        weights_of(fresh(small_net, *it, CPU), "") for it in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert are_equal(one, same)
    assert not are_equal(one, seed)
    assert not are_equal(one, purpose)


def test_a_follower_steps_on_the_same_loss_once() -> None:
    one, two = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    leader, follower = torch.optim.SGD([one], 0.1), torch.optim.SGD([two], 0.2)
    step_along(leader, follower)
    for expected_one, expected_two in ((0.7, 0.8), (0.4, 0.6)):
        leader.zero_grad()
        (3 * one + two).backward()
        leader.step()
        assert one.item() == pytest.approx(expected_one)
        assert two.item() == pytest.approx(expected_two)


# victims


def victim_attack(**options: Any) -> VictimAttack:
    return InputAware.parse(options)


@pytest.mark.parametrize(
    ("steps", "images", "expected"), [(8000, 50_000, 21), (800, 50_000, 3), (8000, 1_366, 100), (8000, 128, 100)]
)
def test_a_budget_of_steps_in_epochs(steps: int, images: int, expected: int) -> None:
    # 50,000 images are 391 steps of 128, and 8,000 / 391 is 20.5
    assert epochs_of(steps, images, 128) == expected


def test_epochs_that_are_given_win() -> None:
    assert victim_attack(victim_epochs=7).victim_recipe(toy_data(), "none").epochs == 7


@pytest.mark.parametrize(
    ("rate", "ratio", "expected"), [(0.1, 1.0, (2, 2)), (0.1, 0.0, (2, 0)), (0.01, 1.0, (1, 1)), (0.9, 1.0, (14, 2))]
)
def test_a_batch_has_its_share_of_poison_and_covers(rate: float, ratio: float, expected: tuple[int, int]) -> None:
    batch = toy_batch(toy_data(16))
    assert victim_attack(cover_ratio=ratio).split_batch(batch, rate) == expected


@pytest.mark.parametrize(("options", "share"), [({"rate": 0.3}, 0.3), ({"class_rate": 0.5}, 0.125)])
def test_the_share_of_a_batch_is_that_of_the_data_set(options: dict[str, float], share: float) -> None:
    assert victim_attack(**options).poisoned_share(toy_data(120)) == pytest.approx(share)


def test_victims_train_with_the_published_momentum_and_decay() -> None:
    recipe = victim_attack(victim_lr=0.02, victim_batch_size=64).victim_recipe(toy_data(), "flip")
    said = (recipe.lr, recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.augment)
    assert said == (0.02, 64, 0.9, 5e-4, "flip")


@pytest.mark.parametrize("batch", [partial(toy_data, 2), partial(toy_data, 3)])
def test_small_batches_are_split_too(batch: partial[Any]) -> None:
    data = batch()
    poisoned, covers = victim_attack().split_batch(toy_batch(data), 0.5)
    assert 1 <= poisoned <= poisoned + covers <= len(data)
