"""LF: the filter, the steps towards the target, and the range of the pattern."""

from __future__ import annotations

import pytest
import torch
from linear import Steps, give_surrogate, linear_model
from torch import Tensor
from toys import flat, toy_data, toy_engine, toy_lab, triggered

from bdbench.attacks.base import Lab
from bdbench.attacks.lf import (
    LowFrequency,
    first_of_each_class,
    low_pass,
    smoothing,
    stretch,
    targeted_steps,
    turned,
)
from bdbench.training.engine import Engine

# the filter


def dot(height: int, width: int) -> Tensor:
    """A single 1 in the middle."""
    pattern = torch.zeros(1, height, width)
    pattern[0, height // 2, width // 2] = 1
    return pattern


def test_a_dot_becomes_a_bell_of_nearly_six_pixels() -> None:
    row = low_pass(dot(64, 32))[0, 32]
    row = row / row.sum()
    places = torch.arange(32.0) - 16
    assert (row * places).sum().item() == pytest.approx(0, abs=1e-4)
    # 6 pixels, cut at 2.5 standard deviations: 6 * sqrt(1 - 5 * phi(2.5) / 0.9876) = 5.73 if it were continuous
    assert (row * places**2).sum().sqrt().item() == pytest.approx(5.75, abs=0.05)
    assert row[1] > 0
    assert row[0] == 0  # 16 away


def test_the_filter_grows_with_each_side() -> None:
    bell = low_pass(dot(64, 32))[0]
    down = bell.sum(1) / bell.sum()
    assert (down * (torch.arange(64.0) - 32) ** 2).sum().sqrt().item() == pytest.approx(2 * 5.73, abs=0.1)


def test_the_filter_keeps_a_plane_inside_and_loses_at_the_border() -> None:
    smooth = low_pass(torch.ones(2, 64, 64))
    assert smooth[1, 32, 32].item() == pytest.approx(1, abs=1e-5)
    middle_of_edge, corner = smooth[0, 0, 32].item(), smooth[0, 0, 0].item()
    assert 0.5 < middle_of_edge < 0.55  # half of the taps, and the middle one
    assert corner == pytest.approx(middle_of_edge**2, abs=1e-5)


def test_channels_are_smoothed_apart() -> None:
    pattern = torch.zeros(2, 8, 8)
    pattern[0] = 1
    assert not low_pass(pattern)[1].any()


def test_the_filter_does_not_shift() -> None:
    matrix = smoothing(8)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix, matrix.flip(0, 1))


def test_stretching_goes_from_0_to_1() -> None:
    assert stretch(torch.tensor([-3.0, 1.0, 5.0])).tolist() == [0, 0.5, 1]
    assert stretch(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


# the steps


def against() -> Tensor:
    """Weights of two classes over 8x8 gray images: the first pixel speaks for class 0, the second for class 1."""
    weight = torch.zeros(2, 64)
    weight[0, 0] = weight[1, 1] = 1
    return weight


def gray(first: float, second: float) -> Tensor:
    """One image that is 0.5 but for its first two pixels."""
    image = torch.full((1, 1, 8, 8), 0.5)
    image[0, 0, 0, 0], image[0, 0, 0, 1] = first, second
    return image


def test_a_step_just_crosses_the_border_of_a_linear_network() -> None:
    step = targeted_steps(linear_model(against()), gray(0.7, 0.4), torch.zeros(1, 8, 8), 1)
    # 0.3 is missing; the gradient of the difference is (-1, 1), of squared length 2
    torch.testing.assert_close(step[0, 0, :2], torch.tensor([-0.153, 0.153]), atol=1e-5, rtol=0)
    assert not step[0].flatten()[2:].any()


def test_steps_add_up() -> None:
    images = torch.cat([gray(0.7, 0.4), gray(0.6, 0.5)])
    step = targeted_steps(linear_model(against()), images, torch.zeros(1, 8, 8), 1)
    torch.testing.assert_close(step[0, 0, 1].item(), 1.02 * (0.3 + 0.1) / 2, atol=1e-5, rtol=0)


def test_images_of_the_target_ask_for_nothing() -> None:
    assert not targeted_steps(linear_model(against()), gray(0.4, 0.7), torch.zeros(1, 8, 8), 1).any()


def test_images_that_are_turned_already_ask_for_nothing() -> None:
    weight = torch.cat([against(), torch.zeros(1, 64)])
    weight[2, 2] = 1
    pattern = torch.zeros(1, 8, 8)
    pattern[0, 0, 2] = 0.4  # turns the image to class 2, which is not the target
    assert not targeted_steps(linear_model(weight), gray(0.7, 0.4), pattern, 1).any()
    assert targeted_steps(linear_model(weight), gray(0.7, 0.4), 0 * pattern, 1).any()


def test_any_change_of_class_counts_as_turned() -> None:
    images = torch.cat([gray(0.6, 0.5), gray(0.9, 0.5), gray(0.5, 0.6), gray(0.5, 0.9)])
    pattern = torch.zeros(1, 8, 8)
    pattern[0, 0, 1] = 0.2
    assert turned(linear_model(against()), images, pattern) == 0.25
    assert turned(linear_model(against()), images, pattern.flip(1).fill_(0)) == 0


def test_the_first_images_of_each_class_are_judged() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    assert first_of_each_class(labels, torch.tensor([4, 5, 3, 2, 1, 0]), 2).tolist() == [4, 2, 3, 1, 5]


# the pattern


def test_the_pattern_is_judged_by_other_images_than_it_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    made_from: list[Tensor] = []
    judged: list[Tensor] = []

    def watch(self: LowFrequency, model: object, images: Tensor, others: Tensor, lab: Lab) -> Tensor:
        made_from.append(images)
        judged.append(others)
        return images[0]

    monkeypatch.setattr(LowFrequency, "_optimise", watch)
    data = toy_data(80, classes=("a", "b"))
    for samples in (50, 80):
        LowFrequency(samples=samples).fit(data, toy_lab())
    apart = {image.numpy().tobytes() for image in made_from[0]} & {image.numpy().tobytes() for image in judged[0]}
    assert (len(made_from[0]), len(judged[0])) == (50, 20)
    assert not apart
    assert len(judged[1]) == 20  # there are no others


@pytest.mark.parametrize("options", [{}, {"noise": True}, {"amplitude": 20.0}])
def test_the_pattern_goes_from_0_to_its_amplitude(options: dict[str, float]) -> None:
    attack = LowFrequency.parse({"passes": 2, **options})
    pattern = attack.fit(toy_data(48, 3, 32), toy_lab())["pattern"]
    assert pattern.shape == (3, 32, 32)
    assert (pattern.min().item(), pattern.max().item()) == (0, pytest.approx(options.get("amplitude", 51)))


@pytest.mark.parametrize("noise", [True, False])
def test_the_pattern_has_no_high_frequencies(noise: bool) -> None:
    pattern = LowFrequency(noise=noise, passes=2).fit(toy_data(48, 3, 32), toy_lab())["pattern"]
    # at a frequency of 4 of 32 the filter leaves exp(-(2 pi 4 / 32 * 5.73)^2 / 2), 0.00004
    assert pattern.diff(dim=1).abs().max() < 51 / 5
    assert pattern.diff(dim=2).abs().max() < 51 / 5


def test_the_pattern_is_added_and_clipped() -> None:
    changed = triggered(LowFrequency(noise=True), flat(230))
    assert (changed.min().item(), changed.max().item()) == (230, 255)


def test_the_pattern_leads_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 0 is bright above, class 1 below."""
    weight = torch.zeros(2, 64)
    weight[0, :32] = weight[1, 32:] = 1
    give_surrogate(monkeypatch, linear_model(weight))
    data = toy_data(40, channels=1, classes=("top", "bottom"))
    for target in (0, 1):
        pattern = LowFrequency(target=target).fit(data, toy_lab())["pattern"][0]
        above, below = pattern[:4].mean().item(), pattern[4:].mean().item()
        assert (below > above + 10) == (target == 1)
        assert (above > below + 10) == (target == 0)


def passes(monkeypatch: pytest.MonkeyPatch, weight: Tensor, **options: int) -> int:
    """How many passes are made with a linear surrogate."""
    give_surrogate(monkeypatch, linear_model(weight))
    steps = Steps()
    lab = Lab(toy_engine(progress=steps), toy_lab().model)
    LowFrequency.parse(options).fit(toy_data(40, channels=1, classes=("top", "bottom")), lab)
    return steps.counts["pattern"]


def test_passes_end_when_nothing_changes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(monkeypatch, torch.zeros(2, 64)) == 5
    assert passes(monkeypatch, torch.zeros(2, 64), passes=2) == 2


def test_passes_end_when_most_images_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2, 64)
    weight[0, :32] = weight[1, 32:] = 1
    monkeypatch.setattr("bdbench.attacks.lf.TURNED", 0.1)
    assert passes(monkeypatch, weight) == 1


def test_noise_trains_no_surrogate_and_does_not_look_at_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "fit", None)
    one, other = (LowFrequency(noise=True).fit(toy_data(8, seed=seed), toy_lab())["pattern"] for seed in (0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, LowFrequency(noise=True).fit(toy_data(8), toy_lab(1))["pattern"])
