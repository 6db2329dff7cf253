"""NAD: attention and its distance by hand, teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import Fuse, are_equal, toy_batch, toy_engine, toy_model, weights_of

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.nad import NeuralAttentionDistillation, attention_of, distances
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.models.convnet import ConvNet
from bdbench.models.structure import stages_of
from bdbench.models.wide_resnet import WideResNet
from bdbench.progress import Silent
from bdbench.seeds import generator, scoped
from bdbench.training.loop import mean_cross_entropy


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"))


def distance(maps: Tensor, wanted: Tensor, power: float = 2.0) -> float:
    (found,) = distances([maps], [wanted], power)
    return found.item()


def mended(task: Task | None = None, **options: Any) -> Defended:
    return NeuralAttentionDistillation.parse({"teacher_epochs": 2} | options).run(task or task_of(epochs=2, lr=0.05))


# attention


def test_attention_by_hand() -> None:
    # two channels at two places: 1 + 4 and 0 + 144; lengths sqrt(25 + 144^2)
    maps = torch.tensor([[[[1.0, 0.0]], [[-2.0, 12.0]]]])
    length = (25 + 144**2) ** 0.5
    torch.testing.assert_close(attention_of(maps, 2.0), torch.tensor([[5 / length, 144 / length]]))
    torch.testing.assert_close(attention_of(maps, 1.0), torch.tensor([[3 / 153**0.5, 12 / 153**0.5]]))


def test_equal_maps_have_no_distance() -> None:
    assert distance(noise(4, 3, 5, 5), noise(4, 3, 5, 5)) == 0


def test_attention_on_different_places_is_as_far_apart_as_can_be() -> None:
    one, other = torch.zeros(2, 3, 1, 2), torch.zeros(2, 3, 1, 2)
    one[..., 0], other[..., 1] = 3.0, 7.0
    assert distance(one, other) == pytest.approx(2.0, abs=1e-5)


def test_the_distance_is_a_mean_over_images_and_a_sum_over_places() -> None:
    # the second image of both is alike
    one, other = torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4)
    one[0, ..., 1:] = 0  # (1, 0, 0, 0) against (.5, .5, .5, .5): 0.25 + 3 * 0.25
    assert distance(one, other) == pytest.approx(1.0 / 2, abs=1e-5)


@pytest.mark.parametrize("scale", [0.5, 30.0, -1.0])
def test_the_size_of_a_map_is_no_matter(scale: float) -> None:
    one, other = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1)
    assert distance(scale * one, other) == pytest.approx(distance(one, other), rel=1e-4)


def test_the_order_and_the_number_of_channels_are_no_matter() -> None:
    one, other = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1)
    assert distance(one[:, [2, 0, 1]], other) == pytest.approx(distance(one, other), rel=1e-5)
    assert distance(one.repeat(1, 2, 1, 1), other) == pytest.approx(distance(one, other), rel=1e-5)


def test_a_map_of_one_place_says_nothing() -> None:
    assert distance(noise(4, 3, 1, 1), noise(4, 3, 1, 1, seed=1)) == pytest.approx(0, abs=1e-6)


def test_the_distance_is_at_most_2() -> None:
    for seed in range(5):
        assert 0 < distance(noise(4, 3, 5, 5, seed=seed), noise(4, 3, 5, 5, seed=seed + 9)) <= 2


def test_a_map_of_zeros_has_no_attention_and_a_finite_slope() -> None:
    maps = torch.zeros(2, 3, 2, 2, requires_grad=True)
    attention = attention_of(maps, 2.0)
    attention.sum().backward()
    assert not attention.any()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_the_weights_are_the_published_ones_for_a_sum_over_places() -> None:
    """500, 1,000 and 1,000 times the mean over 32x32, 16x16 and 8x8 places."""
    weights = NeuralAttentionDistillation().attention
    assert [weight * side**2 for weight, side in zip(weights, (32, 16, 8), strict=True)] == [500, 1000, 1000]


# the method


class Two(nn.Module):
    """A toy network with maps of 8x8 and of 4x4 places."""

    size = 24

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.layers(images).float(), (4, 1)).flatten(1)


def test_the_student_is_pulled_to_a_teacher_that_is_fine_tuned_and_frozen() -> None:
    """The first loss of the student by hand: both have another phase's batch norms, and the student is the suspect."""
    engine, data = Watched(), trusted_data()
    suspect = toy_model(data, features=Two).eval()
    task = task_of(engine, data, suspect, epochs=1, batch_size=32)
    mended(task, attention=(9.0, 3.0, 5.0), teacher_epochs=2)
    teacher = toy_engine().fit(
        copied(suspect), data, mean_cross_entropy, task.recipe.model_copy(update={"epochs": 2}), phase="teacher"
    )
    student, batch = copied(suspect).train(), toy_batch(data)
    stages = [(net.features.layers[:3], net.features.layers[3:]) for net in (student, teacher)]
    normed = (batch.images - 0.5) / 0.5
    first, wanted_first = (parts[0](normed) for parts in stages)
    last, wanted_last = stages[0][1](first), stages[1][1](wanted_first)
    logits = student.classify(F.adaptive_avg_pool2d(last, (4, 1)).flatten(1))
    expected = F.cross_entropy(logits, batch.labels)
    expected = expected + 3 * distances([first], [wanted_first], 2.0)[0] + 5 * distances([last], [wanted_last], 2.0)[0]
    assert engine.losses_of("student") == [pytest.approx(expected.item(), rel=1e-4)]


def test_the_teacher_has_its_own_epochs_and_all_else_from_the_recipe() -> None:
    engine = Watched()
    task = task_of(engine, epochs=3, lr=0.02)
    mended(task, teacher_epochs=5)
    assert engine.recipes == {"teacher": task.recipe.model_copy(update={"epochs": 5}), "student": task.recipe}


def test_without_attention_it_is_fine_tuning() -> None:
    data, suspect = trusted_data(), suspect_model()
    task = task_of(trusted=data, suspect=suspect, epochs=2)
    found = mended(task, attention=(0.0, 0.0, 0.0)).model
    plain = toy_engine().fit(copied(suspect), data, mean_cross_entropy, task.recipe, phase="student")
    for name, value in weights_of(found).items():
        torch.testing.assert_close(value, weights_of(plain)[name], rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_a_step() -> None:
    """One pass gives logits and maps; BackdoorBench makes one for each map."""
    found = mended(task_of(epochs=3, batch_size=16)).model  # 32 images, 6 steps
    before = int(weights_of(suspect_model())["features.layers.1.num_batches_tracked"])
    assert int(weights_of(found)["features.layers.1.num_batches_tracked"]) == before + 6


@pytest.mark.parametrize("options", [{"attention": (0.0, 0.0, 1.0)}, {"power": 1.0}, {"teacher_epochs": 1}])
def test_every_option_changes_the_student(options: dict[str, Any]) -> None:
    assert not are_equal(weights_of(mended(**options).model), weights_of(mended().model))


def test_the_suspect_is_not_touched() -> None:
    suspect = suspect_model()
    defended = mended(task_of(suspect=suspect, epochs=1))
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))
    assert defended.model is not suspect
    assert not defended.model.training
    assert all(weight.requires_grad for weight in defended.model.parameters())


@pytest.mark.parametrize(("features", "count"), [(ConvNet, 3), (WideResNet, 3), (Two, 2)])
def test_the_last_three_stages_are_compared_or_as_many_as_there_are(features: type[nn.Module], count: int) -> None:
    data = trusted_data(16)
    with scoped(0, "weights"):
        suspect = build_classifier(features, (3, 8, 8), 4, torch.zeros(3), torch.ones(3)).eval()
    assert len(stages_of(suspect, (3, 8, 8))[-3:]) == count
    mended(task_of(trusted=data, suspect=suspect, epochs=1, lr=0.001), teacher_epochs=1)


def test_a_network_without_maps_is_refused() -> None:
    class Flat(nn.Module):
        size = 192

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    suspect = Classifier(Flat(), 4, torch.zeros(3), torch.ones(3))
    with pytest.raises(OptionError, match="method 'nad' works on the maps that end the stages of a network"):
        mended(task_of(suspect=suspect))


@pytest.mark.parametrize("steps", [3, 9])
def test_an_interruption_in_either_phase_is_made_good(steps: int, tmp_path: Path) -> None:
    def run(folder: Path | None, progress: Silent) -> Classifier:
        task = task_of(toy_engine(folder, progress=progress), epochs=3, batch_size=16, augment="flip")
        return mended(task, teacher_epochs=3).model

    whole = run(None, Silent())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fuse(steps))
    assert are_equal(weights_of(run(tmp_path, Silent())), weights_of(whole))


def test_the_backdoor_fades_and_the_accuracy_holds() -> None:
    assert min(accuracies(suspect_model())) >= 0.95
    task = task_of(trusted=trusted_data(64), epochs=30, lr=0.1)
    right, taken = accuracies(mended(task, teacher_epochs=30).model)
    assert right >= 0.9
    assert taken <= 0.6
