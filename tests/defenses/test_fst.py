"""FST: the new head, the push away from the old one, and the whole method on a small backdoored model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of
from torch import Tensor, nn
from toys import are_equal, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.fst import FeatureShiftTuning, cosine, draw, product, rescale
from bdbench.seeds import generator
from bdbench.training.loop import Batch

RECIPE: dict[str, Any] = {"epochs": 30, "lr": 0.05, "weight_decay": 0.0}
HEAD = ("head.weight", "head.bias")


def defend(task: Task | None = None, **options: Any) -> Defended:
    return FeatureShiftTuning.parse(options).run(task or task_of(epochs=1, lr=0.05))


class Seen(Watched):
    """An engine that keeps the weights of the head at every call of a loss, and what the loss was."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.first: dict[str, Tensor] = {}

    def fit(
        self, model: Any, data: ImageDataset, loss: Callable[[Any, Batch], Tensor], *args: Any, **settings: Any
    ) -> Any:
        self.first = weights_of(model)

        def watched(model: Any, batch: Batch) -> Tensor:
            value = loss(model, batch)
            self.heads.append(model.head.weight.detach().clone())
            self.losses.append(value.detach())
            return value

        return super().fit(model, data, watched, *args, **settings)


# the parts


def test_the_push_is_the_sum_of_products_and_its_gradient_is_the_old_head() -> None:
    weight, old = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True), torch.tensor([[5.0, 6.0], [7.0, -8.0]])
    pushed = product(weight, old)
    assert pushed.item() == 5 + 12 + 21 - 32
    (slope,) = torch.autograd.grad(0.1 * pushed, weight)
    torch.testing.assert_close(slope, 0.1 * old)


def test_the_cosine_takes_the_head_as_one_vector() -> None:
    # rows have cosines 1 and 0; as vectors of four: 2 / (2 * sqrt 2)
    assert cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])).item() == (
        pytest.approx(0.5)
    )


def test_the_cosine_does_not_depend_on_the_length_of_the_old_head() -> None:
    weight, old = torch.rand(3, 4, generator=generator(0, "a")), torch.rand(3, 4, generator=generator(0, "b"))
    torch.testing.assert_close(cosine(weight, old), cosine(weight, 7 * old))
    torch.testing.assert_close(product(weight, 7 * old), 7 * product(weight, old))


def test_a_head_is_drawn_between_the_bounds_of_its_width() -> None:
    head = nn.Linear(16, 100)
    draw(head, generator(0, "head"))
    for parameter in head.parameters():
        assert parameter.abs().max() <= 0.25
        assert parameter.abs().max() > 0.24
        assert parameter.mean().abs() < 0.05


def test_rescaling_changes_the_length_and_not_the_direction() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    rescale(weight, torch.tensor(10.0))
    torch.testing.assert_close(weight, torch.tensor([[6.0, 0.0], [0.0, 8.0]]))


# the method


def test_the_head_is_as_long_as_the_old_one_at_every_step() -> None:
    engine = Seen()
    made = defend(task_of(engine, epochs=3, lr=0.5)).model
    length = backdoored_weights()["head.weight"].norm()
    assert len(engine.heads) == 6
    for weight in [*engine.heads, made.head.weight.detach()]:
        torch.testing.assert_close(weight.norm(), length)
    assert not torch.equal(engine.heads[0], engine.heads[-1])


def test_the_head_is_new_before_the_first_step_and_the_features_are_not() -> None:
    engine = Seen()
    defend(task_of(engine, epochs=1))
    before = backdoored_weights()
    assert all(torch.equal(before[name], engine.first[name]) == (name not in HEAD) for name in before)
    assert cosine(engine.first["head.weight"], before["head.weight"]).abs() < 0.5


def test_the_loss_is_cross_entropy_plus_alpha_times_the_product() -> None:
    plain, pushed = Seen(), Seen()
    defend(task_of(plain, epochs=1), alpha=0.0)
    defend(task_of(pushed, epochs=1), alpha=0.3)
    assert are_equal(plain.first, pushed.first)
    expected = plain.losses[0] + 0.3 * (pushed.heads[0] * backdoored_weights()["head.weight"]).sum()
    torch.testing.assert_close(pushed.losses[0], expected)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 30.0, "shift": "cosine"}])
def test_the_push_turns_the_head_away_from_the_old_one(options: dict[str, Any]) -> None:
    old = backdoored_weights()["head.weight"]
    plain, pushed = (
        cosine(defend(task_of(epochs=5), **chosen).model.head.weight, old) for chosen in ({"alpha": 0.0}, options)
    )
    assert pushed < plain - 0.1


def test_only_features_leaves_the_head_as_it_was_drawn() -> None:
    engine = Seen()
    made = weights_of(defend(task_of(engine, epochs=2), trainable="features").model)
    assert torch.equal(made["head.bias"], engine.first["head.bias"])
    torch.testing.assert_close(made["head.weight"], engine.first["head.weight"])
    assert not torch.equal(made["features.layers.0.weight"], engine.first["features.layers.0.weight"])


def test_the_head_follows_from_the_seed() -> None:
    engines = [Seen() for _ in range(3)]
    engines[2].seed = 1
    for engine in engines:
        defend(task_of(engine))
    one, same, other = (engine.first["head.weight"] for engine in engines)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_mended_model_forgets_the_trigger_and_nothing_else() -> None:
    suspect = suspect_model()
    right, taken = accuracies(defend(task_of(suspect=suspect, **RECIPE)).model)
    assert accuracies(suspect)[1] >= 0.95
    assert right >= 0.9
    assert taken <= 0.2
    assert are_equal(weights_of(suspect), backdoored_weights())
