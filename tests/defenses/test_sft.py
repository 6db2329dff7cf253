"""Super-fine-tuning: the teeth of its learning rate, and the whole method on a small backdoored model."""

from __future__ import annotations

from typing import Any

import pytest
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from toys import are_equal, weights_of

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.ft import FineTuning
from bdbench.defenses.repair.sft import Sawtooth, SuperFineTuning
from bdbench.errors import TrainingError
from bdbench.training.loop import steps_of_pass

PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0}


def teeth(**changes: Any) -> Sawtooth:
    """Ten epochs of 20 steps: a tooth each, the first four of them up to 2.5."""
    settings = {
        "epochs": 10, "lr": 2.5, "schedule": "constant", "low_lr": 0.03, "late_lr": 0.05, "early": 0.4, "climb": 10,
        "epoch_steps": 20,
    }  # fmt: skip
    return Sawtooth.parse(settings | changes)


def rates(recipe: Sawtooth, *steps: int) -> list[float]:
    return [recipe.lr_at(step / recipe.epoch_steps) for step in steps]


def defend(task: Task, **options: Any) -> Defended:
    return SuperFineTuning.parse(options).run(task)


# the schedule


def test_a_tooth_goes_up_and_down_in_straight_lines() -> None:
    # 0.03 + (2.5 - 0.03) / 2 = 1.265
    assert rates(teeth(), 0, 5, 10, 15, 20, 30, 40) == pytest.approx([0.03, 1.265, 2.5, 1.265, 0.03, 2.5, 0.03])


def test_the_late_teeth_have_another_peak() -> None:
    # the fifth epoch begins with step 80
    assert rates(teeth(), 70, 79, 80, 90, 110, 190, 200) == pytest.approx([2.5, 0.277, 0.03, 0.05, 0.05, 0.05, 0.03])


def test_early_teeth_may_be_all_or_none() -> None:
    assert rates(teeth(early=1.0), 10, 190) == pytest.approx([2.5, 2.5])
    assert rates(teeth(early=0.0), 10, 190) == pytest.approx([0.05, 0.05])


def test_teeth_are_counted_in_steps_whatever_an_epoch_has() -> None:
    # 7 steps an epoch: step 10 is in the second one
    assert rates(teeth(epoch_steps=7), *range(28)) == pytest.approx(rates(teeth(epochs=10**3), *range(28)))


def test_a_climb_of_one_step_is_every_other_step() -> None:
    assert rates(teeth(climb=1), 0, 1, 2, 3) == pytest.approx([0.03, 2.5, 0.03, 2.5])


def test_the_recipes_schedule_scales_the_teeth() -> None:
    # cosine of ten epochs: 1 at the start, 1/2 in the middle
    assert rates(teeth(schedule="cosine", early=1.0), 0, 100, 200) == pytest.approx([0.03, 0.015, 0.0])


@pytest.mark.parametrize(("images", "steps"), [(32, 2), (33, 2), (34, 3), (2, 1)])
def test_an_epoch_has_as_many_steps_as_the_engine_takes(images: int, steps: int) -> None:
    assert steps_of_pass(images, 16) == steps


# the method


def test_a_flat_sawtooth_is_fine_tuning() -> None:
    made = defend(task_of(epochs=3, lr=0.02, **PLAIN), low_lr=0.02, late_lr=0.02)
    expected = FineTuning().run(task_of(epochs=3, lr=0.02, **PLAIN))
    assert are_equal(weights_of(made.model), weights_of(expected.model))


def test_every_step_has_the_rate_of_the_sawtooth() -> None:
    engine = Watched()
    defend(task_of(engine, epochs=5, lr=0.5, **PLAIN), climb=2)
    # two steps an epoch, of which the history has the second one: 1, 3, 5, ...
    found = [row["lr"] for row in engine.history]
    assert found == pytest.approx([0.265, 0.265, 0.04, 0.04, 0.04])


def test_a_rate_that_is_too_high_is_named_by_its_flag() -> None:
    with pytest.raises(TrainingError, match=r"lower --lr \(now 1e\+30\)"):
        defend(task_of(epochs=2, lr=1e30, **PLAIN), climb=1)


def test_high_teeth_weaken_a_trigger_that_their_low_ones_alone_leave() -> None:
    suspect, trusted = suspect_model(), trusted_data(120)
    made, flat = (
        defend(task_of(trusted=trusted, suspect=suspect, epochs=20, lr=lr, **PLAIN)).model for lr in (2.5, 0.05)
    )
    right, taken = accuracies(made)
    assert right >= 0.95
    assert taken <= 0.5
    assert accuracies(flat)[1] >= 0.95
    assert are_equal(weights_of(suspect), backdoored_weights())
