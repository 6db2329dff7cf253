"""I-BAU: the implicit gradient against closed forms, what carries the perturbation, and a small backdoored model."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import Fuse, are_equal, toy_batch, toy_data, toy_engine, toy_model, weights_of

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.ibau import IBAU, implicit, of_round, stamped_cross_entropy
from bdbench.errors import OptionError, TrainingError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import norms_of
from bdbench.seeds import generator

RECIPE: dict[str, Any] = {"epochs": 3, "lr": 1e-3, "batch_size": 16, "weight_decay": 0.0}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "numbers"), dtype=torch.float64)


# the implicit gradient


@pytest.mark.parametrize(("step", "terms"), [(0.1, 0), (0.1, 1), (0.1, 5), (0.5, 3), (1.0, 1)])
def test_the_implicit_gradient_of_squares_in_closed_form(step: float, terms: int) -> None:
    """Inner |delta - A theta|^2 / 2, outer |delta - c|^2 / 2: (1 - (1 - s)^K) A'(delta - c); all of A'(delta - c) in
    the limit, where delta follows A theta.
    """
    matrix, c, delta = numbers(4, 3), numbers(4, seed=1), numbers(4, seed=2).requires_grad_()
    theta = numbers(3, seed=3).requires_grad_()
    outer = (delta - c).square().sum() / 2 + 0 * theta.sum()
    inner = (delta - matrix @ theta).square().sum() / 2
    (found,) = torch.autograd.grad(implicit(outer, inner, delta, terms, step), theta)
    expected = (1 - (1 - step) ** terms) * matrix.T @ (delta.detach() - c)
    torch.testing.assert_close(found, expected)
    if (step, terms) == (0.1, 5):
        torch.testing.assert_close(found, 0.40951 * matrix.T @ (delta.detach() - c))


def test_without_terms_the_gradient_is_the_direct_one() -> None:
    theta, delta = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    outer = (theta * delta).sum()
    (found,) = torch.autograd.grad(implicit(outer, (theta * delta).square().sum(), delta, 0), theta)
    assert torch.equal(found, delta.detach())


def test_the_value_is_that_of_the_outer_loss() -> None:
    theta, delta = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    outer = (theta * delta).sum()
    assert implicit(outer, (theta * delta).square().sum(), delta, 5).item() == pytest.approx(outer.item())


def test_the_implicit_gradient_of_a_network_is_that_of_its_formula() -> None:
    """The series and the mixed derivative by whole Jacobians."""
    data = toy_data(4, 1)
    model, batch = toy_model(data).eval(), toy_batch(data)
    delta = (0.1 * numbers(1, 1, 8, 8).float()).requires_grad_()
    weight = model.head.weight

    def inner(delta: Tensor) -> Tensor:
        return IBAU().inner(model(batch.images + delta), batch.labels, delta)

    outer = stamped_cross_entropy(model, batch, delta, 0.5, valid=False)
    (found,) = torch.autograd.grad(implicit(outer, inner(delta), delta, 4, 0.3), weight)

    direct_delta, direct_weight = torch.autograd.grad(
        stamped_cross_entropy(model, batch, delta, 0.5, valid=False), (delta, weight)
    )
    hessian = torch.autograd.functional.hessian(inner, delta).view(64, 64)
    jacobian = torch.eye(64) - 0.3 * hessian
    vector = sum(torch.linalg.matrix_power(jacobian.T, k) @ direct_delta.flatten() for k in range(4))
    assert isinstance(vector, Tensor)
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    (mixed,) = torch.autograd.grad(slope, weight, vector.view_as(slope))
    torch.testing.assert_close(found, direct_weight - 0.3 * mixed)
    assert mixed.abs().max() > 1e-4


# what carries the perturbation


def seen_by(share: float, count: int, *, valid: bool = False) -> Tensor:
    """The images that a network gets, of black ones and a perturbation of 2."""
    data = toy_data(count)
    seen: list[Tensor] = []

    class Watch(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    model = toy_model(data).eval()
    model.__class__ = Watch
    batch = toy_batch(data)._replace(images=torch.zeros(count, 3, 8, 8))
    stamped_cross_entropy(model, batch, torch.full((1, 3, 8, 8), 2.0), share, valid=valid)
    return seen[0]


@pytest.mark.parametrize(("share", "count", "expected"), [(0.01, 100, 1), (0.01, 16, 1), (0.25, 16, 4), (1.0, 16, 16)])
def test_a_share_of_the_batch_and_at_least_one_image_carries_it(share: float, count: int, expected: int) -> None:
    """The published code stamps none in a batch of fewer than 100 images."""
    carries = (seen_by(share, count) == 2).flatten(1).all(1)
    assert carries.tolist() == [True] * expected + [False] * (count - expected)


def test_perturbed_pixels_are_cut_only_if_told_so() -> None:
    assert seen_by(1.0, 4).max() == 2
    assert seen_by(1.0, 4, valid=True).max() == 1


def test_a_perturbation_of_nothing_leaves_the_cross_entropy() -> None:
    model, batch = suspect_model(), toy_batch(trusted_data())
    found = stamped_cross_entropy(model, batch, torch.zeros(1, 3, 8, 8), 0.5, valid=False)
    torch.testing.assert_close(found, F.cross_entropy(model(batch.images), batch.labels))


def test_what_the_perturbation_lowers_by_hand() -> None:
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
    delta = torch.full((1, 1, 2, 2), 3.0)
    assert IBAU(ridge=0.5).inner(logits, labels, delta).item() == pytest.approx(0.5 * 36 - math.log(4))


# networks without second derivatives


class Gated(nn.Module):
    """Features through an activation that torch differentiates once only."""

    size = 192

    def __init__(self, image_shape: tuple[int, int, int]) -> None:  # noqa: ARG002
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return F.hardsigmoid(images * self.scale).flatten(1)


class Attending(Gated):
    """Features through torch's fused attention, which it differentiates once only."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images * self.scale
        return F.scaled_dot_product_attention(rows, rows, rows).flatten(1)


def test_a_network_without_second_derivatives_is_refused_unless_they_are_not_taken() -> None:
    suspect = toy_model(toy_data(), features=Gated).eval()
    with pytest.raises(OptionError, match=r"without one \(aten::hardsigmoid_backward\); take --terms 0"):
        IBAU().run(task_of(None, None, suspect, **RECIPE))
    assert IBAU(terms=0).run(task_of(None, None, suspect, **RECIPE)).findings["perturbation_lengths"]


def test_attention_is_differentiated_twice() -> None:
    suspect = toy_model(toy_data(), features=Attending).eval()
    mended = IBAU().run(task_of(None, None, suspect, **RECIPE)).model
    assert not are_equal(weights_of(mended), weights_of(suspect))


# the whole method on a backdoored model


class Walk(NamedTuple):
    engine: Watched
    suspect: Classifier
    defended: Defended


def defend(task: Task | None = None, **options: Any) -> Defended:
    return IBAU.parse({"stamp_share": 0.25} | options).run(task or task_of(**RECIPE | {"epochs": 1}))


@cache
def walk() -> Walk:
    engine, suspect = Watched(), suspect_model()
    task = task_of(engine, suspect=suspect, **RECIPE | {"epochs": 12, "lr": 0.01})
    return Walk(engine, suspect, defend(task, inner_epochs=3, radius=2.0))


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    right, taken = accuracies(walk().defended.model)
    before = accuracies(suspect_model())
    assert before[1] >= 0.95
    assert right >= before[0] - 0.05
    assert taken <= 0.3


def test_the_perturbation_misleads_the_suspect_and_the_mended_model_much_less() -> None:
    """What it lowers is minus the cross entropy."""
    first, last = (walk().engine.losses_of(f"perturb-{number}") for number in (1, 12))
    assert first[-1] < 10 * first[0] < 0
    assert last[-1] > 0.2 * first[-1]


def test_the_suspect_stays_and_the_mended_model_is_in_evaluation_mode() -> None:
    assert are_equal(weights_of(walk().suspect), backdoored_weights())
    assert not walk().defended.model.training
    assert walk().defended.findings["perturbation_lengths"][0] > 0
    assert len(walk().defended.findings["perturbation_lengths"]) == 12


def test_running_statistics_never_move() -> None:
    after = weights_of(walk().defended.model)
    named = [name for name in after if "running" in name or "tracked" in name]
    assert len(named) == 3 * len(norms_of(walk().suspect))
    for name in named:
        assert torch.equal(after[name], backdoored_weights()[name])


def test_the_pass_for_the_perturbation_leaves_the_weights() -> None:
    """A round at next to no rate is the suspect, whatever the perturbation did."""
    after = weights_of(defend(task_of(**RECIPE | {"epochs": 1, "lr": 1e-30})).model)
    assert are_equal(after, backdoored_weights())


@pytest.mark.parametrize(
    "options",
    [
        {"stamp_share": 1.0}, {"inner_epochs": 2}, {"inner_lr": 1.0}, {"ridge": 0.1}, {"radius": 0.1}, {"valid": False},
        {"terms": 0}, {"terms": 2},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    assert not are_equal(weights_of(defend().model), weights_of(defend(**options).model))


def test_a_radius_bounds_the_perturbation() -> None:
    lengths = defend(task_of(**RECIPE | {"epochs": 2}), radius=0.1).findings["perturbation_lengths"]
    assert lengths == [pytest.approx(0.1, rel=1e-4)] * 2


def test_rounds_have_the_rates_of_the_schedule_and_one_optimizer() -> None:
    engine = Watched()
    recipe = RECIPE | {"epochs": 2, "lr": 0.01, "schedule": "cosine"}
    defend(task_of(engine, **recipe))
    assert [engine.recipes[f"unlearn-{number}"].lr for number in (1, 2)] == [0.01, pytest.approx(0.005)]
    assert engine.optimizers["unlearn-1"] is engine.optimizers["unlearn-2"]
    assert engine.recipes["perturb-2"].lr == 10
    assert of_round(task_of(**recipe).recipe, 1).epochs == 1


def test_an_interrupted_round_ends_the_same(tmp_path: Path) -> None:
    whole = weights_of(defend(task_of(**RECIPE | {"epochs": 2})).model)
    for phase in ("perturb-2", "unlearn-2"):
        (tmp_path / phase).mkdir()
        engine = toy_engine(tmp_path / phase, progress=Fuse(1, phase))
        with pytest.raises(KeyboardInterrupt):
            defend(task_of(engine, **RECIPE | {"epochs": 2}))
        resumed = defend(task_of(toy_engine(tmp_path / phase), **RECIPE | {"epochs": 2}))
        assert are_equal(weights_of(resumed.model), whole)


def test_second_derivatives_are_taken_in_float32_where_the_engine_computes_in_bfloat16() -> None:
    plain = weights_of(defend(task_of(toy_engine(), **RECIPE | {"epochs": 1}), inner_lr=1e-30).model)
    halved = weights_of(defend(task_of(toy_engine(bf16=True), **RECIPE | {"epochs": 1}), inner_lr=1e-30).model)
    assert are_equal(plain, halved)


def test_a_perturbation_that_is_not_finite_is_an_error_that_names_its_flag() -> None:
    with pytest.raises(TrainingError, match=r"phase 'perturb-1' .*; lower --inner-lr \(now 1e\+30\)"):
        defend(inner_lr=1e30, ridge=1e30)


def test_weights_that_are_not_finite_are_an_error_that_names_the_rate() -> None:
    with pytest.raises(TrainingError, match=r"phase 'unlearn-1' .*; lower --lr \(now 1e\+30\)"):
        defend(task_of(**RECIPE | {"lr": 1e30}))
