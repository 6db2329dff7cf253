"""CBD: weights, critic and phases against what the paper's formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import are_equal, toy_batch, toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench.defenses import cbd
from bdbench.defenses.base import Defended, Task, mean_cross_entropy
from bdbench.defenses.cbd import CBD, Critic, dependence, sample_weights
from bdbench.engine import Engine, frozen
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator, scoped


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"))


def critic_of(size: int = 4, dropout: float = 0.0, seed: int = 0) -> Critic:
    with scoped(seed, "critic"):
        return Critic(size, dropout)


# weights


def test_equal_losses_weigh_one() -> None:
    assert sample_weights(torch.tensor([2.0, 0.5]), torch.tensor([2.0, 0.5])).tolist() == pytest.approx([1, 1])


def test_a_weight_is_the_twins_share_of_both_losses_scaled_to_mean_one() -> None:
    # shares 1/4 and 3/4, mean 1/2
    weights = sample_weights(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]))
    assert weights.tolist() == pytest.approx([0.5, 1.5])


def test_what_the_twin_fits_exactly_weighs_nothing() -> None:
    assert sample_weights(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])).tolist() == pytest.approx([0, 2])


def test_what_only_the_model_fits_weighs_most() -> None:
    # shares 1 and 1/2
    weights = sample_weights(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert weights.tolist() == pytest.approx([4 / 3, 2 / 3])


def test_weights_have_mean_one_whatever_the_losses() -> None:
    weights = sample_weights(noise(64).exp(), noise(64, seed=1).exp())
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


def test_weights_do_not_depend_on_the_scale_of_the_losses() -> None:
    twin, own = noise(8).exp(), noise(8, seed=1).exp()
    torch.testing.assert_close(sample_weights(twin * 7, own * 7), sample_weights(twin, own))


def test_weights_carry_no_gradient() -> None:
    own = torch.ones(3, requires_grad=True)
    weights = sample_weights(torch.ones(3, requires_grad=True), own)
    assert weights.grad_fn is None
    assert not weights.requires_grad


def test_a_twin_that_fits_everything_gives_zeros_and_no_nan() -> None:
    assert sample_weights(torch.zeros(4), torch.ones(4)).tolist() == [0, 0, 0, 0]
    assert sample_weights(torch.zeros(4), torch.zeros(4)).tolist() == [0, 0, 0, 0]


# the critic


def test_a_constant_embedding_depends_on_nothing() -> None:
    critic = critic_of().eval()
    assert dependence(critic, noise(8, 4), noise(1, 4).expand(8, 4)).item() == 0


def test_the_estimate_is_true_pairs_minus_pairs_with_the_next_sample() -> None:
    critic = critic_of().eval()
    twin, own = noise(3, 4), noise(3, 4, seed=1)
    with torch.no_grad():
        true = [critic(twin[[row]], own[[row]]).item() for row in (0, 1, 2)]
        shifted = [critic(twin[[row]], own[[other]]).item() for row, other in ((0, 1), (1, 2), (2, 0))]
    assert dependence(critic, twin, own).item() == pytest.approx((sum(true) - sum(shifted)) / 3, abs=1e-6)


def test_a_linear_critic_sees_no_dependence_at_all() -> None:
    # the mean of a linear score does not change when one half of the pairs is shifted
    class Linear(Critic):
        def forward(self, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
            return twin_BD.sum(1) + 3 * own_BD.sum(1)

    assert dependence(Linear(4, 0), noise(8, 4), noise(8, 4, seed=1)).item() == pytest.approx(0, abs=1e-5)


def test_a_product_critic_measures_the_covariance() -> None:
    class Product(Critic):
        def forward(self, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
            return (twin_BD * own_BD).sum(1)

    # pairs (1, 1), (-1, -1): true products 1 and 1, shifted -1 and -1
    both = torch.tensor([[1.0], [-1.0]])
    assert dependence(Product(1, 0), both, both).item() == 2


def test_the_estimate_is_bounded_by_the_longest_step_between_neighbours() -> None:
    critic = critic_of(16).train()
    twin, own = 5 * noise(32, 16), 5 * noise(32, 16, seed=1)
    for _ in range(30):
        critic(twin, own)  # the power iteration settles
    longest = (own - own.roll(-1, 0)).norm(dim=1).max()
    assert dependence(critic.eval(), twin, own).abs() <= longest * 1.001


def test_critic_weights_have_spectral_norm_at_most_one_also_after_learning() -> None:
    critic = critic_of(16)
    learner = torch.optim.Adam(critic.parameters(), 1e-2)
    twin, own = noise(32, 16), noise(32, 16, seed=1)
    for _ in range(50):
        learner.zero_grad()
        (-dependence(critic.train(), twin, own)).backward()
        learner.step()
    critic.train()
    for _ in range(30):
        critic(twin, own)  # one power iteration each; while learning the norm lags by a step
    for layer in (critic.layers[1], critic.layers[4]):
        assert isinstance(layer, torch.nn.Linear)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() <= 1 + 1e-3


def test_a_step_of_the_critic_raises_its_estimate() -> None:
    critic = critic_of()
    twin = noise(64, 4)
    own = twin + 0.1 * noise(64, 4, seed=1)
    for _ in range(30):
        critic.train()(twin, own)
    before = dependence(critic.eval(), twin, own).item()
    learner = torch.optim.SGD(critic.parameters(), 0.05)
    for _ in range(5):
        learner.zero_grad()
        (-dependence(critic.eval(), twin, own)).backward()
        learner.step()
    assert dependence(critic.eval(), twin, own).item() > before


def test_teaching_raises_the_estimate_too() -> None:
    data = toy_data(64)
    options = CBD(critic_steps=20, critic_lr=0.01, critic_dropout=0)
    critic = critic_of(24)
    learner = torch.optim.Adam(critic.parameters(), options.critic_lr)
    objective = cbd._Objective(options, toy_model(data), critic, learner)
    twin = noise(64, 24)
    own = twin + 0.1 * noise(64, 24, seed=1)
    before = dependence(critic.eval(), twin, own).item()
    objective._teach(twin, own)
    assert dependence(critic.eval(), twin, own).item() > before


def test_descending_the_information_term_alone_lowers_the_dependence() -> None:
    data = toy_data(64)
    twin, model, critic = toy_model(data, "twin").eval(), toy_model(data).eval(), critic_of(24).eval()
    images = toy_batch(data).images
    with torch.no_grad():
        twin_BD = twin.embed(images)
    learner = torch.optim.SGD(model.parameters(), 0.1)
    before = dependence(critic, twin_BD, model.embed(images))
    before.backward()
    learner.step()
    assert dependence(critic, twin_BD, model.embed(images)).item() < before.item()


def test_the_critic_is_judged_without_dropout() -> None:
    critic = critic_of(dropout=0.5).eval()
    twin, own = noise(8, 4), noise(8, 4, seed=1)
    assert dependence(critic, twin, own) == dependence(critic, twin, own)


# the loss


def objective_of(twin: Classifier, seed: int = 0, **options: Any) -> cbd._Objective:
    chosen = CBD.parse(options)
    critic = critic_of(twin.embedding_size, chosen.critic_dropout, seed)
    return cbd._Objective(chosen, twin, critic, torch.optim.Adam(critic.parameters(), chosen.critic_lr))


def test_equal_networks_without_extra_terms_take_a_plain_step_bit_for_bit() -> None:
    """Equal losses weigh 1 each."""
    data = toy_data(16)
    batch = toy_batch(data)
    twin, model, plain = (toy_model(data).eval() for _ in range(3))
    objective_of(frozen(twin), information_weight=0, bottleneck=0)(model, batch).backward()
    mean_cross_entropy(plain, batch).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        # the weights are 1 up to CBD's epsilon of 1e-8
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def test_weights_of_exactly_one_take_a_plain_step_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cbd, "sample_weights", lambda _, losses: torch.ones_like(losses))
    data = toy_data(64)

    def trained(loss: Any) -> dict[str, Tensor]:
        return weights_of(toy_engine().fit(toy_model(data), data, loss, toy_recipe(), phase="clean"))

    twin = frozen(toy_model(data, "twin"))
    assert are_equal(trained(objective_of(twin, information_weight=0, bottleneck=0)), trained(mean_cross_entropy))


def test_the_loss_is_the_weighted_cross_entropy_by_hand() -> None:
    data = toy_data(8)
    batch = toy_batch(data)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data).eval()
    with torch.no_grad():
        twin_losses = F.cross_entropy(twin(batch.images), batch.labels, reduction="none")
        losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        share = twin_losses / (twin_losses + losses)
        expected = (share / share.mean() * losses).mean()
        found = objective_of(twin, information_weight=0, bottleneck=0)(model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_bottleneck_adds_half_the_mean_squared_length() -> None:
    data = toy_data(8)
    batch = toy_batch(data)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data).eval()
    with torch.no_grad():
        without = objective_of(twin, information_weight=0, bottleneck=0)(model, batch)
        within = objective_of(twin, information_weight=0, bottleneck=0.1)(model, batch)
        length = model.embed(batch.images).norm(dim=1).square().mean()
    assert (within - without).item() == pytest.approx(0.1 * length.item() / 2, rel=1e-4)


def test_the_information_term_adds_its_weight_times_the_estimate() -> None:
    data = toy_data(8)
    batch = toy_batch(data)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data).eval()
    without = objective_of(twin, information_weight=0, bottleneck=0)(model, batch)
    objective = objective_of(twin, information_weight=3, bottleneck=0, critic_dropout=0)
    within = objective(model, batch)
    # the critic has learned during the call; now it is asked again
    with torch.no_grad():
        estimate = dependence(objective.critic.eval(), twin.embed(batch.images), model.embed(batch.images))
    assert (within - without).item() == pytest.approx(3 * estimate.item(), abs=1e-5)


def test_the_critic_learns_nothing_from_the_models_descent() -> None:
    data = toy_data(8)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data)
    objective = objective_of(twin, information_weight=1)
    loss = objective(model, toy_batch(data))
    before = weights_of(objective.critic)
    loss.backward()
    assert are_equal(before, weights_of(objective.critic))


# the whole method


def task_of(engine: Engine, seed: int = 0) -> tuple[Task, dict[str, Classifier]]:
    """A task that keeps the networks it gave out."""
    data = toy_data(64)
    given: dict[str, Classifier] = {}

    def new_model(purpose: str) -> Classifier:
        given[purpose] = toy_model(data, purpose, seed=seed)
        return given[purpose]

    return Task(train=data, new_model=new_model, recipe=toy_recipe(), engine=engine), given


def defend(**options: Any) -> Defended:
    task, _ = task_of(toy_engine())
    return CBD.parse({"twin_epochs": 1} | options).run(task)


def test_the_twin_is_not_touched_while_the_model_trains() -> None:
    engine = toy_engine()
    task, given = task_of(engine)
    fit = engine.fit
    seen: dict[str, dict[str, Tensor]] = {}

    def watched(model: Classifier, *args: Any, phase: str, **kwargs: Any) -> Classifier:
        trained = fit(model, *args, phase=phase, **kwargs)
        seen[phase] = weights_of(given["twin"])
        return trained

    engine.fit = watched  # type: ignore[method-assign]
    CBD(twin_epochs=2).run(task)
    assert list(seen) == ["twin", "clean"]
    assert are_equal(seen["twin"], seen["clean"])


def test_the_twin_and_the_model_begin_apart() -> None:
    task, _ = task_of(toy_engine())
    assert not torch.equal(task.new_model("twin").head.weight, task.new_model("model").head.weight)


def test_the_twin_trains_at_a_constant_rate_of_its_own() -> None:
    engine = toy_engine()
    task, _ = task_of(engine)
    CBD(twin_epochs=3, twin_lr=0.02).run(task)
    assert [(row["phase"], row["lr"]) for row in engine.history[:3]] == [("twin", 0.02)] * 3
    assert [row["phase"] for row in engine.history[3:]] == ["clean", "clean"]


def test_scores_are_high_where_the_twin_fits_well() -> None:
    engine = toy_engine()
    task, given = task_of(engine)
    result = CBD(twin_epochs=1).run(task)
    assert result.scores is not None
    assert torch.equal(result.scores, -engine.losses(given["twin"], task.train))
    assert result.set_aside is None


def test_without_the_information_term_the_critic_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_of(defend(information_weight=0).model)
    scope = scoped
    monkeypatch.setattr(cbd, "scoped", lambda seed, *purpose: scope(seed + 1, *purpose))
    assert are_equal(first, weights_of(defend(information_weight=0).model))


def test_with_the_information_term_the_critic_plays_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_of(defend(information_weight=0.5).model)
    scope = scoped
    monkeypatch.setattr(cbd, "scoped", lambda seed, *purpose: scope(seed + 1, *purpose))
    assert not are_equal(first, weights_of(defend(information_weight=0.5).model))


@pytest.mark.parametrize(
    "options",
    [
        {"twin_epochs": 2}, {"twin_lr": 0.01}, {"information_weight": 0.5}, {"bottleneck": 0.5},
        {"critic_lr": 0.1}, {"critic_steps": 3}, {"critic_dropout": 0.0},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    assert not are_equal(weights_of(defend().model), weights_of(defend(**options).model))
