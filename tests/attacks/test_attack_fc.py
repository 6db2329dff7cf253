"""FC: the collision, the partners, and where the patch is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import give_surrogate, linear_model
from torch import Tensor
from toys import flat, toy_attack, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks import fc
from bdbench.attacks.fc import FeatureCollision, collide
from bdbench.data import Role
from bdbench.protocol.poisoning import poison_source


def same(images: Tensor) -> Tensor:
    return images


def collided(images: Tensor, goal: Tensor, **options: Any) -> Tensor:
    """With a network whose features are the pixels."""
    given = {"closeness": 0.25, "bound": 1.0, "steps": 200, "lr": 0.01, "shown": same} | options
    return collide(linear_model(torch.zeros(2, 64)), images, goal, **given)


def gray(*values: float) -> Tensor:
    """Plain 8x8 images."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


def test_one_step_goes_forward_to_the_goal_and_backward_to_the_image() -> None:
    # forward by 0.1 times the gradient 2 * (0.2 - 0.7), to 0.3; backward to the mean of 0.3 and 0.025 times 0.2
    moved = collided(gray(0.2), gray(0.7).flatten(1), steps=1, lr=0.1)
    torch.testing.assert_close(moved, gray(0.305 / 1.025))


@pytest.mark.parametrize("closeness", [0.0, 0.25, 1.0, 4.0])
def test_a_collision_ends_where_both_pulls_are_equal(closeness: float) -> None:
    moved = collided(gray(0.2), gray(0.7).flatten(1), closeness=closeness, lr=0.1)
    torch.testing.assert_close(moved, gray((2 * 0.7 + closeness * 0.2) / (2 + closeness)), atol=1e-4, rtol=0)


def test_steps_that_do_not_help_are_taken_back_and_halved() -> None:
    images, goal = gray(0.2), gray(0.3).flatten(1)
    # sizes 4.4, 2.2 and 1.1 overshoot to 1, 0.64 and 0.42; 0.55 leads to 0.31
    assert torch.equal(collided(images, goal, steps=3, lr=4.4, closeness=0.0), images)
    torch.testing.assert_close(collided(images, goal, steps=4, lr=4.4, closeness=0.0), gray(0.31))


def test_collisions_stay_within_the_bound_and_the_range() -> None:
    moved = collided(gray(0.2, 0.5), gray(0.7, 3.0).flatten(1), bound=0.1, lr=0.1)
    torch.testing.assert_close(moved, gray(0.3, 0.6))
    moved = collided(gray(0.2, 0.5), gray(-1.0, 3.0).flatten(1), closeness=0.0, lr=0.1)
    torch.testing.assert_close(moved, gray(0.0, 1.0))


def test_every_image_collides_for_itself() -> None:
    images, goal = gray(0.2, 0.9, 0.5), gray(0.7, 0.1, 0.45).flatten(1)
    together = collided(images, goal, lr=0.9, steps=5)
    for row in range(3):
        alone = collided(images[row : row + 1], goal[row : row + 1], lr=0.9, steps=5)
        assert torch.equal(alone[0], together[row])


def test_what_is_shown_collides_not_the_image() -> None:
    moved = collided(gray(0.2), gray(0.7).flatten(1), shown=lambda images: images + 0.4, closeness=0.0, lr=0.1)
    torch.testing.assert_close(moved, gray(0.3), atol=1e-4, rtol=0)


# who collides with whom


def collisions(monkeypatch: pytest.MonkeyPatch, rows: Tensor, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """What `collide` is asked for these rows of 40 gray images; nothing is changed."""
    asked: list[dict[str, Any]] = []

    def spy(_: Any, images: Tensor, goal: Tensor, closeness: float, bound: float, *rest: Any) -> Tensor:
        asked.append({"goal": goal, "closeness": closeness, "bound": bound, "shown": rest[-1]})
        return images

    monkeypatch.setattr(fc, "collide", spy)
    give_surrogate(monkeypatch, linear_model(torch.zeros(4, 64)))
    attack, data, lab = FeatureCollision.parse(options), toy_data(40, channels=1), toy_lab(seed)
    crafted = attack.craft(data, rows, attack.fit(data, lab), lab)
    assert torch.equal(crafted, data.images[rows])
    return asked


def test_partners_are_patched_images_of_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(0, 40, 4)
    goal = collisions(monkeypatch, rows)[0]["goal"]
    attack, data = FeatureCollision(), toy_data(40, channels=1)
    patched = triggered(attack, data).float() / 255
    nearest = torch.cdist(goal, patched.flatten(1)).min(1)
    assert nearest.values.max() < 1e-2
    assert (data.labels[nearest.indices] != 0).all()
    assert len(nearest.indices.unique()) > 5


def test_a_partner_belongs_to_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    several = collisions(monkeypatch, torch.tensor([4, 8, 12]))[0]["goal"]
    alone = collisions(monkeypatch, torch.tensor([12]))[0]["goal"]
    assert torch.equal(alone[0], several[2])
    patch = slice(6 * 8, None)
    elsewhere = collisions(monkeypatch, torch.tensor([4, 8, 12]), seed=1)[0]["goal"]
    assert not torch.equal(several[:, : patch.start], elsewhere[:, : patch.start])


@pytest.mark.parametrize(
    ("options", "closeness", "bound"),
    [({}, 0.25 * 32**2, 1.0), ({"closeness": 1.0}, 32.0**2, 1.0), ({"epsilon": 25.5}, 256.0, 0.1)],
)
def test_closeness_goes_by_the_size_of_the_image(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float], closeness: float, bound: float
) -> None:
    """2048 features over 8 * 8 values are 32."""
    asked = collisions(monkeypatch, torch.arange(0, 8, 4), **options)[0]
    assert (asked["closeness"], asked["bound"]) == (closeness, pytest.approx(bound))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_hidden_patch_takes_no_part_in_the_poison(monkeypatch: pytest.MonkeyPatch, hidden: bool) -> None:
    shown = collisions(monkeypatch, torch.arange(0, 8, 4), hidden=hidden)[0]["shown"]
    images = torch.full((1, 1, 8, 8), 0.5)
    assert torch.equal(shown(images), images) == hidden
    assert torch.equal(shown(images)[..., :6, :6], images[..., :6, :6])


# the patch


def test_the_patch_is_of_pure_colours_near_the_corner() -> None:
    state = FeatureCollision().fit(flat(0), toy_lab())
    rows, columns = torch.nonzero(state["mask"][0], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (27, 30, 27, 30)
    inside = state["pattern"][state["mask"].expand(3, 32, 32).bool()]
    assert len(inside) == 48
    assert set(inside.tolist()) == {0, 255}
    assert inside.view(3, 16).mean(1).tolist() == [127.5] * 3
    assert not torch.equal(state["pattern"], FeatureCollision().fit(flat(0), toy_lab(1))["pattern"])


@pytest.mark.parametrize("seed", range(8))
def test_the_patch_shows_on_the_smallest_gray_images(seed: int) -> None:
    state = FeatureCollision().fit(flat(0, channels=1, side=8), toy_lab(seed))
    assert sorted(state["pattern"][0, 6:, 6:].flatten().tolist()) == [0, 0, 255, 255]


def test_the_patch_replaces_pixels() -> None:
    attack = FeatureCollision()
    state = attack.fit(flat(0), toy_lab())
    inside = state["mask"].expand(3, 32, 32).bool()
    changed = attack.trigger(flat(100), torch.arange(1), state, "test", 0)[0]
    assert torch.equal(changed[inside].float(), state["pattern"][inside])
    assert (changed[~inside] == 100).all()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_hidden_patch_is_shown_in_tests_only(hidden: bool) -> None:
    made = poison_source(toy_source(), toy_attack("fc", hidden=hidden), toy_lab(), trusted=0)
    inside, pattern = made.trigger_state["mask"][0].bool(), made.trigger_state["pattern"].to(torch.uint8)
    in_training = made.visible.images[made.roles == Role.POISON][..., inside]
    assert (in_training == pattern[:, inside]).all() == (not hidden)
    assert (made.triggered.images[..., inside] == pattern[:, inside]).all()


def test_poison_has_the_features_of_others_for_a_trained_network() -> None:
    data, lab = toy_data(48), toy_lab()
    attack = FeatureCollision(closeness=1e-4, steps=60, lr=0.1)
    state, rows = attack.fit(data, lab), torch.nonzero(data.labels == 0).flatten()
    crafted = attack.craft(data, rows, state, lab)
    model = attack.train_surrogate(data, lab)
    patch = state["mask"].bool()
    before, after = (
        (lab.engine.logits(model, torch.where(patch, state["pattern"].to(torch.uint8), images)).argmax(1) == 0)
        for images in (data.images[rows], crafted)
    )
    assert after.float().mean() < 0.5 * before.float().mean()
