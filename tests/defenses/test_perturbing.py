"""Perturbations in balls: projections by hand and against their definition, steps, one for all images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from toys import Fuse, toy_data, toy_engine, toy_recipe

from bdbench.defenses.parts.perturbing import Ball, Norm, Universal, added, perturb, projected, universal
from bdbench.errors import TrainingError
from bdbench.seeds import generator
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch

NORMS: tuple[Norm, ...] = get_args(Norm)
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
every_norm = pytest.mark.parametrize("norm", NORMS)


def points(*values: float) -> Tensor:
    """One perturbation of as many pixels."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def noise(count: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=generator(seed, "noise"))


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)


# projections


@pytest.mark.parametrize(
    ("ball", "before", "after"),
    [
        (Ball("linf", 2), (3, -4, 1), (2, -2, 1)),
        (Ball("l2", 1), (3, -4, 0), (0.6, -0.8, 0)),
        (Ball("l2", 6), (3, -4, 0), (3, -4, 0)),
        (Ball("l1", 2), (3, -4, 1), (0.5, -1.5, 0)),  # 2.5 taken off each
        (Ball("l1", 1), (2, -2, 2), (1 / 3, -1 / 3, 1 / 3)),
        (Ball("l1", 8), (3, -4, 1), (3, -4, 1)),
    ],
)
def test_a_projection_by_hand(ball: Ball, before: tuple[float, ...], after: tuple[float, ...]) -> None:
    torch.testing.assert_close(projected(points(*before), ball), points(*after))


@every_norm
def test_a_projection_lies_in_the_ball_and_is_its_nearest_point(norm: Norm) -> None:
    """Nearest in a convex set: the angle with the way to any other of its points is not acute."""
    delta, ball = noise(), Ball(norm, 0.7)
    found = projected(delta, ball)
    torch.testing.assert_close(lengths(found, norm), torch.full((5,), 0.7))
    others = noise(200, seed=1)
    others = others / lengths(others, norm).view(-1, 1, 1, 1) * 0.7
    away, onwards = (delta - found).flatten(1), others.flatten(1)[:, None] - found.flatten(1)
    assert (torch.einsum("nd,mnd->mn", away, onwards) <= 1e-5).all()


@every_norm
def test_what_lies_inside_stays_as_it_is(norm: Norm) -> None:
    delta = noise() * 1e-3
    assert torch.equal(projected(delta, Ball(norm, 1.0)), delta)
    assert torch.equal(projected(torch.zeros(2, 3, 4, 4), Ball(norm, 1.0)), torch.zeros(2, 3, 4, 4))


@every_norm
def test_a_large_perturbation_is_not_taken_for_none(norm: Norm) -> None:
    """Its square is infinite in float32."""
    found = projected(1e30 * noise(), Ball(norm, 0.7))
    torch.testing.assert_close(lengths(found, norm), torch.full((5,), 0.7))


@every_norm
def test_a_ball_of_radius_0_has_one_point(norm: Norm) -> None:
    assert not projected(noise(), Ball(norm, 0.0)).any()


@every_norm
def test_each_perturbation_is_projected_by_itself(norm: Norm) -> None:
    delta, ball = noise(), Ball(norm, 0.7)
    alone = torch.cat([projected(one, ball) for one in delta.split(1)])
    torch.testing.assert_close(projected(delta, ball), alone, rtol=0, atol=0)


@every_norm
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_projection_does_not_hide_what_is_not_finite(norm: Norm, wrong: float) -> None:
    delta = noise(2)
    delta[0, 0, 0, 0] = wrong
    found = projected(delta, Ball(norm, 0.7))
    assert not found[0, 0, 0, 0].isfinite()
    assert found[1].isfinite().all()


# each image its own


def test_steps_go_down_along_the_sign_of_the_gradient() -> None:
    images, slopes = torch.full((2, 1, 1, 2), 0.5), torch.tensor([[3.0, -0.1], [0.0, 7.0]]).view(2, 1, 1, 2)
    found = perturb(images, lambda seen: (slopes * seen).sum(), Ball("linf", 0.25), steps=2, step=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.2, 0.2], [0.0, -0.2]]).view(2, 1, 1, 2))
    three = perturb(images, lambda seen: (slopes * seen).sum(), Ball("linf", 0.25), steps=3, step=0.1)
    torch.testing.assert_close(three, torch.tensor([[-0.25, 0.25], [0.0, -0.25]]).view(2, 1, 1, 2))


@every_norm
def test_perturbations_stay_in_their_ball_after_every_step(norm: Norm) -> None:
    images, seen = noise().abs().clamp(0, 1), []

    def objective(perturbed: Tensor) -> Tensor:
        seen.append((perturbed - images).detach())
        return (perturbed * noise(seed=1)).sum()

    seen.append(perturb(images, objective, Ball(norm, 0.3), steps=4, step=0.2, start=1.0))
    assert len(seen) == 5
    assert all((lengths(delta, norm) <= 0.3 + 1e-5).all() for delta in seen)
    torch.testing.assert_close(lengths(seen[0], norm), torch.full((5,), 0.3))  # the start is projected


@every_norm
def test_valid_perturbed_images_stay_in_the_range_of_pixels_and_in_the_ball(norm: Norm) -> None:
    images = torch.rand(5, 3, 4, 4, generator=generator(0, "images"))

    def found(valid: bool) -> Tensor:
        return perturb(
            images, lambda seen: (seen * noise(seed=1)).sum(), Ball(norm, 2.0), steps=6, step=0.5, valid=valid
        )

    assert (lengths(found(True), norm) <= 2 + 1e-5).all()
    low, high = torch.aminmax(images + found(True))
    assert low >= -1e-6
    assert high <= 1 + 1e-6
    assert (images + found(False)).abs().max() > 1.01


def test_a_pixel_at_the_end_of_its_range_can_come_back() -> None:
    """A clamp in the pass forward would have no gradient there."""
    images = torch.full((1, 1, 1, 1), 0.9)
    found = perturb(images, lambda seen: seen.sum(), Ball("linf", 0.4), steps=1, step=0.3, start=0.4, valid=True)
    torch.testing.assert_close(found, torch.full((1, 1, 1, 1), 0.1 - 0.3))


def test_no_step_leaves_the_start() -> None:
    found = perturb(noise(), lambda seen: seen.sum(), Ball("linf", 0.2), steps=0, step=1.0, start=0.2)
    assert torch.equal(found, torch.full((5, 3, 4, 4), 0.2))


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """The sign of nan is 0, so the perturbation would stay where it is."""
    images = torch.full((2, 1, 1, 1), 0.5)
    for wrong in (math.nan, math.inf):
        factor = torch.tensor([1.0, wrong]).view(2, 1, 1, 1)
        found = perturb(images, lambda seen, factor=factor: (seen * factor).sum(), Ball("linf", 1), steps=1, step=0.1)
        assert found.flatten().isfinite().tolist() == [True, False]


def test_a_perturbation_reaches_no_weights_and_has_no_graph() -> None:
    weight = torch.ones(3, 4, 4, requires_grad=True)
    found = perturb(noise(), lambda seen: (seen * weight).square().sum(), Ball("l2", 1), steps=2, step=0.1)
    assert weight.grad is None
    assert not found.requires_grad


# one for all


def descend(engine: Engine | None = None, ball: Ball | None = None, **settings: Any) -> Tensor:
    """Pull the mean of perturbed images towards 1 at the left half of the image, and nowhere else."""
    factor = settings.pop("factor", -1.0)
    left = (torch.arange(8) < 4).float()

    def objective(perturbation: Universal, batch: Batch) -> Tensor:
        return factor * (perturbation(batch.images) * left).mean(0).sum()

    recipe = toy_recipe(**{"epochs": 1, "lr": 0.1, "schedule": "constant"} | settings)
    return universal(
        engine or toy_engine(), toy_data(32), objective, recipe, phase="perturb", ball=ball, valid=False,
        lr_flag="--inner-lr",
    )  # fmt: skip


def test_one_perturbation_by_hand() -> None:
    found = descend()  # two steps of 0.1 times a slope of -1 at every pixel of the left half
    assert found.shape == (1, 3, 8, 8)
    assert not found.requires_grad
    torch.testing.assert_close(found[..., :4], torch.full((1, 3, 8, 4), 0.2))
    assert not found[..., 4:].any()


@every_norm
def test_one_perturbation_stays_in_its_ball(norm: Norm) -> None:
    assert lengths(descend(ball=Ball(norm, 0.1)), norm).item() == pytest.approx(0.1, rel=1e-5)


def test_one_perturbation_ends_the_same_if_it_is_interrupted(tmp_path: Path) -> None:
    whole = descend(epochs=3, ball=Ball("l2", 0.5))
    with pytest.raises(KeyboardInterrupt):
        descend(toy_engine(tmp_path, progress=Fuse(3)), Ball("l2", 0.5), epochs=3)
    assert torch.equal(descend(toy_engine(tmp_path), Ball("l2", 0.5), epochs=3), whole)


@pytest.mark.parametrize("ball", [None, *(Ball(norm, 0.1) for norm in NORMS)])
def test_one_perturbation_that_is_not_finite_is_an_error_that_names_the_flag(ball: Ball | None) -> None:
    with pytest.raises(TrainingError, match=r"phase 'perturb' .* in epoch 1; lower --inner-lr \(now 0.1\)"):
        descend(ball=ball, factor=math.inf)


def test_added_cuts_to_the_range_of_pixels_only_if_told_so() -> None:
    images = points(0.2, 0.9)
    torch.testing.assert_close(added(images, points(-0.5, 0.5), valid=True), points(0.0, 1.0))
    torch.testing.assert_close(added(images, points(-0.5, 0.5), valid=False), points(-0.3, 1.4))
