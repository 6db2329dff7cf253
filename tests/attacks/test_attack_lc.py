"""LC: the perturbation, the four corners, and that tests show the corners only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear import give_surrogate, linear_model
from toys import attack_of, flat, toy_attack, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.lc import LabelConsistent, corner_signs, pgd
from bdbench.data import Role
from bdbench.protocol.poisoning import poison_source
from bdbench.training.engine import Engine

STEP = 1.5 / 255


def test_right_corners_are_as_published_and_left_ones_their_mirror_image() -> None:
    signs = corner_signs(8, 8)[0].int().tolist()
    three = [[1, -1, -1, 0, 0, -1, -1, 1], [-1, 1, -1, 0, 0, -1, 1, -1], [1, -1, 1, 0, 0, 1, -1, 1]]
    assert signs == [*three, [0] * 8, [0] * 8, *three]


def test_corners_grow_with_the_image() -> None:
    # 3 of 32 pixels is 6 of 64: every sign is 2x2
    large, small = corner_signs(64, 64)[0], corner_signs(8, 8)[0]
    doubled = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
    middle = slice(6, -6)
    assert torch.equal(large[:6, :6], doubled[:6, :6])
    assert torch.equal(large[-6:, -6:], doubled[-6:, -6:])
    assert torch.equal(large[:6, -6:], doubled[:6, -6:])
    assert torch.equal(large[-6:, :6], doubled[-6:, :6])
    assert not large[middle].any()
    assert not large[:, middle].any()


@pytest.mark.parametrize(("amplitude", "expected"), [(1.0, {0, 100, 255}), (0.2, {49, 100, 151})])
def test_corners_are_added_and_clipped(amplitude: float, expected: set[int]) -> None:
    changed = triggered(LabelConsistent(amplitude=amplitude), flat(100))
    assert set(changed.flatten().tolist()) == expected


def test_added_corners_leave_something_of_the_image() -> None:
    changed = triggered(LabelConsistent(amplitude=0.2), flat(250))
    assert set(changed.flatten().tolist()) == {199, 250, 255}


# the perturbation


def two_pixels() -> torch.Tensor:
    """Weights of two classes over 8x8 gray images: the first pixel speaks for class 0, the second for class 1."""
    weight = torch.zeros(2, 64)
    weight[0, 0] = weight[1, 1] = 1
    return weight


def test_perturbations_go_up_the_loss_of_the_true_class() -> None:
    images = torch.full((2, 1, 8, 8), 0.5)
    moved = pgd(linear_model(two_pixels()), images, torch.tensor([0, 1]), 8 / 255, STEP, 3)
    change = ((moved - images) * 255).flatten(1)
    torch.testing.assert_close(change[:, :2], torch.tensor([[-4.5, 4.5], [4.5, -4.5]]), atol=1e-3, rtol=0)
    assert not change[:, 2:].any()  # no gradient, and no random start


def test_perturbations_end_at_epsilon() -> None:
    images = torch.full((1, 1, 8, 8), 0.5)
    moved = pgd(linear_model(two_pixels()), images, torch.tensor([0]), 8 / 255, STEP, 100)
    torch.testing.assert_close((moved - images).abs().max() * 255, torch.tensor(8.0), atol=1e-3, rtol=0)


def test_perturbed_images_are_images() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[..., 1] = 1
    moved = pgd(linear_model(two_pixels()), images, torch.tensor([0]), 8 / 255, STEP, 10)
    assert torch.equal(moved, images)


def test_an_image_is_perturbed_whatever_the_others_are() -> None:
    torch.manual_seed(0)
    model, images, labels = linear_model(torch.randn(3, 64)), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    together = pgd(model, images, labels, 8 / 255, STEP, 5)
    for row in range(4):
        assert torch.equal(pgd(model, images[row : row + 1], labels[row : row + 1], 8 / 255, STEP, 5)[0], together[row])


def test_poison_is_harder_for_the_surrogate_and_hardly_to_be_seen() -> None:
    attack, data, lab = LabelConsistent(steps=10, epsilon=12), toy_data(48), toy_lab()
    rows = torch.nonzero(data.labels == 0).flatten()
    crafted = attack.craft(data, rows, {}, lab)
    change = crafted.int() - data.images[rows].int()
    assert int(change.abs().max()) == 12
    model = attack.train_surrogate(data, lab)
    before, after = (
        F.cross_entropy(lab.engine.logits(model, images), data.labels[rows]) for images in (data.images[rows], crafted)
    )
    assert after > before + 0.1


def test_an_image_is_crafted_whatever_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    give_surrogate(monkeypatch, linear_model(torch.randn(4, 192), channels=3))
    attack, data = LabelConsistent(steps=3), toy_data(48)
    several = attack.craft(data, torch.tensor([4, 8, 12]), {}, toy_lab())
    assert torch.equal(attack.craft(data, torch.tensor([12, 4]), {}, toy_lab()), several[[2, 0]])


def test_training_shows_the_perturbation_and_tests_the_corners_only() -> None:
    source = toy_source()
    made = poison_source(source, toy_attack("lc", epsilon=8), toy_lab(), trusted=0)
    outside = corner_signs(8, 8)[0] == 0
    chosen = made.roles == Role.POISON
    in_training = (made.visible.images[chosen].int() - made.originals.int())[..., outside]
    assert 1 <= int(in_training.abs().max()) <= 8
    in_tests = made.triggered.images.int() - source.test.images[made.triggered_rows].int()
    assert not in_tests[..., outside].any()
    assert in_tests[..., ~outside].any()


@pytest.mark.parametrize(
    ("options", "phase"), [({}, "surrogate-adversarial"), ({"surrogate_adversarial": False}, "surrogate")]
)
def test_the_surrogate_is_trained_adversarially_unless_told_otherwise(options: dict[str, bool], phase: str) -> None:
    lab = toy_lab()
    LabelConsistent.parse({"steps": 1, **options}).craft(toy_data(48), torch.arange(1), {}, lab)
    assert {row["phase"] for row in lab.engine.history} == {phase}


def test_the_defaults_are_the_published_ones() -> None:
    attack = attack_of("lc")
    assert isinstance(attack, LabelConsistent)
    assert (attack.epsilon, attack.alpha, attack.steps, attack.amplitude) == (8, 1.5, 100, 1)


def test_fitting_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "fit", None)
    assert LabelConsistent().fit(toy_data(48), toy_lab())["added"].shape == (1, 8, 8)
