"""SAU: the terms of its losses by hand, where its perturbations stay, and a small backdoored model."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import are_equal, toy_batch, weights_of

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair import sau
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.sau import SAU, divergence, shared_terms, unlearned
from bdbench.errors import TrainingError
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator

RECIPE: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "batch_size": 16, "weight_decay": 0.0}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "numbers"), dtype=torch.float64)


def answers(*classes: int, sure: float = 4.0) -> Tensor:
    """Logits (B, 3) whose largest is at a class."""
    return sure * F.one_hot(torch.tensor(classes), 3).double()


def labels(*classes: int) -> Tensor:
    return torch.tensor(classes)


# the terms


def test_the_divergence_is_symmetric_and_0_for_equals_and_at_most_ln_2() -> None:
    one, other = numbers(6, 4), numbers(6, 4, seed=1)
    torch.testing.assert_close(divergence(one, other), divergence(other, one))
    torch.testing.assert_close(divergence(one, one), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(
        divergence(answers(0, sure=80), answers(1, sure=80)), torch.tensor([math.log(2)]).double()
    )
    assert (divergence(100 * one, 100 * other) <= math.log(2) + 1e-12).all()


def test_the_divergence_by_hand() -> None:
    # the middle is one half each
    one, other = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.75, 0.25]]).log()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence(one, other).item() == pytest.approx(expected)


def test_the_divergence_of_sure_answers_is_finite_and_so_is_its_gradient() -> None:
    one = answers(0, sure=1000).requires_grad_()
    divergence(one, answers(1, sure=1000)).sum().backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()


def test_a_model_whose_answer_has_changed_is_pushed_no_more() -> None:
    nobody = shared_terms(answers(0), answers(0), labels(0), labels(0), labels(0))[0]
    first = shared_terms(answers(1), answers(0), labels(0), labels(0), labels(0))[0]
    both = shared_terms(answers(1), answers(2), labels(0), labels(0), labels(0))[0]
    one = F.cross_entropy(answers(0), labels(0)).item()
    assert nobody.item() == pytest.approx(one)
    assert first.item() == pytest.approx(one / 2)
    assert both.item() == 0


def test_what_was_wrong_before_is_not_misled_by_the_perturbation() -> None:
    """Fooled means another answer than to the clean image, not a wrong one."""
    raised, _ = shared_terms(answers(1), answers(1), labels(0), labels(1), labels(1))
    assert raised.item() == pytest.approx(F.cross_entropy(answers(1), labels(0)).item())


def test_models_that_are_misled_to_one_class_are_pulled_no_more() -> None:
    same = shared_terms(answers(1), answers(1, sure=2), labels(0), labels(0), labels(0))[1]
    apart = shared_terms(answers(1), answers(2), labels(0), labels(0), labels(0))[1]
    unmoved = shared_terms(answers(0), answers(0, sure=2), labels(0), labels(0), labels(0))[1]
    assert same.item() == 0
    assert apart.item() == pytest.approx(divergence(answers(1), answers(2)).item())
    assert unmoved.item() == pytest.approx(divergence(answers(0), answers(0, sure=2)).item())
    assert unmoved > 0


def test_terms_are_means_over_the_batch() -> None:
    found = shared_terms(answers(0, 1), answers(0, 2), labels(0, 0), labels(0, 0), labels(0, 0))
    alone = [shared_terms(answers(a), answers(b), labels(0), labels(0), labels(0)) for a, b in ((0, 0), (1, 2))]
    for index in (0, 1):
        assert found[index].item() == pytest.approx((alone[0][index] + alone[1][index]).item() / 2)


def test_what_is_unlearned_by_hand() -> None:
    # the suspect calls the second image 1, which it did before, the third 0, its label: the first and fourth count
    logits = numbers(4, 3)
    found = unlearned(logits, labels(1, 1, 0, 2), labels(0, 1, 2, 0), labels(0, 0, 0, 1))
    p = logits.softmax(1)
    expected = -(torch.log(1 - p[0, 1]) + torch.log(1 - p[3, 2])) / 4
    torch.testing.assert_close(found, expected)


def test_nothing_is_unlearned_where_the_suspect_is_not_misled_or_the_model_does_not_follow() -> None:
    assert unlearned(numbers(2, 3), labels(0, 1), labels(0, 1), labels(0, 0)).item() == 0
    assert unlearned(answers(0, sure=200), labels(1), labels(0), labels(0)).item() == pytest.approx(0, abs=1e-12)


def test_a_model_that_follows_surely_has_a_finite_loss_and_a_gradient() -> None:
    """The published code bounds the probability, and the gradient of such images is 0 there."""
    logits = answers(1, sure=200).requires_grad_()
    found = unlearned(logits, labels(1), labels(0), labels(0))
    found.backward()
    assert found.item() == pytest.approx(200 - math.log(2))
    assert logits.grad is not None
    assert logits.grad[0, 1].item() == pytest.approx(1)


# the perturbations


def perturbation(model: Classifier | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The perturbations of eight images, and both models' answers to the perturbed images."""
    suspect, batch = suspect_model(), toy_batch(trusted_data(8))
    model = model or copied(suspect)
    before = suspect(batch.images).argmax(1)
    found = SAU.parse(options)._perturbation(model, suspect, batch, before, before)
    return found, model(batch.images + found).argmax(1), suspect(batch.images + found).argmax(1)


@pytest.mark.parametrize("options", [{}, {"radius": 0.05}, {"radius": 0.3, "step_size": 0.1, "inner_steps": 3}])
def test_perturbations_stay_within_the_radius(options: dict[str, Any]) -> None:
    radius = options.get("radius", 0.2)
    assert perturbation(**options)[0].abs().max().item() == pytest.approx(radius)


def test_perturbed_images_are_valid_if_told_so() -> None:
    images = toy_batch(trusted_data(8)).images
    low, high = torch.aminmax(images + perturbation(valid=True)[0])
    assert low >= -1e-6
    assert high <= 1 + 1e-6
    assert (images + perturbation()[0]).max() > 1.05


def test_without_steps_a_perturbation_is_its_start() -> None:
    assert torch.equal(perturbation(inner_steps=0)[0], torch.full((8, 3, 8, 8), 0.2))


def test_at_the_start_model_and_suspect_are_one_so_whoever_is_misled_is_shared() -> None:
    _, one, other = perturbation()
    assert torch.equal(one, other)
    assert (one != trusted_data(8).labels).any()


# the whole method on a backdoored model


class Walk(NamedTuple):
    engine: Watched
    suspect: Classifier
    defended: Defended


def defend(task: Task | None = None, **options: Any) -> Defended:
    return SAU.parse(options).run(task or task_of(**RECIPE))


@cache
def walk() -> Walk:
    engine, suspect = Watched(), suspect_model()
    return Walk(engine, suspect, defend(task_of(engine, suspect=suspect, **RECIPE | {"epochs": 30, "lr": 0.01})))


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    right, taken = accuracies(walk().defended.model)
    before = accuracies(suspect_model())
    assert before[1] >= 0.95
    assert right >= before[0] - 0.05
    assert taken <= 0.3


def test_the_suspect_stays_as_it_is() -> None:
    assert are_equal(weights_of(walk().suspect), backdoored_weights())
    assert not walk().defended.model.training


@pytest.mark.parametrize("norms", ["kept", "batch"])
def test_running_statistics_move_by_clean_images_only_and_only_if_told_so(norms: str) -> None:
    after = weights_of(defend(norms=norms, inner_steps=1).model)
    plain = weights_of(defend(norms=norms, inner_steps=0, radius=0.0, shared_weight=0.0).model)
    name = "features.layers.1.running_mean"
    # its input has seen no weight that training moved but that of the first convolution, which barely does
    torch.testing.assert_close(after[name], plain[name], rtol=0, atol=1e-3)
    assert torch.equal(after[name], backdoored_weights()[name]) == (norms == "kept")


def test_without_perturbations_it_is_fine_tuning() -> None:
    """Nobody is misled by a perturbation of nothing."""
    one = weights_of(defend(radius=0.0).model)
    other = weights_of(defend(radius=0.0, shared_weight=0.0).model)
    assert are_equal(one, other)


def test_the_first_loss_by_hand() -> None:
    engine = Watched()
    trusted, suspect = trusted_data(16), suspect_model()
    defend(task_of(engine, trusted, suspect, **RECIPE), clean_weight=2.0, robust_weight=0.5, shared_weight=3.0)
    batch = toy_batch(trusted)
    with torch.no_grad():
        known = suspect(batch.images).argmax(1)
    delta = SAU()._perturbation(suspect, suspect, batch, known, known)
    logits = suspect(batch.images + delta)
    expected = (
        2 * F.cross_entropy(suspect(batch.images), batch.labels)
        + 0.5 * F.cross_entropy(logits, batch.labels)
        + 3 * unlearned(logits, logits.argmax(1), known, batch.labels)
    )
    assert engine.losses_of("unlearn") == [pytest.approx(expected.item(), rel=1e-4)]


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0.1}, {"inner_steps": 1}, {"step_size": 0.1}, {"adversarial_weight": 0.0}, {"agreement_weight": 0.0},
        {"clean_weight": 0.1}, {"robust_weight": 1.0}, {"shared_weight": 0.1}, {"norms": "batch"}, {"valid": True},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    recipe = RECIPE | {"epochs": 2, "lr": 0.01}
    plain = weights_of(defend(task_of(**recipe)).model)
    assert not are_equal(plain, weights_of(defend(task_of(**recipe), **options).model))


def test_a_perturbation_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sau, "divergence", lambda one, other: (one - other).sum(1) * math.nan)
    with pytest.raises(TrainingError, match="the loss of phase 'unlearn' is nan in epoch 1"):
        defend()


def test_weights_that_are_not_finite_are_an_error_that_names_the_rate() -> None:
    with pytest.raises(TrainingError, match=r"lower --lr \(now 1e\+30\)"):
        defend(task_of(**RECIPE | {"lr": 1e30}))
