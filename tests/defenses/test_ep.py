"""EP and BNP: entropies and divergences by hand, and the channels that they prune."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backdoored import accuracies, suspect_model, task_of, triggered, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_data, toy_engine, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.channels import norm_inputs
from bdbench.defenses.repair.ep import EntropyPruning, MomentPruning, centred_moments, divergence, entropies
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import named_norms, norms_of
from bdbench.seeds import generator, scoped
from bdbench.training.augment import augmented

TARGET = 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=torch.float64)


# entropies


def test_the_entropy_of_four_equal_groups_is_that_of_four() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(5)[:, None]
    assert entropies(values, 0.1).item() == pytest.approx(math.log(4))


def test_the_entropy_by_hand() -> None:
    # standardised, the four lie at -0.577 (thrice) and 1.732: shares of 3/4 and 1/4
    values = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]
    assert entropies(values, 0.1).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_entropy_of_a_constant_column_is_0() -> None:
    values = torch.stack([torch.full((9,), 0.1), torch.arange(9.0)], 1)
    found = entropies(values, 0.1)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(math.log(9))


def test_moving_and_stretching_the_values_leaves_the_entropy() -> None:
    values = noise(500, 3)
    torch.testing.assert_close(entropies(values * 8 + 3, 0.1), entropies(values, 0.1), atol=0.02, rtol=0)


def test_the_entropy_of_a_normal_distribution_is_known() -> None:
    # ln(sqrt(2 pi e)) - ln(width), less about (bins - 1) / 2n for n finite
    found = entropies(noise(200_000, 1), 0.1).item()
    assert found == pytest.approx(0.5 * math.log(2 * math.pi * math.e) - math.log(0.1), abs=0.01)


def test_two_groups_have_less_entropy_than_one() -> None:
    one, other = noise(2500), noise(2500)
    other[:250] += 10
    found = entropies(torch.stack([one, other], 1), 0.1)
    assert found[1] < found[0] - 0.5


# divergences


def norm_of(mean: list[float], variance: list[float], eps: float = 0.0) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(mean), eps=eps)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor(mean))
    norm.running_var.copy_(torch.tensor(variance))
    return norm


def kl(norm: nn.BatchNorm2d, mean: list[float], variance: list[float]) -> list[float]:
    """The divergence of inputs with these moments, away from the running mean."""
    away = torch.tensor(mean, dtype=torch.float64)
    return divergence(norm, away, torch.tensor(variance, dtype=torch.float64) + away.square()).tolist()  # type: ignore[no-any-return]


def test_equal_statistics_have_no_divergence() -> None:
    assert kl(norm_of([1.0, -3.0], [4.0, 0.25]), [0.0, 0.0], [4.0, 0.25]) == pytest.approx([0, 0], abs=1e-12)


def test_the_divergence_by_hand() -> None:
    # log(s2 / s1) + (s1^2 + d^2) / (2 s2^2) - 1/2
    norm = norm_of([1.0, 0.0], [4.0, 1.0])
    expected = [math.log(2 / 1) + (1 + 9) / 8 - 0.5, math.log(1 / 3) + 9 / 2 - 0.5]
    assert kl(norm, [3.0, 0.0], [1.0, 9.0]) == pytest.approx(expected)


def test_the_divergence_is_never_negative() -> None:
    """That of BackdoorBench is, where the variance is 1 to 3.5 times the usual one."""
    ratios = [0.1, 0.5, 0.99, 1.01, 1.5, 2.0, 3.0, 10.0]
    assert min(kl(norm_of([0.0] * 8, [1.0] * 8), [0.0] * 8, ratios)) > 0


def test_it_is_torchs() -> None:
    norm = norm_of([0.5], [2.0])
    one = torch.distributions.Normal(0.9, 3**0.5)
    other = torch.distributions.Normal(0.5, 2**0.5)
    assert kl(norm, [0.4], [3.0]) == pytest.approx([torch.distributions.kl_divergence(one, other).item()], rel=1e-5)


def test_a_dead_channel_has_a_finite_divergence() -> None:
    assert kl(norm_of([0.0, 0.0], [0.0, 0.0], eps=1e-5), [0.0, 0.0], [0.0, 1e-5]) == pytest.approx(
        [0.0, math.log(1 / 2) / 2 + 0.5]
    )


def test_moments_are_those_of_all_places_less_the_running_mean() -> None:
    norm, inputs = norm_of([1.0, 2.0, 3.0], [1.0] * 3), noise(4, 3, 5).float()
    mean, square = centred_moments(norm, inputs).mean(0)
    centred = inputs - torch.tensor([1.0, 2.0, 3.0]).view(3, 1)
    torch.testing.assert_close(mean, centred.mean((0, 2)))
    torch.testing.assert_close(square, centred.square().mean((0, 2)))


# what enters a norm


def test_what_enters_a_norm_is_the_output_of_its_convolution() -> None:
    model, data = suspect_model(), trusted_data(70)  # more than one batch of a pass on a CPU holds
    found = norm_inputs(toy_engine(), model, data.images, named_norms(model, "ep"), lambda _, inputs: inputs)
    with torch.no_grad():
        expected = model.features.layers[0]((data.images.float() / 255 - 0.5) / 0.5)
    assert list(found) == ["features.layers.1"]
    torch.testing.assert_close(found["features.layers.1"], expected.flatten(2))
    assert not any(part._forward_pre_hooks for part in model.modules())


# the methods


class Split(nn.Module):
    """Twelve channels, each the brightness of the image in another scale; the last one sees a white corner."""

    size = 12

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(12)

    def forward(self, images: Tensor) -> Tensor:
        maps = images.mean((1, 2, 3), keepdim=True) * torch.linspace(1, 3, 12).view(12, 1, 1)
        corner = (images[:, :1, 6:, 6:] > 0.99).all(dim=3, keepdim=True).all(dim=2, keepdim=True)
        maps = torch.cat([maps[:, :11], maps[:, 11:] + 10 * corner], 1)
        return self.norm(maps).amax((2, 3))


def split_model() -> Classifier:
    with scoped(0, "weights"):
        model = Classifier(Split(), 4, torch.zeros(3), torch.ones(3))
    assert model.features.norm.bias is not None
    with torch.no_grad():
        model.features.norm.bias.fill_(0.5)
        model.features.norm.momentum = None  # statistics of all batches so far
        for part in poisoned_data().images.split(40):
            model.train()(part.float() / 255)
    return model.eval()


def poisoned_data(count: int = 400) -> ImageDataset:
    """A tenth has a white corner."""
    data = toy_data(count)
    images = data.images.clone()
    images[::10, :, 6:, 6:] = 255
    return ImageDataset(images, data.labels, data.class_names)


def split_task(**changes: Any) -> Task:
    task = task_of(suspect=split_model(), trusted=toy_data(80, seed=2))
    return replace(task, train=poisoned_data(), **changes)


METHODS = {"ep": EntropyPruning, "bnp": MomentPruning}
every_method = pytest.mark.parametrize("name", METHODS)


def mended(name: str, task: Task | None = None, **options: Any) -> Defended:
    return METHODS[name].parse(options).run(task or split_task())


@every_method
def test_the_channel_of_the_backdoor_is_pruned_and_no_other(name: str) -> None:
    task = split_task()
    defended = mended(name, task)
    assert defended.findings == {
        "said": "1 of 12 channels pruned", "unchanged": False, "channels": 12, "pruned": {"features.norm": 1},
    }  # fmt: skip
    assert task.suspect is not None
    before, after = weights_of(task.suspect), weights_of(defended.model)
    assert after["features.norm.weight"].tolist() == [1.0] * 11 + [0.0]
    assert are_equal(after, before | {"features.norm.weight": after["features.norm.weight"]})


@every_method
def test_the_bias_becomes_0_too_if_told(name: str) -> None:
    state = weights_of(mended(name, zeroed="both").model)
    assert state["features.norm.bias"].tolist() == [0.5] * 11 + [0.0]


@every_method
def test_an_endless_limit_returns_the_suspect_itself(name: str) -> None:
    task = split_task()
    defended = mended(name, task, deviations=1e30)
    assert defended.model is task.suspect
    assert defended.findings["unchanged"]
    assert defended.findings["pruned"] == {}


@every_method
def test_the_suspect_is_not_touched(name: str) -> None:
    task = split_task()
    mended(name, task)
    assert task.suspect is not None
    assert are_equal(weights_of(task.suspect), weights_of(split_model()))


@every_method
def test_labels_are_not_looked_at(name: str) -> None:
    task = split_task()
    assert task.trusted is not None

    def turned(data: ImageDataset) -> ImageDataset:
        return ImageDataset(data.images, data.labels.flip(0), data.class_names)

    other = mended(name, replace(task, train=turned(task.train), trusted=turned(task.trusted)))
    assert are_equal(weights_of(other.model), weights_of(mended(name, task).model))


def test_ep_looks_at_training_images_and_needs_no_trusted_ones() -> None:
    assert not EntropyPruning.needs_trusted
    assert mended("ep", replace(split_task(), trusted=None)).findings["pruned"] == {"features.norm": 1}
    clean = replace(split_task(), train=toy_data(400))
    assert mended("ep", clean).findings["unchanged"]


def test_bnp_compares_clean_images_with_the_statistics_of_training() -> None:
    """Where the norm's own statistics are clean too, nothing differs; training images are not looked at."""
    assert mended("bnp", replace(split_task(), train=toy_data(8))).findings["pruned"] == {"features.norm": 1}
    suspect = split_model()
    with torch.no_grad():
        suspect.features.norm.reset_running_stats()
        suspect.train()(toy_data(80, seed=2).images.float() / 255)
    found = mended("bnp", replace(split_task(), suspect=suspect.eval()))
    assert found.findings["unchanged"]


def test_bnp_leaves_what_the_norm_remembers_as_it_is() -> None:
    """In the code of BackdoorBench what went through last takes its place."""
    task = split_task()
    before, after = weights_of(split_model()), weights_of(mended("bnp", task).model)
    for name in ("features.norm.running_mean", "features.norm.running_var"):
        assert torch.equal(before[name], after[name])


def test_bnp_augments_as_the_suspect_was_trained() -> None:
    """A suspect that saw crops with black borders is compared with crops."""
    trusted = toy_data(400, seed=2)
    suspect = toy_model(trusted)
    (norm,) = norms_of(suspect)
    norm.momentum = None
    engine = toy_engine()
    with torch.no_grad():
        suspect.train()
        suspect(augmented(toy_data(400).images, ("crop",), generator(0, "crops")))
    suspect.eval()

    def divergences(augment: str) -> Tensor:
        seen: list[Tensor] = []
        method = MomentPruning()
        task = task_of(engine, trusted, suspect)
        task = replace(task, recipe=task.recipe.model_copy(update={"augment": augment}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "bdbench.defenses.repair.ep.divergence",
                lambda *given: seen.append(divergence(*given)) or seen[-1],  # type: ignore[func-returns-value]
            )
            method.run(task)
        return seen[0]

    assert divergences("crop").max() < 0.1 * divergences("none").max()


@every_method
def test_so_many_images_are_looked_at_and_the_seed_draws_which(name: str) -> None:
    task = split_task()
    images = poisoned_data().images
    method = METHODS[name].parse({"images": 30})
    one, same, other = (
        method.sample(replace(task, engine=replace(task.engine, seed=seed)), images) for seed in (0, 0, 1)
    )
    assert len(one) == 30
    assert len({image.numpy().tobytes() for image in one}) == 30
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(method.sample(task, images[:7])) == 7


@every_method
def test_one_image_has_no_statistics(name: str) -> None:
    task = split_task()
    assert task.trusted is not None
    one = torch.arange(1)
    with pytest.raises(OptionError, match="statistics of channels take at least 2 images, and here are 1"):
        mended(name, replace(task, train=task.train.take(one), trusted=task.trusted.take(one)))


def test_a_constant_channel_neither_hides_another_nor_is_pruned() -> None:
    task = split_task()
    model = split_model()

    class Dead(nn.Module):
        size = 12

        def __init__(self) -> None:
            super().__init__()
            self.inner = model.features
            self.norm = nn.BatchNorm2d(24)

        def forward(self, images: Tensor) -> Tensor:
            embedding: Tensor = self.inner(images)
            wide = torch.cat([embedding, torch.ones_like(embedding)], 1)[:, :, None, None]
            return self.norm(wide)[:, :12, 0, 0]

    suspect = Classifier(Dead(), 4, torch.zeros(3), torch.ones(3)).eval()
    found = mended("ep", replace(task, suspect=suspect))
    assert found.findings["pruned"] == {"features.inner.norm": 1, "features.norm": 1}
    state = weights_of(found.model)
    assert state["features.norm.weight"].tolist() == [1.0] * 11 + [0.0] + [1.0] * 12


@every_method
def test_a_network_without_norms_is_refused(name: str) -> None:
    suspect = toy_model(toy_data())
    suspect.features.layers = nn.Sequential(nn.Conv2d(3, 6, 3))
    with pytest.raises(OptionError, match=f"method '{name}' works on batch norms"):
        mended(name, replace(split_task(), suspect=suspect))


def test_bnp_refuses_norms_that_remember_nothing() -> None:
    suspect = toy_model(toy_data())
    suspect.features.layers[1] = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(OptionError, match="method 'bnp' works on the running statistics of batch norms"):
        mended("bnp", replace(split_task(), suspect=suspect))


def test_the_backdoor_of_the_split_model_is_gone() -> None:
    """Its head answers bee where the last channel is high."""
    task = split_task()
    assert task.suspect is not None
    with torch.no_grad():
        task.suspect.head.weight.zero_()
        task.suspect.head.weight[TARGET, 11] = 1.0
    corners = poisoned_data(400).images[::10]
    before = toy_engine().logits(task.suspect, corners)[:, TARGET]
    clean = toy_engine().logits(task.suspect, toy_data(40, seed=3).images)[:, TARGET]
    assert before.min() > clean.max() + 1
    for name in METHODS:
        after = toy_engine().logits(mended(name, task).model, corners)[:, TARGET]
        assert after.std() == 0


@every_method
def test_a_small_network_that_is_too_narrow_is_told_so(name: str) -> None:
    assert accuracies(suspect_model())[1] > 0.9
    assert len(triggered(trusted_data())) == 32
    found = mended(name, task_of())
    assert "of 6 channels, the most that a layer has, none can lie more than 2.04" in found.findings["said"]
