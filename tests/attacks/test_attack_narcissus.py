"""Narcissus: where the pattern points, how large it is, and where it is stronger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import give_surrogate, linear_model
from toys import flat, toy_data, toy_lab

from bdbench.attacks.narcissus import Narcissus, Pattern
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import choose_poisoned
from bdbench.seeds import generator
from bdbench.training.engine import Engine


def test_the_default_is_25_of_50000_images() -> None:
    labels = torch.arange(50_000) % 10
    rows = choose_poisoned(labels, Narcissus(target=2), generator(0, "test"))
    assert len(rows) == 25
    assert (labels[rows] == 2).all()


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"pattern": torch.full((3, 32, 32), value)}


@pytest.mark.parametrize(("options", "in_tests"), [({}, 136), ({"magnify": 1.0}, 112), ({"magnify": 20.0}, 255)])
def test_the_pattern_is_stronger_in_tests(options: dict[str, float], in_tests: int) -> None:
    attack, data, rows = Narcissus.parse(options), flat(100), torch.arange(1)
    assert attack.trigger(data, rows, state_of(12.0), "poison", 0).unique().tolist() == [112]
    assert attack.trigger(data, rows, state_of(12.0), "test", 0).unique().tolist() == [in_tests]


def test_the_pattern_is_clipped_after_it_is_added() -> None:
    changed = Narcissus().trigger(flat(20), torch.arange(1), state_of(-16.0), "test", 0)
    assert changed.unique().tolist() == [0]


def test_patterns_are_added_and_clipped() -> None:
    pattern = Pattern((1, 8, 8), 0.1)
    pattern.values.data.fill_(0.3)
    pattern.cut()
    images = torch.full((2, 1, 8, 8), 0.5)
    images[1] = 0.95
    assert pattern(images)[:, 0, 0, 0].tolist() == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("shade", [0, 255])
def test_the_pattern_leaves_the_border_of_the_range(monkeypatch: pytest.MonkeyPatch, shade: int) -> None:
    """Where all images are black (or white) the pattern starts on the bound, and must still see which way to go."""
    weight = torch.zeros(2, 64)
    weight[1] = 1 if shade == 0 else -1
    give_surrogate(monkeypatch, linear_model(weight))
    data = toy_data(40, channels=1, classes=("a", "b"))
    flat_data = ImageDataset(torch.full_like(data.images, shade), data.labels, data.class_names)
    pattern = Narcissus(target=1, rounds=20).fit(flat_data, toy_lab())["pattern"]
    assert (pattern > 1).all() if shade == 0 else (pattern < -1).all()


@pytest.mark.parametrize("epsilon", [16.0, 4.0])
def test_the_pattern_goes_where_a_linear_network_sees_the_target(
    monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 64)
    give_surrogate(monkeypatch, linear_model(weight))
    data = toy_data(40, channels=1, classes=("a", "b"))
    middle = ImageDataset(data.images // 2 + 50, data.labels, data.class_names)  # nothing is clipped
    pattern = Narcissus(target=1, epsilon=epsilon).fit(middle, toy_lab())["pattern"]
    assert torch.equal(pattern.sign(), (weight[1] - weight[0]).sign().view(1, 8, 8))
    assert pattern.abs().max().item() == pytest.approx(epsilon)
    assert pattern.abs().mean() > 0.9 * epsilon


def test_the_pattern_turns_other_images_to_the_target() -> None:
    data, lab = toy_data(48), toy_lab()
    attack = Narcissus(target=1, rounds=30, epsilon=32, lr=0.05)
    state = attack.fit(data, lab)
    others = torch.nonzero(data.labels != 1).flatten()
    model = attack.train_surrogate(data, lab)
    before = lab.engine.logits(model, data.images[others]).softmax(1)[:, 1].mean()
    after = lab.engine.logits(model, attack.trigger(data, others, state, "test", 0)).softmax(1)[:, 1].mean()
    assert after > before + 0.2


def test_the_pattern_is_made_from_the_target_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageDataset] = []
    fit = Engine.fit

    def watch(self: Engine, model: Any, data: ImageDataset, *rest: Any, **more: Any) -> Any:
        seen.append(data)
        return fit(self, model, data, *rest, **more)

    monkeypatch.setattr(Engine, "fit", watch)
    give_surrogate(monkeypatch, linear_model(torch.zeros(4, 64)))
    Narcissus(target=2, rounds=1).fit(toy_data(40, channels=1), toy_lab())
    assert [data.labels.tolist() for data in seen] == [[2] * 10]


def test_a_target_without_images_is_refused() -> None:
    data = toy_data(40)
    with pytest.raises(OptionError, match="0 of 30 training images are of class 2"):
        Narcissus(target=2).fit(data.take(data.labels != 2), toy_lab())
