"""ABL: the trap, the isolated samples and the dose of unlearning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import are_equal, toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.abl import ABL, Trap, trap_losses
from bdbench.defenses.base import Defended, Task, lowest
from bdbench.engine import Engine
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier


def gradient(values: list[float], trap: Trap, gamma: float = 0.5) -> list[float]:
    """The gradient of the trapped loss towards each sample's loss, times their number."""
    losses = torch.tensor(values, requires_grad=True)
    trap_losses(losses, trap, gamma).backward()
    assert losses.grad is not None
    return (losses.grad * len(values)).tolist()


# the trap


@pytest.mark.parametrize("trap", ["batch", "sample", "flooding"])
def test_above_gamma_every_trap_is_plain_descent(trap: Trap) -> None:
    assert gradient([0.9, 0.7], trap) == [1, 1]


@pytest.mark.parametrize("trap", ["batch", "sample", "flooding"])
def test_below_gamma_every_trap_is_ascent(trap: Trap) -> None:
    assert gradient([0.3, 0.1], trap) == [-1, -1]


@pytest.mark.parametrize("values", [[0.9, 0.2], [0.7, 0.1], [0.6, 0.4, 2.0]])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_batch_trap_and_flooding_have_the_same_gradient(values: list[float], gamma: float) -> None:
    if sum(values) / len(values) != gamma:
        assert gradient(values, "batch", gamma) == gradient(values, "flooding", gamma)


def test_on_mixed_losses_the_sample_trap_pulls_each_to_gamma() -> None:
    # the mean, 0.55, lies above gamma: the batch trap lets the sample at 0.2 fall on
    assert gradient([0.9, 0.2], "batch") == [1, 1]
    assert gradient([0.9, 0.2], "sample") == [1, -1]


def test_trapped_losses_by_hand() -> None:
    low, high = torch.tensor([0.2, 0.4]), torch.tensor([0.6, 1.0])
    # mean 0.3 below gamma 0.5, mean 0.8 above it
    assert trap_losses(low, "batch", 0.5).item() == pytest.approx(-0.3)
    assert trap_losses(high, "batch", 0.5).item() == pytest.approx(0.8)
    assert trap_losses(low, "flooding", 0.5).item() == pytest.approx(0.7)
    assert trap_losses(high, "flooding", 0.5).item() == pytest.approx(0.8)
    assert trap_losses(torch.tensor([0.2, 1.0]), "sample", 0.5).item() == pytest.approx(0.4)


def test_flooding_never_falls_below_gamma() -> None:
    for value in (0.0, 0.3, 0.5, 2.0):
        assert trap_losses(torch.tensor([value]), "flooding", 0.5).item() >= 0.5


def test_a_gamma_of_nothing_is_plain_training() -> None:
    assert gradient([0.1, 0.3], "batch", 0.0) == [1, 1]


# the isolated samples


def test_the_lowest_losses_are_taken() -> None:
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist() == [False, True, False, True]


def test_among_equal_losses_the_first_rows_win() -> None:
    assert lowest(torch.ones(50), 3).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_exactly_as_many_are_taken_as_asked(count: int) -> None:
    assert int(lowest(torch.zeros(4), count).sum()) == count


def test_poison_without_loss_is_isolated_purely() -> None:
    is_poison = torch.arange(20) % 5 == 0
    assert torch.equal(lowest((~is_poison).float(), 4), is_poison)


class Watched(Engine):
    """An engine that keeps, for every phase, its data, its recipe and the model before and after."""

    def __init__(self) -> None:
        base = toy_engine()
        super().__init__(base.device, base.bf16, base.seed)
        self.data: dict[str, ImageDataset] = {}
        self.before: dict[str, dict[str, Tensor]] = {}
        self.after: dict[str, dict[str, Tensor]] = {}
        self.recipes: dict[str, Any] = {}

    def fit(
        self, model: Classifier, data: ImageDataset, loss: Any, recipe: Any, *, phase: str, **settings: Any
    ) -> Classifier:
        self.data[phase], self.before[phase], self.recipes[phase] = data, weights_of(model), recipe
        trained = super().fit(model, data, loss, recipe, phase=phase, **settings)
        self.after[phase] = weights_of(trained)
        return trained

    def steps(self, phase: str) -> int:
        return sum(row["phase"] == phase for row in self.history)


def defend(count: int = 80, **options: Any) -> tuple[Defended, Watched]:
    engine, data = Watched(), toy_data(count)
    task = Task(train=data, new_model=lambda purpose: toy_model(data, purpose), recipe=toy_recipe(), engine=engine)
    quick = {"isolation_epochs": 1, "isolation_rate": 0.1, "unlearn_steps": 4, "unlearn_stop": 100.0}
    return ABL.parse(quick | options).run(task), engine


def test_the_isolated_count_is_the_rate_rounded_down() -> None:
    result, _ = defend(79, isolation_rate=0.1)
    assert result.set_aside is not None
    assert int(result.set_aside.sum()) == 7


def test_no_isolated_sample_has_a_higher_loss_than_one_that_stays() -> None:
    result, _ = defend()
    assert result.scores is not None
    assert result.set_aside is not None
    assert result.scores[result.set_aside].min() >= result.scores[~result.set_aside].max()


def test_isolated_samples_and_the_rest_are_the_whole_set() -> None:
    result, engine = defend()
    assert result.set_aside is not None
    assert len(engine.data["isolate"]) == 80
    assert engine.data["unlearn"].fingerprint == toy_data(80).take(result.set_aside).fingerprint
    assert engine.data["finetune"].fingerprint == toy_data(80).take(~result.set_aside).fingerprint


def test_a_rate_that_isolates_less_than_two_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"isolation_rate 0\.01 isolates 0 of 80 samples; raise it to at least 0\.025"
    ):
        defend(isolation_rate=0.01)


def test_a_rate_that_isolates_two_is_enough() -> None:
    result, _ = defend(isolation_rate=0.025)
    assert result.set_aside is not None
    assert int(result.set_aside.sum()) == 2


def test_isolating_has_its_own_rate_and_no_augmentation() -> None:
    _, engine = defend(isolation_lr=0.03, isolation_epochs=2)
    recipe = engine.recipes["isolate"]
    assert (recipe.lr, recipe.epochs, recipe.schedule, recipe.augment) == (0.03, 2, "constant", "none")
    assert engine.recipes["finetune"] == toy_recipe()


def test_each_phase_goes_on_from_the_one_before() -> None:
    _, engine = defend()
    assert are_equal(engine.after["isolate"], engine.before["finetune"])
    assert are_equal(engine.after["finetune"], engine.before["unlearn"])


# unlearning


def isolated_losses(engine: Watched, weights: dict[str, Tensor]) -> float:
    model = toy_model(toy_data(80))
    model.load_state_dict(weights)
    return float(toy_engine().losses(model, engine.data["unlearn"]).mean())


@pytest.mark.parametrize("objective", ["joint", "ascent"])
def test_a_step_of_unlearning_raises_the_loss_of_the_isolated(objective: str) -> None:
    _, engine = defend(objective=objective, unlearn_steps=1, unlearn_lr=0.01, unlearn_norms="frozen")
    assert isolated_losses(engine, engine.after["unlearn"]) > isolated_losses(engine, engine.before["unlearn"])


def test_more_steps_raise_it_further() -> None:
    losses = [
        isolated_losses(engine, engine.after["unlearn"])
        for _, engine in (defend(objective="ascent", unlearn_steps=steps, unlearn_lr=0.01) for steps in (1, 4, 8))
    ]
    assert losses[0] < losses[1] < losses[2]


def test_no_steps_leave_the_fine_tuned_model() -> None:
    result, engine = defend(unlearn_steps=0)
    assert "unlearn" not in engine.data
    assert are_equal(weights_of(result.model), engine.after["finetune"])


@pytest.mark.parametrize(("rate", "batch"), [(0.1, 2), (0.1, 64), (0.1, 7)])
def test_the_dose_is_counted_in_steps_whatever_the_batches(rate: float, batch: int) -> None:
    """Eight isolated images in batches of 7 leave one over, which the engine leaves out."""
    seen = []

    class Counting(Watched):
        def fit(self, model: Classifier, data: ImageDataset, loss: Any, recipe: Any, **settings: Any) -> Classifier:
            def counted(model: Classifier, batch: Any) -> Tensor:
                seen.append(settings["phase"])
                value: Tensor = loss(model, batch)
                return value

            return super().fit(model, data, counted, recipe, **settings)

    data = toy_data(80)
    task = Task(train=data, new_model=lambda purpose: toy_model(data, purpose), recipe=toy_recipe(), engine=Counting())
    ABL(isolation_epochs=1, isolation_rate=rate, unlearn_steps=9, unlearn_stop=100, unlearn_batch_size=batch).run(task)
    assert seen.count("unlearn") == 9


def test_unlearning_stops_when_the_isolated_are_no_better_than_guessed() -> None:
    _, engine = defend(objective="ascent", unlearn_steps=500, unlearn_lr=0.02, unlearn_stop=1.0)
    assert engine.steps("unlearn") < 500
    assert isolated_losses(engine, engine.after["unlearn"]) >= math.log(4)


def test_a_lower_stop_ends_sooner() -> None:
    early, late = (
        defend(objective="ascent", unlearn_steps=500, unlearn_lr=0.02, unlearn_stop=stop)[1] for stop in (1.0, 1.5)
    )
    assert early.steps("unlearn") < late.steps("unlearn")


def test_ascent_alone_never_sees_the_rest() -> None:
    """Other images in the rest do not change what ascent does after fine-tuning."""
    _, engine = defend(objective="ascent", unlearn_norms="frozen", unlearn_lr=5e-4)
    model = toy_model(toy_data(80))
    model.load_state_dict(engine.before["unlearn"])
    optimizer = torch.optim.SGD(model.parameters(), 5e-4, 0.9, nesterov=True)
    isolated = engine.data["unlearn"]
    for _ in range(4):
        optimizer.zero_grad()
        logits = model.eval()(isolated.images.float() / 255)
        (-torch.nn.functional.cross_entropy(logits, isolated.labels)).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, engine.after["unlearn"][name], rtol=1e-5, atol=1e-6)


def test_samples_that_are_no_better_than_guessed_are_not_ascended_further() -> None:
    """With a cap below their loss the gradient of ascent is zero, so the first epoch changes no weight."""
    _, engine = defend(objective="ascent", unlearn_norms="frozen", unlearn_stop=1e-6, unlearn_steps=3)
    assert are_equal(engine.before["unlearn"], engine.after["unlearn"])


def test_joint_and_lone_ascent_differ() -> None:
    joint, alone = (defend(objective=objective)[1].after["unlearn"] for objective in ("joint", "ascent"))
    assert not are_equal(joint, alone)


def test_norms_keep_their_statistics_while_unlearning_if_told_so() -> None:
    name = "features.layers.1.running_mean"
    for norms, stays in (("frozen", True), ("batch", False)):
        _, engine = defend(unlearn_norms=norms)
        assert torch.equal(engine.before["unlearn"][name], engine.after["unlearn"][name]) == stays


def test_unlearning_decays_no_weights_and_augments_nothing_it_ascends() -> None:
    _, engine = defend(unlearn_lr=0.003)
    recipe = engine.recipes["unlearn"]
    assert (recipe.weight_decay, recipe.augment, recipe.lr, recipe.schedule) == (0, "none", 0.003, "constant")


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_epochs": 2}, {"isolation_rate": 0.2}, {"isolation_augment": "crop"},
        {"isolation_lr": 0.01},
        {"gamma": 5.0}, {"trap": "sample", "gamma": 1.4}, {"objective": "ascent"}, {"unlearn_steps": 2},
        {"unlearn_batch_size": 3},
        {"unlearn_lr": 0.01}, {"unlearn_stop": 1e-6}, {"unlearn_norms": "frozen"},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    base = {"trap": "batch", "gamma": options["gamma"]} if "trap" in options else {}
    if "unlearn_stop" in options:
        base = {"unlearn_batch_size": 4}
        options = options | base
    assert not are_equal(weights_of(defend(**base)[0].model), weights_of(defend(**options)[0].model))
