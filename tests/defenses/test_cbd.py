"""CBD: weights, critic and phases against what the paper's formulas say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    DroppedFeatures,
    Fuse,
    ToyFeatures,
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
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.training import cbd
from bdbench.defenses.training.cbd import (
    CBD,
    Critic,
    Norm,
    Twin,
    dependence,
    divide_by_root_of_norm,
    largest_singular_value,
    sample_weights,
)
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.seeds import generator, scoped
from bdbench.training.engine import Engine
from bdbench.training.feeding import Feed
from bdbench.training.loop import mean_cross_entropy
from bdbench.training.recipe import Recipe

DISENTANGLED: dict[str, Any] = {
    "critic_pass": "epoch", "critic_lr": 0.2, "critic_decay": 20, "critic_norm": "root",
    "critic_judges_with_dropout": True, "bottleneck": 0,
}  # fmt: skip
"""The published code's mode with a critic."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"))


def critic_of(size: int = 4, dropout: float = 0.0, seed: int = 0, norm: Norm = "spectral") -> Critic:
    with scoped(seed, "critic"):
        return Critic(size, dropout, norm)


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


def test_with_two_samples_a_shift_turns_the_sign_of_the_estimate() -> None:
    critic = critic_of().eval()
    twin, own = noise(2, 4), noise(2, 4, seed=1)
    assert dependence(critic, twin, own.roll(-1, 0)).item() == -dependence(critic, twin, own).item() != 0


def test_one_sample_has_nothing_to_be_shifted_with() -> None:
    assert dependence(critic_of().eval(), noise(1, 4), noise(1, 4, seed=1)).item() == 0


def test_the_estimate_has_the_gradient_of_its_values() -> None:
    critic = critic_of().double().eval()
    twin, own = (noise(5, 4, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda twin, own: dependence(critic, twin, own), (twin, own))


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


@pytest.mark.parametrize("norm", ["spectral", "root"])
def test_a_step_of_the_critic_raises_its_estimate(norm: Norm) -> None:
    """Before the next normalisation, which may take it back."""
    critic = critic_of(norm=norm)
    twin = noise(64, 4)
    own = twin + 0.1 * noise(64, 4, seed=1)
    for _ in range(30):
        critic.train()(twin, own)
    before = dependence(critic.eval(), twin, own)
    learner = torch.optim.SGD(critic.parameters(), 0.05)
    (-before).backward()
    learner.step()
    assert dependence(critic.eval(), twin, own).item() > before.item()


def tutor_of(critic: Critic, **options: Any) -> cbd._Tutor:
    return cbd._Tutor(CBD.parse(options), critic)


@pytest.mark.parametrize("norm", ["spectral", "root"])
def test_teaching_raises_the_estimate_too(norm: Norm) -> None:
    critic = critic_of(24, norm=norm)
    divide_by_root_of_norm(critic)
    tutor = tutor_of(critic, critic_steps=50, critic_lr=0.01, critic_dropout=0, critic_norm=norm)
    twin = noise(64, 24)
    own = twin + 0.1 * noise(64, 24, seed=1)
    before = tutor.judge(twin, own).item()
    tutor.teach(twin, own)
    assert tutor.judge(twin, own).item() > before


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


@pytest.mark.parametrize("with_dropout", [False, True])
def test_dropout_blurs_a_judgement_only_if_told_so(with_dropout: bool) -> None:
    tutor = tutor_of(critic_of(dropout=0.5), critic_judges_with_dropout=with_dropout)
    twin, own = noise(8, 4), noise(8, 4, seed=1)
    tutor.teach(twin, own)
    with scoped(0, "dropout"):
        assert (tutor.judge(twin, own) != tutor.judge(twin, own)) == with_dropout


def test_with_dropout_even_a_constant_embedding_seems_to_matter() -> None:
    tutor = tutor_of(critic_of(dropout=0.5), critic_judges_with_dropout=True)
    with scoped(0, "dropout"):
        assert tutor.judge(noise(8, 4), noise(1, 4).expand(8, 4)).item() != 0


@pytest.mark.parametrize(
    ("decay", "decays"),
    # the published scheduler moves at the start of every epoch, so the first 20 epochs are 19
    [(20, {0: 0, 18: 0, 19: 1, 38: 1, 39: 2, 59: 3, 79: 4, 99: 5}), (1, {0: 1, 1: 2}), (0, {0: 0, 99: 0})],
)
def test_the_critics_rate_falls_an_epoch_early(decay: int, decays: dict[int, int]) -> None:
    tutor = tutor_of(critic_of(), critic_lr=0.2, critic_decay=decay)
    for epoch, times in decays.items():
        tutor.set_rate(epoch)
        assert tutor.learner.param_groups[0]["lr"] == pytest.approx(0.2 * 10**-times)


# the published code's norm


def test_the_estimate_of_one_row_is_its_length() -> None:
    assert largest_singular_value(torch.tensor([[3.0, -4.0]])).item() == pytest.approx(5)
    assert largest_singular_value(torch.tensor([[1.0], [-1.0]])).item() == pytest.approx(2**0.5)


def test_the_estimate_starts_from_an_input_of_ones_as_published() -> None:
    # an input of ones gives 0 here, where the published code gets NaN; an output of ones would give the root of 2
    assert largest_singular_value(torch.tensor([[1.0, -1.0]])).item() == 0
    matrix = noise(5, 7, seed=3).double()
    side = torch.ones(1, 7, dtype=torch.float64)
    for _ in range(5):
        other = side @ matrix.T
        other = other / other.norm()
        side = other @ matrix
        side = side / side.norm()
    torch.testing.assert_close(largest_singular_value(matrix), (side @ matrix.T @ other.T).squeeze())


def test_the_estimate_of_a_singular_value_is_never_too_large() -> None:
    matrix = 3 * noise(64, 128)
    true = torch.linalg.matrix_norm(matrix, 2).item()
    # five iterations: close, not there
    assert 0.9 * true < largest_singular_value(matrix).item() < true


class Layers(nn.Module):
    """Parameters whose largest singular values are 16, 4, 0.25 and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[16.0, 0.0], [0.0, 1.0]]))
        self.bias = nn.Parameter(torch.tensor([0.0, -4.0]))
        self.small = nn.Parameter(torch.tensor([0.25]))
        self.zero = nn.Parameter(torch.zeros(2, 3))


def test_the_root_norm_divides_each_parameter_by_the_root_of_its_norm() -> None:
    layers = Layers()
    divide_by_root_of_norm(layers)
    torch.testing.assert_close(layers.weight.data, torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
    assert layers.bias.tolist() == [0, -2]
    assert layers.small.tolist() == [0.5]
    assert not layers.zero.any()


def test_the_root_norm_repeated_creeps_down_to_one() -> None:
    # as measured on such a matrix: 57.7, 7.9, 2.95, 1.80, 1.40, 1.24, 1.16, 1.13
    layer = nn.Linear(128, 64)
    layer.weight.data = 3 * noise(64, 128)
    norms = []
    for _ in range(7):
        divide_by_root_of_norm(layer)
        norms.append(torch.linalg.matrix_norm(layer.weight, 2).item())
    assert norms == pytest.approx([7.9, 2.95, 1.80, 1.40, 1.24, 1.16, 1.13], rel=0.1)
    assert norms == sorted(norms, reverse=True)


def test_the_root_norm_is_applied_after_each_step_of_the_critic() -> None:
    critic = critic_of(norm="root")
    assert [name for name, _ in critic.named_parameters()] == [
        "layers.1.weight", "layers.1.bias", "layers.4.weight", "layers.4.bias",
    ]  # fmt: skip
    tutor_of(critic, critic_norm="root", critic_steps=12).teach(noise(8, 4), noise(8, 4, seed=1))
    for parameter in critic.parameters():
        assert torch.linalg.matrix_norm(torch.atleast_2d(parameter), 2).item() == pytest.approx(1, abs=0.1)


# the loss


def objective_of(twin: Classifier, seed: int = 0, **options: Any) -> cbd._Objective:
    chosen = CBD.parse(options)
    critic = critic_of(twin.embedding_size, chosen.critic_dropout, seed, chosen.critic_norm)
    return cbd._Objective(chosen, Twin(twin), cbd._Tutor(chosen, critic))


def test_equal_networks_without_extra_terms_take_a_plain_step() -> None:
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


def test_weights_of_one_take_plain_steps_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data(64)

    def trained(loss: Any) -> dict[str, Tensor]:
        return weights_of(toy_engine().fit(toy_model(data), data, loss, toy_recipe(), phase="clean"))

    twin = frozen(toy_model(data, "twin"))
    plain = trained(mean_cross_entropy)
    assert are_equal(trained(objective_of(twin, reweight=False, information_weight=0, bottleneck=0)), plain)
    monkeypatch.setattr(cbd, "sample_weights", lambda _, losses: torch.ones_like(losses))
    assert are_equal(trained(objective_of(twin, information_weight=0, bottleneck=0)), plain)


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


def test_the_weights_are_constants_to_the_descent() -> None:
    data = toy_data(8)
    batch = toy_batch(data)
    twin, model, other = toy_model(data, "twin").eval(), toy_model(data).eval(), toy_model(data).eval()
    objective_of(twin, information_weight=0, bottleneck=0)(model, batch).backward()
    twin_losses, losses = (F.cross_entropy(net(batch.images), batch.labels, reduction="none") for net in (twin, other))
    share = (twin_losses / (twin_losses + losses)).detach()
    (share / share.mean() * losses).mean().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_term_descends_through_the_models_own_embedding_and_never_the_twin() -> None:
    """Even a twin that was not frozen gets no gradient."""
    data = toy_data(16)
    batch = toy_batch(data)
    twin = toy_model(data, "twin").eval()
    found = []
    for information, bottleneck in ((0, 0), (1, 0), (0, 1)):
        model = toy_model(data).eval()
        objective_of(twin, information_weight=information, bottleneck=bottleneck)(model, batch).backward()
        grads = [parameter.grad for parameter in model.features.parameters()]
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
        assert all(parameter.grad is None for parameter in twin.parameters())
    assert found[0].any()
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


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
        estimate = objective.tutor.judge(twin.embed(batch.images), model.embed(batch.images))
    assert (within - without).item() == pytest.approx(3 * estimate.item(), abs=1e-5)


def test_the_critic_learns_nothing_from_the_models_descent() -> None:
    data = toy_data(8)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data)
    objective = objective_of(twin, information_weight=1)
    loss = objective(model, toy_batch(data))
    before = weights_of(objective.tutor.critic)
    loss.backward()
    assert are_equal(before, weights_of(objective.tutor.critic))


def test_a_critic_that_learns_in_passes_does_not_learn_in_steps() -> None:
    data = toy_data(8)
    twin, model = frozen(toy_model(data, "twin")), toy_model(data)
    changed = []
    for chosen in ("step", "epoch"):
        objective = objective_of(twin, information_weight=1, critic_pass=chosen, critic_norm="root")
        before = weights_of(objective.tutor.critic)
        objective(model, toy_batch(data)).backward()
        changed.append(not are_equal(before, weights_of(objective.tutor.critic)))
    assert changed == [True, False]


# the pass before an epoch


def pass_over(data: ImageDataset, model: Classifier, *, epoch: int = 0, bf16: bool = False, **options: Any) -> Critic:
    """Teach a critic on all of the data, 16 images at a time; a critic of the seed that learned."""
    critic = critic_of(model.embedding_size, norm="root")
    task = Task(data, lambda _: model, toy_recipe(augment="crop"), toy_engine(bf16=bf16))
    twin = frozen(toy_model(data, "twin", features=type(model.features)))
    tutor_of(critic, critic_norm="root", **options).teach_all(task, Twin(twin), model, epoch)
    return critic


def test_a_pass_moves_the_critic_and_of_the_model_only_batch_norm_statistics() -> None:
    data = toy_data(40)
    model = toy_model(data).eval()
    before = weights_of(model)
    critic = pass_over(data, model)
    after = weights_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"features.layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not are_equal(weights_of(critic), weights_of(critic_of(24, norm="root")))


def test_a_pass_takes_every_image_once_but_a_single_one_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    batch = Feed.batch

    def watched(feed: Feed, rows: Tensor, operations: tuple[str, ...], rng: torch.Generator) -> Tensor:
        taken.append(rows.tolist())
        assert operations == ("crop",)
        return batch(feed, rows, operations, rng)

    monkeypatch.setattr(Feed, "batch", watched)
    for count, sizes in ((40, [16, 16, 8]), (33, [16, 16])):
        taken.clear()
        data = toy_data(count)
        pass_over(data, toy_model(data))
        rows = [row for batch in taken for row in batch]
        assert [len(batch) for batch in taken] == sizes
        assert len(set(rows)) == sum(sizes)
        assert rows != sorted(rows)


@pytest.mark.parametrize("features", [ToyFeatures, DroppedFeatures])
def test_passes_of_different_epochs_see_other_batches_and_equal_ones_the_same(features: type[nn.Module]) -> None:
    data = toy_data(40)
    first, again, second = (
        weights_of(pass_over(data, toy_model(data, features=features), epoch=epoch)) for epoch in (0, 0, 1)
    )
    assert are_equal(first, again)
    assert not are_equal(first, second)


def test_a_pass_runs_the_networks_in_the_engines_precision_and_the_critic_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = toy_data(40)
    model = toy_model(data)
    embed, forward = Classifier.embed, Critic.forward
    seen: dict[str, set[bool]] = {"embed": set(), "critic": set()}

    def embed_watched(self: Classifier, images: Tensor) -> Tensor:
        if len(images) > 2:  # a new network is tried on two
            seen["embed"].add(torch.is_autocast_enabled("cpu"))
        return embed(self, images)

    def forward_watched(self: Critic, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
        seen["critic"].add(torch.is_autocast_enabled("cpu"))
        assert twin_BD.dtype == own_BD.dtype == torch.float32
        return forward(self, twin_BD, own_BD)

    monkeypatch.setattr(Classifier, "embed", embed_watched)
    monkeypatch.setattr(Critic, "forward", forward_watched)
    pass_over(data, model, bf16=True)
    assert seen == {"embed": {True}, "critic": {False}}


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


@pytest.mark.parametrize("options", [{}, DISENTANGLED], ids=["default", "disentangled"])
def test_no_weight_and_no_statistic_of_the_twin_moves_while_the_model_trains(options: dict[str, Any]) -> None:
    engine = toy_engine()
    task, given = task_of(engine)
    fit = engine.fit
    seen: dict[str, dict[str, Tensor]] = {}

    def watched(model: Classifier, *args: Any, phase: str, **kwargs: Any) -> Classifier:
        trained = fit(model, *args, phase=phase, **kwargs)
        seen[phase] = weights_of(given["twin"])
        return trained

    engine.fit = watched  # type: ignore[assignment, method-assign]
    CBD.parse({"twin_epochs": 2} | options).run(task)
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


@pytest.mark.parametrize(("asked", "trained"), [("auto", ["crop", "crop"]), ("none", ["none", "crop"])])
def test_the_twin_may_train_without_the_models_augmentation(asked: str, trained: list[str]) -> None:
    engine = toy_engine()
    task, _ = task_of(engine)
    fit, seen = engine.fit, []

    def watched(model: Classifier, data: ImageDataset, loss: Any, recipe: Recipe, **kwargs: Any) -> Classifier:
        seen.append(recipe.augment)
        return fit(model, data, loss, recipe, **kwargs)

    engine.fit = watched  # type: ignore[assignment, method-assign]
    recipe = task.recipe.model_copy(update={"augment": "crop"})
    CBD(twin_epochs=1, twin_augment=asked).run(replace(task, recipe=recipe))
    assert seen == trained


@pytest.mark.parametrize(("schedule", "falls"), [("constant", False), ("cosine", True)])
def test_the_learning_rate_of_the_twin_may_fall(schedule: str, falls: bool) -> None:
    engine = toy_engine()
    task, _ = task_of(engine)  # an epoch has 4 steps, and the history the rate of its last
    rates = [0.025 * (1 + math.cos(math.pi * step / 8)) if falls else 0.05 for step in (3, 7)]
    CBD.parse({"twin_epochs": 2, "twin_lr": 0.05, "twin_schedule": schedule}).run(task)
    assert [row["lr"] for row in engine.history if row["phase"] == "twin"] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("limit", "trained"), [(0, 5), (1, 1), (4, 1), (5, 1), (7, 2), (8, 2), (9, 2), (11, 3), (20, 5), (1000, 5)]
)
def test_the_twin_trains_for_the_whole_epochs_closest_to_its_limit_of_steps(limit: int, trained: int) -> None:
    engine = toy_engine()
    task, _ = task_of(engine)  # an epoch has 4 steps
    CBD(twin_epochs=5, twin_step_limit=limit).run(task)
    assert len([row for row in engine.history if row["phase"] == "twin"]) == trained


def test_the_fast_twin_takes_five_epochs_of_a_fifth_of_cifar_10_and_two_of_all_of_it() -> None:
    fast = CBD.parse({name: value for name, value in CBD.presets["fast"].items() if name.startswith("twin")})
    batch_size = CBD.presets["fast"]["batch_size"]
    assert [fast.epochs_of_twin(images / batch_size) for images in (9_500, 47_500)] == [5, 2]


def test_a_twin_that_judges_once_knows_each_image_as_it_is() -> None:
    """The batch holds other images, as after an augmentation."""
    data = toy_data(8)
    model, batch = frozen(toy_model(data, "twin")), toy_batch(data)
    taken = toy_engine().embeddings(model, data.images)
    rows, others = torch.tensor([5, 2]), batch.images[:2]
    once, anew = Twin(model, taken), Twin(model)
    torch.testing.assert_close(once.embed(others, rows), model.embed(data.images[rows].float() / 255))
    torch.testing.assert_close(anew.embed(others, rows), model.embed(others))
    wanted = toy_engine().losses(model, data)[rows]
    torch.testing.assert_close(once.losses(once.embed(others, rows), data.labels[rows]), wanted)


@pytest.mark.parametrize("critic_pass", ["step", "epoch"])
def test_a_twin_that_judges_once_looks_at_no_batch(critic_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, given = task_of(toy_engine())
    embed, looked = Classifier.embed, []

    def watched(self: Classifier, images: Tensor) -> Tensor:
        if self is given.get("twin") and not self.training:
            looked.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Classifier, "embed", watched)
    CBD.parse({"twin_epochs": 1, "twin_judges": "once", "critic_pass": critic_pass}).run(task)
    assert looked == [64, 64]  # all images, for its embeddings and for the scores


def test_scores_are_high_where_the_twin_fits_well() -> None:
    engine = toy_engine()
    task, given = task_of(engine)
    result = CBD(twin_epochs=1).run(task)
    assert result.scores is not None
    assert torch.equal(result.scores, -engine.margins(given["twin"], task.train))
    assert result.set_aside is None


@pytest.mark.parametrize("options", [{}, DISENTANGLED], ids=["default", "disentangled"])
@pytest.mark.parametrize(("weight", "plays_a_part"), [(0, False), (0.5, True)])
def test_the_critic_plays_a_part_only_with_the_information_term(
    options: dict[str, Any], weight: float, plays_a_part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"information_weight": weight}
    first = weights_of(defend(**options).model)
    scope = scoped
    monkeypatch.setattr(cbd, "scoped", lambda seed, *purpose: scope(seed + 1, *purpose))
    assert are_equal(first, weights_of(defend(**options).model)) != plays_a_part


def test_without_the_information_term_all_ways_to_teach_are_one() -> None:
    """No pass is made, so no statistic moves in it."""
    alone = {"information_weight": 0, "bottleneck": 0}
    plain, taught = (defend(**options) for options in (alone, DISENTANGLED | alone))
    assert are_equal(weights_of(plain.model), weights_of(taught.model))


@pytest.mark.parametrize("options", [{}, DISENTANGLED | {"critic_decay": 2}], ids=["default", "disentangled"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    data = toy_data(64)

    def run(engine: Engine) -> dict[str, Tensor]:
        def new_model(purpose: str) -> Classifier:
            return toy_model(data, purpose, features=DroppedFeatures)

        task = Task(data, new_model, toy_recipe(epochs=4, augment="crop"), engine)
        return weights_of(CBD.parse({"twin_epochs": 1, "information_weight": 0.5} | options).run(task).model)

    interrupted = 0
    while interrupted < 10:
        try:
            # an epoch has 4 steps: one is finished each time
            resumed = run(toy_engine(tmp_path, progress=Fuse(5, size=16)))
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 2
    assert are_equal(resumed, run(toy_engine()))


@pytest.mark.parametrize(
    "options",
    [
        {"twin_epochs": 2}, {"twin_lr": 0.01}, {"twin_augment": "crop"}, {"twin_schedule": "cosine"},
        {"reweight": False},
        {"information_weight": 0.5}, {"bottleneck": 0.5},
        {"critic_pass": "epoch"}, {"critic_lr": 0.1}, {"critic_steps": 3}, {"critic_decay": 1},
        {"critic_norm": "root"}, {"critic_dropout": 0.0}, {"critic_judges_with_dropout": True},
    ],
)  # fmt: skip
def test_every_option_changes_the_model(options: dict[str, Any]) -> None:
    assert not are_equal(weights_of(defend().model), weights_of(defend(**options).model))


# a backdoor


def test_a_backdoor_that_the_twin_has_learned_does_not_reach_the_model(digits: DatasetArtifact) -> None:
    data = digits.train
    recipe = toy_recipe(epochs=6, batch_size=32, lr=0.1)
    engine = toy_engine()
    task = Task(data, lambda purpose: toy_model(data, purpose), recipe, engine)
    plain = engine.fit(toy_model(data), data, mean_cross_entropy, recipe, phase="plain")
    result = CBD(twin_epochs=2, twin_lr=0.05).run(task)

    def accuracy(model: Classifier, judged: ImageDataset) -> float:
        return float((engine.logits(model, judged.images).argmax(1) == judged.labels).float().mean())

    assert result.scores is not None
    is_poison = torch.tensor((digits.truth["role"] == Role.POISON).tolist())
    twin_losses = F.softplus(-result.scores)
    weights = sample_weights(twin_losses, engine.losses(result.model, data))
    assert twin_losses[is_poison].median() < 0.1 * twin_losses[~is_poison].median()
    assert weights[is_poison].mean() < 0.1 * weights[~is_poison].mean()
    assert accuracy(plain, digits.triggered) > 0.8
    assert accuracy(result.model, digits.triggered) < 0.1
    assert accuracy(result.model, digits.test) > accuracy(plain, digits.test) - 0.05
