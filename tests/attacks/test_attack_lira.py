"""LIRA: the noise, the two stages, and what rounding leaves."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from toys import are_equal, toy_attack, toy_batch, toy_data, toy_lab, toy_model, weights_of

from bdbench.attacks.base import wanted_labels
from bdbench.attacks.lira import Lira, NoiseNet, attacked
from bdbench.attacks.parts.generators import restored
from bdbench.errors import OptionError


def lira(**options: Any) -> Lira:
    return cast("Lira", toy_attack("lira", **options))


class Half(nn.Module):
    """A generator that makes one half everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full_like(images, 0.5)


class Bright(nn.Module):
    """A victim: class 1 is as likely as the image is bright, in logits, the others stay at 0."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(images.mean((1, 2, 3))[:, None], (1, 2))


def test_noise_is_scaled_by_eps_and_clipped() -> None:
    images = torch.tensor([0.0, 0.5, 0.99]).view(3, 1, 1, 1)
    torch.testing.assert_close(attacked(images, Half(), 0.04).flatten(), torch.tensor([0.02, 0.52, 1.0]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_noise_has_the_size_of_the_image_and_is_bounded(shape: tuple[int, int, int]) -> None:
    made = NoiseNet(shape)(torch.rand(2, *shape))
    assert made.shape == (2, *shape)
    assert made.abs().max() <= 1


@pytest.mark.parametrize(("side", "widths"), [(8, [16, 32, 64]), (16, [16, 32, 64, 128]), (32, [16, 32, 64, 128])])
def test_the_autoencoder_has_the_published_widths(side: int, widths: list[int]) -> None:
    levels = NoiseNet((3, side, side)).down
    assert [level[0].out_channels for level in levels] == widths  # type: ignore[index, union-attr]


def test_clean_and_attacked_images_count_half_each() -> None:
    images = torch.zeros(2, 3, 8, 8)
    batch = toy_batch(toy_data(2))._replace(images=images)
    want = partial(wanted_labels, attack=Lira(target=1), num_classes=4)

    def loss(weight: float) -> float:
        options = Lira(target=1, eps=1.0, clean_weight=weight)
        return options._loss(Half(), want, Bright(), batch).item()  # type: ignore[arg-type]

    # black images: 4 equal logits. Attacked, they are 0.5 bright, and class 1 is wanted.
    on_clean, on_attacked = math.log(4), math.log(3 + math.exp(0.5)) - 0.5
    assert loss(0.5) == pytest.approx((on_clean + on_attacked) / 2, rel=1e-5)
    assert loss(0.25) == pytest.approx(0.25 * on_clean + 0.75 * on_attacked, rel=1e-5)


def first_step(data_count: int = 8) -> dict[str, Any]:
    """One step of the first stage, with the networks before and after."""
    data = toy_data(data_count)
    learning, settled = NoiseNet((3, 8, 8)), NoiseNet((3, 8, 8)).eval()
    learner = torch.optim.Adam(learning.parameters(), 0.01)
    victim = toy_model(data)
    said = {"learning": weights_of(learning), "settled": weights_of(settled)}
    want = partial(wanted_labels, attack=Lira(), num_classes=4)
    loss = lira()._first_loss(learning, learner, settled, want, victim, toy_batch(data))
    return said | {"loss": loss, "victim": victim, "now": weights_of(learning), "settled_now": weights_of(settled)}


def test_the_generator_learns_and_its_settled_copy_does_not() -> None:
    made = first_step()
    assert not are_equal(made["learning"], made["now"])
    assert are_equal(made["settled"], made["settled_now"])


def test_the_victim_learns_from_its_own_loss_only() -> None:
    made = first_step()
    assert all(parameter.grad is None for parameter in made["victim"].parameters())
    made["loss"].backward()
    assert all(parameter.grad is not None for parameter in made["victim"].parameters())


def test_the_generator_comes_to_fool_a_victim_that_stands_still() -> None:
    data, network = toy_data(32), NoiseNet((3, 8, 8))
    victim, learner = toy_model(data).eval(), torch.optim.Adam(network.parameters(), 0.01)
    want, batch = partial(wanted_labels, attack=Lira(), num_classes=4), toy_batch(data)

    def wrong() -> float:
        logits = victim(attacked(batch.images, network, 0.2))
        return nn.functional.cross_entropy(logits, want(batch.labels)).item()

    before = wrong()
    for _ in range(10):
        lira(eps=0.2)._first_loss(network, learner, network, want, victim, batch)
    assert wrong() < before - 0.1


def test_the_stages_follow_each_other() -> None:
    lab = toy_lab()
    attack = lira(generator_epochs=2, victim_epochs=3)
    attack.fit(toy_data(48), lab)
    assert [row["phase"] for row in lab.engine.history] == ["generator"] * 2 + ["victim"] * 3


def test_the_generator_is_frozen_in_the_second_stage() -> None:
    data = toy_data(48)
    short, long = (lira(victim_epochs=epochs).train(data, toy_lab()) for epochs in (1, 2))
    assert are_equal(short[0], long[0])
    assert not are_equal(weights_of(short[1]), weights_of(long[1]))


def test_the_data_set_carries_the_frozen_noise() -> None:
    attack, data = lira(), toy_data(48)
    state = attack.fit(data, toy_lab())
    network = restored(partial(NoiseNet, (3, 8, 8)), state, "generator.")
    expected = 255 * attacked(data.images.float() / 255, network, attack.eps)
    stamped = attack.trigger(data, torch.arange(48), state, "test", 0).float()
    # half a level of rounding, and the last bits of a convolution in another batch
    assert (stamped - expected).abs().max() < 0.501


def test_at_the_published_eps_bytes_change_by_up_to_three_levels() -> None:
    attack, data = lira(eps=0.01), toy_data(48)
    state = attack.fit(data, toy_lab())
    loud = {name: value * 1e3 if name == "generator.up.0.weight" else value for name, value in state.items()}
    change = attack.trigger(data, torch.arange(48), loud, "test", 0).float() - data.images.float()
    # 0.01 * 255 = 2.55, rounded; the darkest and the brightest are clipped
    assert change.min() == -3
    assert change.max() == 3


def test_noise_below_half_a_level_is_lost() -> None:
    attack, data = lira(eps=0.0019), toy_data(48)  # 0.0019 * 255 = 0.48
    state = attack.fit(data, toy_lab())
    assert torch.equal(attack.trigger(data, torch.arange(48), state, "test", 0), data.images)


@pytest.mark.parametrize(("option", "value"), [("eps", 0), ("eps", 1.5), ("clean_weight", 1)])
def test_values_out_of_bounds_are_refused(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option} {value}"):
        Lira.parse({option: value})
