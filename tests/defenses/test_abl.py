"""ABL: the trap, the isolated samples and the dose of unlearning."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from linear import linear_model
from torch import Tensor
from toys import (
    DroppedFeatures,
    Fuse,
    are_equal,
    toy_batch,
    toy_data,
    toy_engine,
    toy_model,
    toy_recipe,
    weights_of,
)

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.data import ImageDataset, Role
from bdbench.defenses.base import Defended, Task, lowest
from bdbench.defenses.training.abl import ABL, Trap, capped_loss, isolated_count, trap_losses, trapped_loss
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.protocol import networks
from bdbench.seeds import generator
from bdbench.training import engine as engine_module
from bdbench.training.engine import Engine, others_over_own
from bdbench.training.loop import mean_cross_entropy

TRAPS: tuple[Trap, ...] = ("batch", "sample", "flooding")


def gradient(values: list[float], trap: Trap, gamma: float = 0.5) -> list[float]:
    """The gradient of the trapped loss towards each sample's loss, times their number."""
    losses = torch.tensor(values, requires_grad=True)
    trap_losses(losses, trap, gamma).backward()
    assert losses.grad is not None
    return (losses.grad * len(values)).tolist()


# the trap


@pytest.mark.parametrize("trap", TRAPS)
def test_above_gamma_every_trap_is_plain_descent(trap: Trap) -> None:
    assert gradient([0.9, 0.7], trap) == [1, 1]


@pytest.mark.parametrize("trap", TRAPS)
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


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("gamma", [0.1, 0.5, 3.0])
def test_a_trap_has_the_gradient_of_its_values(trap: Trap, gamma: float) -> None:
    losses = torch.tensor([0.2, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda losses: trap_losses(losses, trap, gamma), (losses,))


def weight_gradients(loss: Any) -> Tensor:
    data = toy_data(16)
    model = toy_model(data).train()
    loss(model, toy_batch(data)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(("gamma", "sign"), [(0.5, 1), (5.0, -1)])
def test_batch_trap_and_flooding_move_the_weights_alike_up_or_down(gamma: float, sign: int) -> None:
    """The untrained loss is about ln(4), between the two."""
    plain = weight_gradients(mean_cross_entropy)
    assert plain.any()
    assert torch.equal(weight_gradients(trapped_loss("batch", gamma)), sign * plain)
    assert torch.equal(weight_gradients(trapped_loss("flooding", gamma)), sign * plain)


def test_on_mixed_losses_the_sample_trap_moves_the_weights_another_way() -> None:
    by_batch, by_sample = (weight_gradients(trapped_loss(trap, 1.4)) for trap in ("batch", "sample"))
    assert not torch.allclose(by_batch.abs(), by_sample.abs())


# the isolated samples


def test_the_lowest_losses_are_taken() -> None:
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist() == [False, True, False, True]


def test_equal_losses_are_taken_from_every_class_of_a_dataset_in_order_of_its_classes() -> None:
    labels = torch.arange(10).repeat_interleave(100)
    taken = labels[lowest(torch.ones(1000), 200)].bincount(minlength=10)
    # 20 of each, sd 4
    assert taken.min() >= 8
    assert taken.max() <= 32


def test_a_dataset_in_order_of_its_classes_is_isolated_as_one_that_is_not() -> None:
    """The model is sure of all, most of the poison, which lies last; cross entropies would take the first class."""
    model = linear_model(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(1, 32) * 100)
    sides = torch.tensor([0] * 90 + [1] * 110)
    is_poison = torch.arange(200) >= 180
    pixels = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    pixels.flatten(1)[torch.arange(200), sides] = 200
    pixels.flatten(1)[180:, 1] = 255
    for order in (torch.arange(200), torch.randperm(200, generator=generator(0, "order"))):
        data = ImageDataset(pixels[order], sides[order], ("a", "b"))
        assert not toy_engine().losses(model, data).any()
        assert torch.equal(lowest(toy_engine().margins(model, data), 20), is_poison[order])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_exactly_as_many_are_taken_as_asked(count: int) -> None:
    assert int(lowest(torch.zeros(4), count).sum()) == count


def test_samples_that_the_model_is_sure_of_are_still_told_apart() -> None:
    """Their cross entropies are all exactly 0."""
    logits, labels = torch.tensor([[200.0, 0.0], [300.0, 0.0], [0.0, 400.0]]), torch.tensor([0, 0, 1])
    assert not F.cross_entropy(logits, labels, reduction="none").any()
    margins = others_over_own(logits, labels)
    assert margins.tolist() == [-200, -300, -400]
    assert lowest(margins, 1).tolist() == [False, False, True]


def test_a_margin_is_a_cross_entropy_by_its_softplus() -> None:
    logits, labels = torch.randn(20, 4, generator=generator(0, "logits")), torch.arange(20) % 4
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(F.softplus(others_over_own(logits, labels)), expected)


def test_the_mean_loss_is_that_of_all_epochs_of_isolating() -> None:
    by_epoch = [defend(isolation_epochs=epochs)[0].scores for epochs in (1, 2)]
    losses = [F.softplus(-scores.double()) for scores in by_epoch if scores is not None]
    found = defend(isolation_epochs=2, isolate_by="mean")[0].scores
    assert found is not None
    torch.testing.assert_close(-found, torch.stack(losses).mean(0))


@pytest.mark.parametrize("by", ["last", "mean"])
def test_each_round_is_what_a_run_that_ended_there_would_have_isolated(by: str) -> None:
    options = {"isolate_by": by, "finetune": False, "unlearn_steps": 0}
    rounds = defend(isolation_epochs=3, **options)[0].rounds
    assert [(each.phase, each.epoch) for each in rounds] == [("isolate", 1), ("isolate", 2), ("isolate", 3)]
    for epochs, each in enumerate(rounds, 1):
        set_aside = defend(isolation_epochs=epochs, **options)[0].set_aside
        assert set_aside is not None
        assert torch.equal(torch.nonzero(set_aside).flatten(), each.rows)


def test_poison_without_loss_is_isolated_purely() -> None:
    is_poison = torch.arange(20) % 5 == 0
    assert torch.equal(lowest((~is_poison).float(), 4), is_poison)


class Watched(Engine):
    """An engine that keeps, for every phase, its data, its recipe, its optimiser, and the model before and after."""

    def __init__(self) -> None:
        base = toy_engine()
        super().__init__(base.device, base.bf16, base.seed)
        self.data: dict[str, ImageDataset] = {}
        self.rows: dict[str, Tensor | None] = {}
        self.before: dict[str, dict[str, Tensor]] = {}
        self.after: dict[str, dict[str, Tensor]] = {}
        self.recipes: dict[str, Any] = {}
        self.optimizers: dict[str, Any] = {}
        self.momenta: dict[str, list[Tensor]] = {}
        self.decays: dict[str, float] = {}

    def fit(  # type: ignore[override]
        self, model: Classifier, data: ImageDataset, loss: Any, recipe: Any, *, phase: str, **settings: Any
    ) -> Classifier:
        self.data[phase], self.before[phase], self.recipes[phase] = data, weights_of(model), recipe
        self.rows[phase], self.optimizers[phase] = settings.get("rows"), settings.get("optimizer")
        if self.optimizers[phase] is not None:
            self.decays[phase] = self.optimizers[phase].param_groups[0]["weight_decay"]
            state = self.optimizers[phase].state
            self.momenta[phase] = [state[weight]["momentum_buffer"].clone() for weight in model.parameters() if state]
        trained = super().fit(model, data, loss, recipe, phase=phase, **settings)
        self.after[phase] = weights_of(trained)
        return trained

    def steps(self, phase: str) -> int:
        return sum(row["phase"] == phase for row in self.history)


def defend(count: int = 80, **options: Any) -> tuple[Defended, Watched]:
    engine, data = Watched(), toy_data(count)
    task = Task(train=data, new_model=lambda purpose: toy_model(data, purpose), recipe=toy_recipe(), engine=engine)
    quick = {"isolation_epochs": 1, "isolation_rate": 0.1, "unlearn_steps": 4, "unlearn_stop": 100.0}
    quick |= {"unlearn_step_limit": 0}
    return ABL.parse(quick | options).run(task), engine


def scores_of(result: Defended) -> Tensor:
    assert result.scores is not None
    return result.scores


def test_the_isolated_count_is_the_rate_rounded_down() -> None:
    result, _ = defend(79, isolation_rate=0.1)
    assert result.set_aside is not None
    assert int(result.set_aside.sum()) == 7


def test_no_isolated_sample_has_a_higher_loss_than_one_that_stays() -> None:
    result, _ = defend()
    assert result.scores is not None
    assert result.set_aside is not None
    assert result.scores[result.set_aside].min() >= result.scores[~result.set_aside].max()


def test_unlearning_is_counted_in_steps_the_other_phases_in_epochs() -> None:
    _, engine = defend()
    assert [row["step"] for row in engine.history if row["phase"] == "unlearn"] == [1, 2, 3, 4]
    assert not any("step" in row for row in engine.history if row["phase"] != "unlearn")


def test_isolated_samples_and_the_rest_are_the_whole_set() -> None:
    result, engine = defend()
    assert result.set_aside is not None
    assert len(engine.data["isolate"]) == 80
    assert engine.data["unlearn"].fingerprint == toy_data(80).take(result.set_aside).fingerprint
    assert torch.equal(engine.rows["finetune"], torch.nonzero(~result.set_aside).flatten())


def test_a_rate_that_isolates_less_than_two_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"isolation_rate 0\.01 isolates 0 of 80 samples; raise it to at least 0\.025"
    ):
        defend(isolation_rate=0.01)


def test_a_rate_that_isolates_two_is_enough() -> None:
    result, _ = defend(isolation_rate=0.025)
    assert result.set_aside is not None
    assert int(result.set_aside.sum()) == 2


@pytest.mark.parametrize("rate", [79 / 80, math.nextafter(1, 0)])
def test_a_rate_that_leaves_less_than_two_is_refused(rate: float) -> None:
    with pytest.raises(OptionError, match=r"isolates 79 of 80 samples and leaves 1; lower it to at most 0\.975"):
        defend(isolation_rate=rate)


def test_a_rate_that_leaves_two_is_enough() -> None:
    result, _ = defend(isolation_rate=78 / 80)
    assert result.set_aside is not None
    assert int((~result.set_aside).sum()) == 2


@pytest.mark.parametrize("total", [4, 7, 79, 80, 1366, 49_999, 50_000, 1_281_167])
def test_the_rate_that_a_refusal_advises_is_accepted(total: int) -> None:
    for refused, least in ((1e-9, 2), (math.nextafter(1, 0), total - 3)):
        with pytest.raises(OptionError, match="to at") as error:
            isolated_count(refused, total)
        advised = isolated_count(float(str(error.value).split()[-1]), total)
        assert 2 <= advised <= total - 2
        assert abs(advised - least) <= max(1, 2e-6 * total)


def test_which_samples_are_isolated_does_not_depend_on_the_batches_of_the_judging_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = defend()
    monkeypatch.setitem(engine_module.PIXELS_AT_ONCE, "cpu", 1)
    single, _ = defend()
    assert whole.set_aside is not None
    assert single.set_aside is not None
    assert torch.equal(whole.set_aside, single.set_aside)


def test_isolating_has_its_own_rate_and_no_augmentation() -> None:
    _, engine = defend(isolation_lr=0.03, isolation_epochs=2)
    recipe = engine.recipes["isolate"]
    assert (recipe.lr, recipe.epochs, recipe.schedule, recipe.augment) == (0.03, 2, "constant", "none")
    assert engine.recipes["finetune"] == toy_recipe()


def test_each_phase_goes_on_from_the_one_before() -> None:
    _, engine = defend()
    assert are_equal(engine.after["isolate"], engine.before["finetune"])
    assert are_equal(engine.after["finetune"], engine.before["unlearn"])


def test_without_fine_tuning_unlearning_goes_on_from_isolation() -> None:
    result, engine = defend(finetune=False)
    assert list(engine.data) == ["isolate", "unlearn"]
    assert are_equal(engine.after["isolate"], engine.before["unlearn"])
    assert are_equal(engine.after["unlearn"], weights_of(result.model))


def test_with_neither_fine_tuning_nor_unlearning_the_isolating_model_is_delivered() -> None:
    result, engine = defend(finetune=False, unlearn_steps=0)
    assert are_equal(engine.after["isolate"], weights_of(result.model))


def test_without_fine_tuning_the_joint_objective_still_learns_the_rest() -> None:
    """The paper's two stages."""
    result, engine = defend(finetune=False, unlearn_steps=60, unlearn_lr=0.02, unlearn_stop=1.0)
    assert result.set_aside is not None
    rest = toy_data(80).take(~result.set_aside)
    before, after = (losses_of(rest, engine, when["unlearn"]) for when in (engine.before, engine.after))
    assert after < before


# unlearning


def losses_of(data: ImageDataset, engine: Engine, weights: dict[str, Tensor]) -> float:
    model = toy_model(toy_data(80))
    model.load_state_dict(weights)
    return float(engine.losses(model, data).mean())


def isolated_losses(engine: Watched, weights: dict[str, Tensor]) -> float:
    return losses_of(engine.data["unlearn"], engine, weights)


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
        def fit(  # type: ignore[override]
            self, model: Classifier, data: ImageDataset, loss: Any, recipe: Any, **settings: Any
        ) -> Classifier:
            def counted(model: Classifier, batch: Any) -> Tensor:
                seen.append(settings["phase"])
                value: Tensor = loss(model, batch)
                return value

            return super().fit(model, data, counted, recipe, **settings)

    data = toy_data(80)
    task = Task(train=data, new_model=lambda purpose: toy_model(data, purpose), recipe=toy_recipe(), engine=Counting())
    ABL(
        isolation_epochs=1,
        isolation_rate=rate,
        unlearn_steps=9,
        unlearn_stop=100,
        unlearn_batch_size=batch,
        unlearn_step_limit=0,
    ).run(task)
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


def test_where_the_dose_is_too_small_it_goes_on_until_the_loss_is_at_the_cap() -> None:
    dose = {"unlearn_steps": 2, "unlearn_lr": 0.05, "unlearn_stop": 1.0}
    short, long = defend(**dose)[0], defend(**dose, unlearn_step_limit=300)
    assert (short.findings["took"], long[0].findings["took"]) == (False, True)
    assert isolated_losses(long[1], long[1].after["unlearn-on"]) >= 0.85 * math.log(4)
    assert 0 < long[1].steps("unlearn-on") < 298


def test_a_dose_that_is_enough_is_not_exceeded() -> None:
    enough = {"unlearn_steps": 200, "unlearn_lr": 0.05, "unlearn_stop": 1.0}
    plain, more = (defend(**enough, unlearn_step_limit=limit) for limit in (0, 1000))
    assert "unlearn-on" not in more[1].after
    assert are_equal(weights_of(plain[0].model), weights_of(more[0].model))


def test_an_ascent_that_did_not_take_says_so() -> None:
    result, engine = defend(unlearn_steps=1, unlearn_lr=1e-6, unlearn_stop=1.0, unlearn_step_limit=2)
    assert engine.steps("unlearn-on") == 1
    assert not result.findings["took"]
    assert result.findings["said"].startswith("unlearning did not take: the samples set aside have a loss of ")
    assert result.findings["isolated_loss"] == pytest.approx(
        isolated_losses(engine, engine.after["unlearn-on"]), abs=1e-3
    )


def test_the_dose_may_be_counted_in_passes_over_the_rest() -> None:
    """72 of 80 samples are the rest: two batches of 64 a pass."""
    steps, passes = defend(unlearn_steps=6), defend(unlearn_epochs=3)
    assert are_equal(weights_of(steps[0].model), weights_of(passes[0].model))


def test_the_paper_and_its_code_are_presets_that_unlearn_without_a_cap() -> None:
    paper, code = ABL.presets["paper"], ABL.presets["code"]
    assert (paper["finetune"], paper["objective"]) == (False, "joint")
    assert (code["objective"], code["unlearn_steps"], code["unlearn_momentum"]) == ("ascent", 32, "kept")
    assert paper["unlearn_stop"] == code["unlearn_stop"] == 1000


def test_the_cap_holds_for_the_mean_or_for_each_sample() -> None:
    """Cross entropies ln(1 + e^-3) and ln(1 + e^3): under a cap of 1 the mean is above, the first sample is not."""
    logits, labels = torch.tensor([[3.0, 0.0], [0.0, 3.0]], requires_grad=True), torch.tensor([0, 0])
    losses = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    (batch,) = torch.autograd.grad(capped_loss(logits, labels, "batch", 1.0), logits)
    (sample,) = torch.autograd.grad(capped_loss(logits, labels, "sample", 1.0), logits)
    assert not batch.any()
    assert sample[0].any()
    assert not sample[1].any()
    assert capped_loss(logits, labels, "batch", 2.0).item() == pytest.approx(sum(losses) / 2)
    assert capped_loss(logits, labels, "batch", 1.0).item() == pytest.approx(1.0)
    assert capped_loss(logits, labels, "sample", 1.0).item() == pytest.approx((losses[0] + 1) / 2)


@pytest.mark.parametrize("objective", ["joint", "ascent"])
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_a_sample_below_the_cap_is_ascended_though_the_mean_is_above_if_told_so(objective: str, per: str) -> None:
    def unlearned(cap: float) -> dict[str, Tensor]:
        _, engine = defend(
            objective=objective, unlearn_steps=1, unlearn_norms="frozen", unlearn_stop=cap / math.log(4),
            unlearn_cap=per,
        )  # fmt: skip
        return engine.after["unlearn"]

    _, engine = defend(unlearn_steps=1)
    fine_tuned = toy_model(toy_data(80))
    fine_tuned.load_state_dict(engine.before["unlearn"])
    losses = engine.losses(fine_tuned, engine.data["unlearn"])
    below_all, below_mean = float(losses.min()) / 2, float(losses.min() + losses.mean()) / 2
    assert are_equal(unlearned(below_all), unlearned(below_mean)) == (per == "batch")


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
        (-F.cross_entropy(logits, isolated.labels)).backward()
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
    for norms, stays in (("frozen", True), ("untracked", True), ("batch", False)):
        _, engine = defend(unlearn_norms=norms)
        assert torch.equal(engine.before["unlearn"][name], engine.after["unlearn"][name]) == stays


def parameters_of(model: Classifier) -> dict[str, Tensor]:
    """Weights without the statistics of batch norm."""
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("objective", ["joint", "ascent"])
def test_untracked_norms_use_the_batches_as_tracked_ones_do_and_frozen_ones_do_not(objective: str) -> None:
    result, _ = defend(objective=objective, unlearn_norms="batch")
    parameters = parameters_of(result.model)
    for norms, same in (("untracked", True), ("frozen", False)):
        other, _ = defend(objective=objective, unlearn_norms=norms)
        assert are_equal(parameters, parameters_of(other.model)) == same


def test_norms_track_again_after_unlearning() -> None:
    result, _ = defend(unlearn_norms="untracked")
    norms = [module for module in result.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.1]


# the optimiser of unlearning


def test_fresh_momentum_means_an_optimiser_for_each_phase() -> None:
    _, engine = defend()
    assert engine.optimizers == {"isolate": None, "finetune": None, "unlearn": None}


@pytest.mark.parametrize(("finetune", "phase"), [(True, "finetune"), (False, "isolate")])
def test_kept_momentum_goes_on_from_the_phase_before(finetune: bool, phase: str) -> None:
    _, engine = defend(finetune=finetune, unlearn_momentum="kept")
    assert engine.optimizers["unlearn"] is engine.optimizers[phase]
    assert sum(optimizer is not None for optimizer in engine.optimizers.values()) == 2
    assert engine.momenta[phase] == []
    assert any(momentum.any() for momentum in engine.momenta["unlearn"])


def test_an_optimiser_to_be_kept_takes_the_same_steps_until_unlearning() -> None:
    for finetune in (True, False):
        fresh, kept = (defend(finetune=finetune, unlearn_momentum=momentum)[1] for momentum in ("fresh", "kept"))
        assert are_equal(fresh.before["unlearn"], kept.before["unlearn"])
        assert not are_equal(fresh.after["unlearn"], kept.after["unlearn"])


@pytest.mark.parametrize("momentum", ["fresh", "kept"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_step_of_unlearning_by_hand(momentum: str, decay: float) -> None:
    """Nesterov's form: the buffer b becomes 0.9 b + g (fresh: g), and the weights go by lr (g + 0.9 b)."""
    _, engine = defend(
        objective="ascent", unlearn_steps=1, unlearn_lr=0.01, unlearn_norms="frozen", unlearn_momentum=momentum,
        unlearn_weight_decay=decay,
    )  # fmt: skip
    model = toy_model(toy_data(80)).eval()
    model.load_state_dict(engine.before["unlearn"])
    isolated = engine.data["unlearn"]
    (-F.cross_entropy(model(isolated.images.float() / 255), isolated.labels)).backward()
    buffers = engine.momenta.get("unlearn") or [torch.zeros_like(weight) for weight in model.parameters()]
    with torch.no_grad():
        for weight, buffer in zip(model.parameters(), buffers, strict=True):
            assert weight.grad is not None
            gradient = weight.grad + decay * weight
            weight.sub_(0.01 * (gradient + 0.9 * (0.9 * buffer + gradient)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, engine.after["unlearn"][name], rtol=1e-5, atol=1e-6)


def test_a_kept_optimiser_changes_its_weight_decay_for_unlearning() -> None:
    _, engine = defend(unlearn_momentum="kept", unlearn_weight_decay=0.3)
    assert engine.decays == {"finetune": toy_recipe().weight_decay, "unlearn": 0.3}
    _, engine = defend(unlearn_momentum="kept")
    assert engine.decays["unlearn"] == 0


def test_a_recipe_without_momentum_has_none_to_keep() -> None:
    data = toy_data(80)

    def run(momentum: str) -> dict[str, Tensor]:
        task = Task(data, lambda purpose: toy_model(data, purpose), toy_recipe(momentum=0.0), toy_engine())
        options = {"isolation_epochs": 1, "isolation_rate": 0.1, "unlearn_steps": 4, "unlearn_momentum": momentum}
        return weights_of(ABL.parse(options).run(task).model)

    assert are_equal(run("kept"), run("fresh"))


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("momentum", ["fresh", "kept"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(finetune: bool, momentum: str, tmp_path: Path) -> None:
    data = toy_data(80)
    options = {
        "isolation_epochs": 3, "isolation_rate": 0.1, "unlearn_steps": 12, "unlearn_batch_size": 4,
        "unlearn_weight_decay": 0.1, "unlearn_norms": "untracked", "finetune": finetune, "unlearn_momentum": momentum,
        "isolate_by": "mean" if finetune else "last", "unlearn_step_limit": 16,
    }  # fmt: skip

    def run(engine: Engine) -> Defended:
        def new_model(purpose: str) -> Classifier:
            return toy_model(data, purpose, features=DroppedFeatures)

        return ABL.parse(options).run(Task(data, new_model, toy_recipe(), engine))

    interrupted = 0
    while interrupted < 20:
        try:
            # an epoch has 5 steps, of unlearning 2; the jump of a resumed phase counts as one
            resumed = run(toy_engine(tmp_path, progress=Fuse(6)))
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 3
    whole = run(toy_engine())
    assert are_equal(weights_of(resumed.model), weights_of(whole.model))
    assert len(whole.rounds) == 3
    for one, other in zip(resumed.rounds, whole.rounds, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one.rows, other.rows)
    assert torch.equal(scores_of(resumed), scores_of(whole))


def test_unlearning_decays_no_weights_and_augments_nothing_it_ascends() -> None:
    _, engine = defend(unlearn_lr=0.003)
    recipe = engine.recipes["unlearn"]
    assert (recipe.weight_decay, recipe.augment, recipe.lr, recipe.schedule) == (0, "none", 0.003, "constant")


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_epochs": 2}, {"isolation_rate": 0.2}, {"isolation_augment": "crop"},
        {"isolation_lr": 0.01},
        {"gamma": 5.0}, {"trap": "sample", "gamma": 1.4}, {"finetune": False}, {"objective": "ascent"},
        {"unlearn_steps": 2}, {"unlearn_batch_size": 3}, {"unlearn_lr": 0.01}, {"unlearn_stop": 1e-6},
        {"unlearn_momentum": "kept"}, {"unlearn_weight_decay": 0.1}, {"unlearn_norms": "frozen"},
        {"unlearn_norms": "untracked"}, {"unlearn_norms": "apart"}, {"unlearn_epochs": 3}, {"unlearn_step_limit": 9},
        {"isolate_by": "mean", "isolation_epochs": 3},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    base = {"trap": "batch", "gamma": options["gamma"]} if "trap" in options else {}
    base = {"isolation_epochs": 3} if "isolate_by" in options else base
    if "unlearn_stop" in options:
        base = {"unlearn_batch_size": 4}
        options = options | base
    assert not are_equal(weights_of(defend(**base)[0].model), weights_of(defend(**options)[0].model))


# a backdoor


class Backdoored(NamedTuple):
    """A network that learned the digits with their backdoor, and which of them are poison (N,)."""

    data: DatasetArtifact
    model: Classifier
    is_poison: Tensor

    def task(self) -> Task:
        return Task(self.data.train, lambda _: self.model, toy_recipe(), toy_engine())

    def unlearned(self, isolated: Tensor, steps: int, lr: float) -> tuple[float, float]:
        """BA and ASR after ascent on the isolated samples (N,) bool alone, without a cap."""
        train = self.data.train
        options = ABL(
            objective="ascent",
            unlearn_steps=steps,
            unlearn_lr=lr,
            unlearn_stop=1000,
            unlearn_batch_size=16,
            unlearn_step_limit=0,
        )
        model = copy.deepcopy(self.model)
        if steps:
            options._unlearn(self.task(), model, train.take(isolated), train.take(~isolated), None)
        splits = (self.data.test, self.data.triggered)
        predictions = (toy_engine().logits(model, split.images).argmax(1) for split in splits)
        ba, asr = (
            float((found == split.labels).float().mean()) for found, split in zip(predictions, splits, strict=True)
        )
        return ba, asr


@pytest.fixture(scope="module")
def backdoored(digits: DatasetArtifact) -> Backdoored:
    model: Classifier = networks.fresh_model("convnet", digits.train, 0, "model")
    recipe = toy_recipe(epochs=3, batch_size=32)
    toy_engine().fit(model, digits.train, mean_cross_entropy, recipe, phase="plain")
    return Backdoored(digits, model, torch.tensor((digits.truth["role"] == Role.POISON).tolist()))


def fifty(candidates: Tensor) -> Tensor:
    """A mask (N,) of 50 of the candidates (N,), drawn."""
    rows = candidates.nonzero().flatten()
    mask = torch.zeros_like(candidates)
    mask[rows[torch.randperm(len(rows), generator=generator(0, "fifty"))[:50]]] = True
    return mask


def test_the_attack_fades_with_the_dose_and_the_task_stays(backdoored: Backdoored) -> None:
    """As the published log does: ASR 1.00, 0.47, 0.06, 0.01 and BA 0.83, 0.83, 0.82, 0.82."""
    isolated = fifty(backdoored.is_poison)
    results = [backdoored.unlearned(isolated, steps, 5e-4) for steps in (0, 8, 16, 20)]
    attack = [asr for _, asr in results]
    assert attack == sorted(attack, reverse=True)
    assert attack[0] > 0.95
    assert attack[-1] < 0.1
    assert results[-1][0] > results[0][0] - 0.05


def test_unlearning_clean_samples_costs_the_task_and_not_the_attack(backdoored: Backdoored) -> None:
    isolated = fifty(~backdoored.is_poison)
    (ba_before, asr_before), (ba, asr) = (backdoored.unlearned(isolated, steps, 4e-3) for steps in (0, 24))
    assert ba < ba_before - 0.05
    assert asr_before - asr < 0.5 * (ba_before - ba)
