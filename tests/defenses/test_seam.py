"""SEAM: wrong labels, when each phase ends, and the whole method on a small backdoored model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from toys import are_equal, toy_batch, toy_engine, weights_of

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.seam import Recovery, SelectiveAmnesia, twice_chance, wrong_labels
from bdbench.models.classifier import Classifier
from bdbench.seeds import scoped
from bdbench.training.loop import mean_cross_entropy

RECIPE: dict[str, Any] = {"epochs": 40, "lr": 0.02, "weight_decay": 0.0}


def defend(task: Task | None = None, **options: Any) -> Defended:
    return SelectiveAmnesia.parse(options).run(task or task_of(epochs=1, lr=0.02))


@cache
def walk() -> tuple[Watched, Classifier, Defended]:
    """A run on the backdoored model: the engine, the suspect, the result."""
    engine, suspect = Watched(), suspect_model()
    return engine, suspect, defend(task_of(engine, trusted_data(120), suspect, **RECIPE), forget_share=1.0)


def epochs_of(engine: Watched, phase: str) -> int:
    return sum(row["phase"] == phase for row in engine.history)


# wrong labels


def test_wrong_labels_are_all_others_equally_often_and_never_the_true_one() -> None:
    labels = torch.arange(4).repeat(3000)
    with scoped(0, "test"):
        drawn = wrong_labels(labels, 4)
    counts = torch.bincount(labels * 4 + drawn, minlength=16).view(4, 4)
    assert counts.diagonal().tolist() == [0, 0, 0, 0]
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert others.min() > 900  # of 1000 each; their deviation is 26
    assert others.max() < 1100


def test_of_two_classes_the_wrong_one_is_the_other() -> None:
    assert wrong_labels(torch.tensor([0, 1, 1, 0]), 2).tolist() == [1, 0, 0, 1]


def test_wrong_labels_are_drawn_anew_for_every_batch() -> None:
    with scoped(0, "test"):
        one, other = (wrong_labels(torch.zeros(50, dtype=torch.int64), 10) for _ in range(2))
    assert not torch.equal(one, other)


# when the phases end


@pytest.mark.parametrize(("classes", "limit"), [(10, 0.2), (4, 0.5), (3, 0.6), (2, 0.6)])
def test_forgotten_is_what_is_below_twice_chance(classes: int, limit: float) -> None:
    assert twice_chance(classes) == pytest.approx(limit)


def test_it_forgets_until_less_than_twice_chance_is_right() -> None:
    findings = walk()[2].findings
    assert findings["forgotten_accuracy"] < 2 / 4
    assert 1 <= findings["forget_epochs_taken"] < 10
    assert findings["said"].startswith("forgot: accuracy 0.")


def test_forgetting_ends_after_the_first_epoch_that_is_below_its_limit() -> None:
    engines = [Watched() for _ in range(2)]
    for engine, lr in zip(engines, (1.0, 1e-6), strict=True):
        defend(task_of(engine, epochs=1, lr=lr), forget_stop=0.9, forget_share=1.0, forget_epochs=3)
    # the suspect has all of them right, and a small rate changes nothing
    assert [epochs_of(engine, "forget") for engine in engines] == [1, 3]


def test_what_was_not_forgotten_is_said() -> None:
    findings = defend(task_of(epochs=1, lr=1e-6), forget_stop=0.1, forget_share=1.0, forget_epochs=2).findings
    assert findings["forgotten_accuracy"] == 1
    assert findings["said"] == ("did not forget: accuracy 1.00 on 32 trusted images after epoch 2, limit 0.1")


def test_recovery_counts_what_is_right_during_each_epoch_anew() -> None:
    recovery, model = Recovery(0.5, torch.device("cpu")), suspect_model()
    batch = toy_batch(trusted_data(8))
    wrong = batch._replace(labels=(batch.labels + 1) % 4)
    expected = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
    torch.testing.assert_close(recovery.loss(model, batch), expected)
    recovery.loss(model, wrong)
    assert not recovery.is_over(model)  # 8 of 16
    recovery.loss(model, batch)
    assert recovery.is_over(model)  # 8 of 8


def test_recovery_ends_when_the_trusted_images_are_classified_right() -> None:
    engine, _, defended = walk()
    assert defended.findings["recovered_accuracy"] > 0.97
    assert epochs_of(engine, "recover") < 40


# the method


def test_recovery_without_forgetting_is_fine_tuning() -> None:
    task, other = task_of(epochs=3, lr=0.01), toy_engine()
    made = defend(task, forget_epochs=0, recover_stop=1.0)
    expected = suspect_model()
    other.fit(
        expected, trusted_data(), mean_cross_entropy, task.recipe, phase="recover",
        optimizer=torch.optim.Adam(expected.parameters(), 0.01, weight_decay=task.recipe.weight_decay),
    )  # fmt: skip
    assert are_equal(weights_of(made.model), weights_of(expected))
    assert set(made.findings) == {"recovered_accuracy"}


@pytest.mark.parametrize(("share", "count"), [(0.2, 6), (0.01, 2), (1.0, 32)])
def test_it_forgets_with_a_part_and_recovers_with_all(share: float, count: int) -> None:
    engine = Watched()
    defend(task_of(engine, epochs=1), forget_share=share, forget_epochs=1)
    assert len(engine.data["forget"]) == count
    assert len(engine.data["recover"]) == 32


def test_the_mended_model_forgets_the_trigger_and_nothing_else() -> None:
    _, suspect, defended = walk()
    right, taken = accuracies(defended.model)
    assert accuracies(suspect)[1] >= 0.95
    assert right >= 0.9
    assert taken <= 0.2
    assert are_equal(weights_of(suspect), backdoored_weights())
