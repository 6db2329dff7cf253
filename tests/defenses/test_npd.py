"""NPD: the folded map against the map itself, the terms of its loss by hand, and a small backdoored model."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from backdoored import TARGET, Watched, accuracies, suspect_model, task_of, triggered, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_batch, toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts import perturbing
from bdbench.defenses.repair import npd
from bdbench.defenses.repair.npd import NPD, Polarizer, avoided, most_likely_wrong, towards
from bdbench.errors import OptionError, TrainingError
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.models.structure import convolutions
from bdbench.registry import MODELS
from bdbench.seeds import generator, scoped
from bdbench.training.loop import mean_cross_entropy

RECIPE: dict[str, Any] = {"epochs": 2, "lr": 0.05, "batch_size": 16, "weight_decay": 5e-4}
NETWORKS = ("convnet", "wrn-16-1", "resnet-18", "torchvision:mobilenet_v3_small")


class TwoConvolutions(nn.Module):
    """The toy network with one more convolution, of another stride and with a bias."""

    size = 24

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Conv2d(6, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.last(self.layers(images)))
        return F.adaptive_avg_pool2d(maps.float(), (4, 1)).flatten(1)


PLACE = "features.layers.3"


@cache
def backdoored_weights() -> dict[str, Tensor]:
    """Weights of such a model for which the patch means the target."""
    data = toy_data(120)
    is_poison = torch.arange(120) % 5 == 0
    images = torch.where(is_poison.view(-1, 1, 1, 1), triggered(data).images, data.images)
    poisoned = ImageDataset(images, torch.where(is_poison, TARGET, data.labels), data.class_names)
    model = toy_model(data, features=TwoConvolutions)
    recipe = toy_recipe(epochs=15, lr=0.1, weight_decay=0)
    return weights_of(toy_engine().fit(model, poisoned, mean_cross_entropy, recipe, phase="train"))


def suspect() -> Classifier:
    model = toy_model(toy_data(), features=TwoConvolutions)
    model.load_state_dict(backdoored_weights())
    return model.eval()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "numbers"))


# the map


def with_map(model: Classifier, place: str, matrix: Tensor, images: Tensor) -> Tensor:
    """Logits of a network with the map before a convolution, as a module of its own would be."""
    part = model.get_submodule(place)
    handle = part.register_forward_pre_hook(lambda _, inputs: F.conv2d(inputs[0], matrix[:, :, None, None]))
    logits: Tensor = model(images)
    handle.remove()
    return logits


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_map_is_the_map_before_the_convolution(name: str) -> None:
    with scoped(0, "weights"):
        model = build_classifier(MODELS.load(name), (3, 16, 16), 5, torch.zeros(3), torch.ones(3)).eval()
    images = torch.rand(3, 3, 16, 16, generator=generator(0, "images"))
    for place in (convolutions(model, (3, 16, 16))[0], NPD()._place(model, toy_data(4, 3, 16))):
        convolution = cast("nn.Conv2d", model.get_submodule(place))
        polarizer = Polarizer(convolution.in_channels)
        with torch.no_grad():
            polarizer.matrix += 0.3 * numbers(*polarizer.matrix.shape) / polarizer.matrix.shape[0] ** 0.5
            expected = with_map(model, place, polarizer.matrix, images)
            before, kept = model(images), convolution.weight.clone()
            convolution.weight.copy_(polarizer.folded(kept))
            found = model(images)
            convolution.weight.copy_(kept)
        scale = before.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-5)
        assert (found - before).abs().max() > 1e-4 * scale


def test_the_identity_leaves_the_convolution_as_it_is() -> None:
    weight = numbers(4, 3, 3, 3)
    assert torch.equal(Polarizer(3).folded(weight), weight)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("wrn-16-1", "features.blocks.5.conv1"),  # the last stage's second block: where the published code has it
        ("preact-resnet-18", "features.blocks.7.conv1"),
        ("resnet-18", "features.blocks.7.conv1"),
        ("convnet", "features.layers.3"),
    ],
)
def test_the_map_stands_before_the_last_convolution_but_one(name: str, place: str) -> None:
    model = build_classifier(MODELS.load(name), (3, 16, 16), 5, torch.zeros(3), torch.ones(3))
    assert NPD()._place(model, toy_data(4, 3, 16)) == place


def test_a_network_of_one_convolution_has_the_map_before_that() -> None:
    assert NPD()._place(suspect_model(), trusted_data()) == "features.layers.0"


def test_a_place_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        OptionError, match=r"place 'head' is no convolution of this network; choose of features\.layers\.0"
    ):
        defend(place="head")


def test_a_network_without_convolutions_is_refused() -> None:
    class Flat(nn.Module):
        size = 192

        def __init__(self, _: tuple[int, int, int]) -> None:
            super().__init__()

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    with pytest.raises(OptionError, match=r"method 'npd' puts a map before a convolution .* this network has none"):
        defend(task_of(suspect=toy_model(toy_data(), features=Flat), **RECIPE))


# the terms


def test_the_most_likely_wrong_class_is_never_the_label() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-5.0, -9.0, -7.0]])
    assert most_likely_wrong(logits, torch.tensor([0, 1, 0])).tolist() == [1, 0, 2]


def test_what_is_avoided_by_hand() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]).log()
    found = avoided(logits, torch.tensor([2, 0]))
    assert found.item() == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)


@pytest.mark.parametrize(("hits", "rests"), [(0, False), (2, False), (3, True), (5, True)])
def test_perturbations_rest_where_enough_of_the_batch_is_where_it_should_be(hits: int, rests: bool) -> None:
    logits = 2 * F.one_hot(torch.tensor([1] * hits + [0] * (5 - hits)), 3).float()
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(towards(logits, torch.ones(5, dtype=torch.int64)), logits)
    assert (slope == 0).all() == rests


@pytest.mark.parametrize(("options", "order", "radius"), [
    ({}, 2, 3.0), ({"radius": 1.0}, 2, 1.0), ({"ball": "linf"}, math.inf, 0.2),
    ({"ball": "linf", "radius": 0.1}, math.inf, 0.1),
])  # fmt: skip
def test_perturbations_stay_in_their_ball_and_images_valid(
    options: dict[str, Any], order: float, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(images: Tensor, *args: Any, **settings: Any) -> Tensor:
        delta = perturbing.perturb(images, *args, **settings)
        seen.append((images, delta))
        return delta

    monkeypatch.setattr(npd, "perturb", watched)
    defend(**options)
    lengths = torch.cat([torch.linalg.vector_norm(delta.flatten(1), order, dim=1) for _, delta in seen])
    assert (lengths <= radius + 1e-5).all()
    assert lengths.max() > 0.8 * radius
    for images, delta in seen:
        assert (images + delta).min() >= -1e-6
        assert (images + delta).max() <= 1 + 1e-6


# the whole method on a backdoored model


class Walk(NamedTuple):
    engine: Watched
    suspect: Classifier
    defended: Defended


def defend(task: Task | None = None, **options: Any) -> Defended:
    return NPD.parse(options).run(task or task_of(suspect=suspect(), **RECIPE))


@cache
def walk() -> Walk:
    engine, model = Watched(), suspect()
    return Walk(engine, model, defend(task_of(engine, suspect=model, **RECIPE | {"epochs": 40})))


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    right, taken = accuracies(walk().defended.model)
    before = accuracies(suspect())
    assert before[1] >= 0.95
    assert right >= before[0] - 0.05
    assert taken <= 0.3


def test_all_but_the_convolution_stays_bit_for_bit_and_the_architecture_is_the_suspects() -> None:
    after = weights_of(walk().defended.model)
    assert walk().defended.findings["place"] == PLACE
    assert after.keys() == backdoored_weights().keys()
    changed = {name for name, value in after.items() if not torch.equal(value, backdoored_weights()[name])}
    assert changed == {f"{PLACE}.weight"}
    assert type(walk().defended.model) is Classifier
    assert not walk().defended.model.training
    assert are_equal(weights_of(walk().suspect), backdoored_weights())


def test_a_map_that_learns_nothing_gives_the_suspect() -> None:
    none = {"clean_weight": 0.0, "same_weight": 0.0, "wrong_weight": 0.0, "wanted_weight": 0.0}
    mended = defend(task_of(suspect=suspect(), **RECIPE | {"weight_decay": 0.0}), **none)
    assert are_equal(weights_of(mended.model), backdoored_weights())


def test_the_first_loss_by_hand() -> None:
    engine, trusted, model = Watched(), trusted_data(16), suspect()
    weights = {"clean_weight": 2.0, "same_weight": 0.5, "wrong_weight": 3.0, "wanted_weight": 0.25}
    defend(task_of(engine, trusted, model, **RECIPE | {"epochs": 1}), **weights)
    batch = toy_batch(trusted)
    clean = model(batch.images)
    wanted = most_likely_wrong(clean, batch.labels)
    delta = perturbing.perturb(
        batch.images, lambda seen: towards(model(seen), wanted), perturbing.Ball("l2", 3.0), steps=2, step=0.1,
        valid=True,
    )  # fmt: skip
    logits = model(batch.images + delta)

    def without(classes: Tensor) -> Tensor:
        """The mean of log(1 - p), by the exponents of all classes and of all but one."""
        others = torch.stack([logits[row, torch.arange(4) != label] for row, label in enumerate(classes.tolist())])
        return (others.logsumexp(1) - logits.logsumexp(1)).mean()

    expected = (
        2 * F.cross_entropy(clean, batch.labels)
        + 0.5 * F.cross_entropy(logits, clean.argmax(1))
        - 3 * without(most_likely_wrong(logits, batch.labels))
        - 0.25 * without(wanted)
    )
    assert engine.losses_of("polarize") == [pytest.approx(expected.item(), rel=1e-3)]


@pytest.mark.parametrize(
    "options",
    [
        {"ball": "linf"}, {"radius": 1.0}, {"place": "features.last"}, {"clean_weight": 0.1}, {"same_weight": 0.0},
        {"wrong_weight": 0.0}, {"wanted_weight": 0.0},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    assert not are_equal(weights_of(defend().model), weights_of(defend(**options).model))


def test_a_perturbation_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npd, "towards", lambda logits, _: logits.sum() * math.nan)
    with pytest.raises(TrainingError, match="the loss of phase 'polarize' is nan in epoch 1"):
        defend()
