"""SSBA: the encoder's loss, its secret, and that it can be read."""

from __future__ import annotations

import math
from functools import cache
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from toys import toy_attack, toy_batch, toy_data, toy_lab

from bdbench.attacks.base import State
from bdbench.attacks.ssba import SSBA, Encoder, Hider, draw_secret, visible
from bdbench.data import ImageDataset
from bdbench.errors import OptionError, TrainingError


class Steady(nn.Module):
    """Changes all pixels by 0.1, and reads nothing: logits 0."""

    def encoder(self, images: Tensor, secrets: Tensor) -> Tensor:  # noqa: ARG002
        return torch.full_like(images, 0.1)

    def decoder(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 20)


def loss_at(step: int, bits_alone: float) -> float:
    batch = toy_batch(toy_data(4))._replace(step=step)
    return SSBA()._loss(bits_alone, cast("Hider", Steady()), batch).item()


@cache
def fitted() -> tuple[SSBA, State]:
    attack = cast("SSBA", toy_attack("ssba"))
    return attack, attack.fit(toy_data(48), toy_lab())


def test_an_even_change_is_seen_at_all_scales_and_has_no_slopes() -> None:
    assert visible(torch.full((1, 3, 8, 8), 0.1)).item() == pytest.approx(0.01)


def test_a_checkerboard_is_seen_from_near_only_and_is_steep() -> None:
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    # 0.1^2 whole, 0 halved and quartered; neighbours differ by 0.2 in both directions
    assert visible(0.1 * sign.expand(1, 3, 8, 8)).item() == pytest.approx(0.01 / 3 + 0.08)


def test_at_first_the_bits_alone_count() -> None:
    assert loss_at(9, bits_alone=10) == pytest.approx(math.log(2))


def test_then_the_change_counts_too() -> None:
    # 2 * 0.1^2 + 1.5 * 0.1^2 + 1.5 * ln 2
    assert loss_at(10, bits_alone=10) == pytest.approx(0.02 + 0.015 + 1.5 * math.log(2))


def test_the_secret_is_of_bits_and_goes_by_the_seed() -> None:
    one = draw_secret(20, seed=0)
    assert one.shape == (20,)
    assert set(one.tolist()) == {0.0, 1.0}
    assert torch.equal(one, draw_secret(20, seed=0))
    assert not torch.equal(one, draw_secret(20, seed=1))


def test_the_secret_of_an_attack_is_stored() -> None:
    attack, state = fitted()
    assert torch.equal(state["secret"], draw_secret(attack.secret_bits, seed=0))


def test_all_images_carry_one_secret_by_changes_of_their_own() -> None:
    attack, state = fitted()
    data = toy_data(8)
    change = attack.trigger(data, torch.arange(8), state, "test", 0).float() - data.images.float()
    assert len(torch.unique(change, dim=0)) == 8


def test_equal_images_are_changed_equally_in_training_and_in_tests() -> None:
    attack, state = fitted()
    one = toy_data(1)
    twice = ImageDataset(one.images.repeat(2, 1, 1, 1), one.labels.repeat(2), one.class_names)
    poison, test = (attack.trigger(twice, torch.arange(2), state, use, 0) for use in ("poison", "test"))  # type: ignore[arg-type]
    assert torch.equal(poison[0], poison[1])
    assert torch.equal(poison, test)


def test_another_secret_is_another_change() -> None:
    attack, state = fitted()
    data = toy_data(4)
    other = state | {"secret": 1 - state["secret"]}
    rows = torch.arange(4)
    assert not torch.equal(attack.trigger(data, rows, state, "test", 0), attack.trigger(data, rows, other, "test", 0))


def test_what_the_decoder_read_is_recorded() -> None:
    _, state = fitted()
    assert 0.75 <= state["bits_read"] <= 1
    assert {name.partition(".")[0] for name in state} == {"secret", "bits_read", "encoder"}


def test_an_encoder_that_cannot_be_read_is_refused() -> None:
    attack = toy_attack("ssba", secret_bits=20, encoder_epochs=1)
    with pytest.raises(TrainingError, match=r"reads 0\.\d+ of the bits.* raise --encoder-epochs"):
        attack.fit(toy_data(48), toy_lab())


def test_large_images_are_encoded_at_the_side_that_is_set() -> None:
    sizes = SSBA(encoder_side=64)._sizes(toy_data(2, 3, 96, 128))
    assert sizes == (20, 32, (3, 48, 64))
    assert SSBA()._sizes(toy_data(2, 1, 28, 28)) == (20, 32, (1, 28, 28))


def test_the_change_is_enlarged_to_the_image() -> None:
    change = Encoder(20, 4, (3, 8, 8))(torch.rand(2, 3, 20, 12), torch.zeros(2, 20))
    assert change.shape == (2, 3, 20, 12)


@pytest.mark.parametrize(
    ("side", "widths"), [(8, [4, 4, 8]), (16, [4, 4, 8, 16]), (32, [4, 4, 8, 16, 32]), (64, [4, 4, 8, 16, 32])]
)
def test_levels_have_the_published_widths_where_the_image_has_room(side: int, widths: list[int]) -> None:
    levels = Encoder(20, 4, (3, side, side)).down
    assert [level.out_channels for level in levels] == widths  # type: ignore[union-attr]


@pytest.mark.parametrize("option", ["secret_bits", "encoder_epochs", "encoder_lr"])
def test_budgets_are_positive(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} 0"):
        SSBA.parse({option: 0})
