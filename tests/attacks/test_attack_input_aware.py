"""Input-aware: the formulas, what a batch holds, and the replay."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import toy_attack, toy_batch, toy_data, toy_lab

from bdbench.attacks.base import Attack, State
from bdbench.attacks.input_aware import InputAware, TriggerNet, sameness, sharpened, squashed
from bdbench.attacks.parts.generators import fresh, restored, weights_of
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


class Constant(nn.Module):
    """A network that makes one value everywhere, in one channel."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        return torch.full_like(images[:, :1], self.value)


class Witness(nn.Module):
    """A victim that keeps what it is shown and answers with zeros."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return torch.zeros(len(images), 4)


def parts_of_loss(attack: Attack, pattern: nn.Module, mask: nn.Module, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The images of a batch, what the victim saw of them, and the loss."""
    assert isinstance(attack, InputAware)
    batch, victim = toy_batch(toy_data(count)), Witness()
    loss = attack._joint_loss(pattern, mask, 0.25, 4, victim, batch)  # type: ignore[arg-type]
    return batch.images, victim.seen, loss


def test_squashing_and_sharpening() -> None:
    values = torch.tensor([-50.0, 0.0, 50.0])
    torch.testing.assert_close(squashed(values), torch.tensor([0.0, 0.5, 1.0]))
    # tanh(2) / 2 + 1 / 2 = 0.982
    expected = torch.tensor([0.018, 0.5, 0.982, 1.0])
    torch.testing.assert_close(sharpened(torch.tensor([0.4, 0.5, 0.6, 1.0])), expected, atol=1e-3, rtol=0)


def test_sameness_compares_neighbours() -> None:
    images, made = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    images[1], made[1] = 0.5, 0.1
    # root mean squares 0.5 and 0.1, whatever the number of channels
    assert sameness(images, made).item() == pytest.approx(5, rel=1e-4)


def test_sameness_is_large_where_all_get_one_trigger() -> None:
    assert sameness(torch.rand(4, 3, 4, 4), torch.ones(4, 3, 4, 4)) > 1e5


@pytest.mark.parametrize("count", [1, 3])
def test_sameness_of_equal_images_is_zero_with_a_finite_gradient(count: int) -> None:
    made = torch.full((count, 1, 2, 2), 0.5, requires_grad=True)
    value = sameness(torch.ones(count, 3, 2, 2), made)
    value.backward()
    assert value == 0
    assert made.grad is not None
    assert made.grad.isfinite().all()


def test_the_mask_pays_for_what_it_covers_beyond_its_density() -> None:
    attack = InputAware(diversity=0)
    batch = toy_batch(toy_data(4))
    # 0.6 is sharpened to 0.98201, 0.95001 beyond the density, times 100
    assert attack._mask_loss(Constant(0.6), batch).item() == pytest.approx(95.0, abs=0.01)
    # 0.4 is sharpened to 0.018, below the density
    assert attack._mask_loss(Constant(0.4), batch).item() == 0


def test_the_mask_pays_for_sameness() -> None:
    batch = toy_batch(toy_data(4))
    assert InputAware(mask_weight=0, diversity=0)._mask_loss(Constant(0.6), batch) == 0
    assert InputAware(mask_weight=0)._mask_loss(Constant(0.6), batch) > 1e5


def test_an_image_is_mixed_with_its_pattern_under_the_mask() -> None:
    images, seen, _ = parts_of_loss(InputAware(), Constant(1.0), Constant(0.5))
    # the mask is a half everywhere: 2 of 8 poisoned, 2 covers
    torch.testing.assert_close(seen[:4], (images[:4] + 1) / 2)
    assert torch.equal(seen[4:], images[4:])


def test_covers_get_the_trigger_of_another_image() -> None:
    images, seen, _ = parts_of_loss(InputAware(), nn.Identity(), Constant(50.0))
    # the pattern is the image itself, and covers all: 4 further on in the batch for the covers, rows 2 and 3
    torch.testing.assert_close(seen[:2], images[:2])
    torch.testing.assert_close(seen[2:4], images[6:])


def test_only_the_poisoned_are_called_the_target() -> None:
    class Sure(Witness):
        """Certain of class 3 for all images."""

        def forward(self, images: Tensor) -> Tensor:
            return F.one_hot(torch.full((len(images),), 3), 4) * 100.0

    attack = InputAware(target=3, diversity=0)
    loss = attack._joint_loss(Constant(1.0), Constant(0.5), 0.25, 4, Sure(), toy_batch(toy_data(8)))  # type: ignore[arg-type]
    # labels 0, 1 become 3; 2, 3, 0, 1, 2, 3 stay: 4 of 8 are wrong by 100
    assert loss.item() == pytest.approx(50)


def test_diversity_of_the_patterns_is_added() -> None:
    (_, _, without), (_, _, all_alike) = (
        parts_of_loss(InputAware(diversity=weight), Constant(1.0), Constant(0.5)) for weight in (0.0, 1.0)
    )
    assert without.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert all_alike > 1e5
    # patterns as different as the images are worth 1
    _, _, identity = parts_of_loss(InputAware(), nn.Identity(), Constant(0.5))
    assert identity.item() == pytest.approx(without.item() + 1, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((3, 32, 32), [32, 64, 128]), ((1, 28, 28), [16, 32]), ((3, 8, 8), [32, 64]), ((3, 12, 20), [32, 64])],
)
def test_levels_are_the_published_ones_where_the_image_has_room(shape: tuple[int, int, int], widths: list[int]) -> None:
    network = TriggerNet(shape, 1, None)
    assert [level[0][0].out_channels for level in network.down] == widths  # type: ignore[index, union-attr]
    assert network(torch.rand(2, *shape)).shape == (2, 1, *shape[1:])


def test_a_width_that_is_given_wins() -> None:
    network = TriggerNet((3, 32, 32), 3, 5)
    assert [level[0][0].out_channels for level in network.down] == [5, 10, 20]  # type: ignore[index, union-attr]


# the replay


def vivid() -> tuple[InputAware, State]:
    """An attack with networks of random weights, whose batch norm makes much of how toy images differ."""
    attack, state = cast("InputAware", toy_attack("input-aware")), {}
    for channels, name in ((None, "pattern."), (1, "mask.")):
        network = fresh(attack._network((3, 8, 8), channels), 0, name, torch.device("cpu"))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network(toy_batch(toy_data(48)).images)
        state |= weights_of(network, name)
    return attack, state


def mixed(attack: InputAware, state: State, images: Tensor, sources: Tensor) -> Tensor:
    """The formula, by hand: images and sources (B, 3, 8, 8) uint8."""
    shown = sources.float() / 255
    pattern, mask = (
        restored(attack._network((3, 8, 8), channels), state, name)
        for channels, name in ((None, "pattern."), (1, "mask."))
    )
    weight = sharpened(mask(shown))
    return (images + weight * (255 * pattern(shown) - images)).round().clamp(0, 255)


def test_the_data_set_replays_the_frozen_networks() -> None:
    attack, state = vivid()
    data = toy_data(6)
    stamped = attack.trigger(data, torch.arange(6), state, "test", 0)
    difference = stamped.float() - mixed(attack, state, data.images, data.images)
    # a convolution in another batch may differ in its last bits, and a half may then be rounded the other way
    assert difference.abs().max() <= 1


def test_covers_in_the_data_set_carry_the_trigger_of_the_other_image() -> None:
    attack, state = vivid()
    data = toy_data(2)
    stamped = attack.trigger(data, torch.arange(2), state, "cover", 0)
    assert (stamped.float() - mixed(attack, state, data.images, data.images.flip(0))).abs().max() <= 1
    assert not torch.equal(stamped, attack.trigger(data, torch.arange(2), state, "poison", 0))


def test_covers_do_not_all_take_one_image() -> None:
    attack, state = vivid()
    one = toy_data(1)
    same = ImageDataset(one.images.repeat(8, 1, 1, 1), one.labels.repeat(8), one.class_names)
    same.images[4:] = toy_data(4, seed=3).images
    stamped = attack.trigger(same, torch.arange(4), state, "cover", 0)
    assert len(torch.unique(stamped, dim=0)) > 1


def test_the_mask_learns_first_and_then_stays() -> None:
    attack, data, lab = toy_attack("input-aware", victim_epochs=2), toy_data(48), toy_lab()
    state = attack.fit(data, lab)
    assert [row["phase"] for row in lab.engine.history] == ["mask", "victim", "victim"]
    shorter = toy_attack("input-aware", victim_epochs=1).fit(data, toy_lab())
    for name in state:
        if name.startswith("mask."):
            assert torch.equal(state[name], shorter[name])
    weight = "pattern.middle.0.0.weight"
    assert not torch.equal(state[weight], shorter[weight])


def test_a_state_holds_both_networks() -> None:
    state = toy_attack("input-aware").fit(toy_data(48), toy_lab())
    assert {name.partition(".")[0] for name in state} == {"pattern", "mask"}


@pytest.mark.parametrize("option", ["mask_epochs", "generator_lr", "generator_width"])
def test_budgets_are_positive(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} 0"):
        InputAware.parse({option: 0})
