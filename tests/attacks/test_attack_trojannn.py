"""TrojanNN: the shape, the neurons, and the content that excites them."""

from __future__ import annotations

import math

import pytest
import torch
from linear import Steps, give_surrogate, linear_model
from torch import Tensor
from toys import flat, toy_data, toy_engine, toy_lab

from bdbench.attacks.base import Lab
from bdbench.attacks.trojannn import TrojanNN, choose_neurons, disk, square
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


@pytest.mark.parametrize("side", [32, 64, 224])
def test_a_disk_covers_its_share_of_the_image(side: int) -> None:
    assert disk(side, side, 0.07).mean().item() == pytest.approx(0.07, rel=0.08)


def test_a_disk_is_round_about_its_centre() -> None:
    mask = disk(32, 32, 0.07)[0]
    # the radius is sqrt(0.07 * 32 * 32 / pi) = 4.78, about row and column 25
    rows = torch.nonzero(mask.any(1)).flatten()
    assert (rows.min(), rows.max()) == (20, 29)
    assert torch.equal(mask, mask.T)
    window = mask[20:30, 20:30]
    assert torch.equal(window, window.flip(0))
    assert window[5].all()
    assert not window[0, 0]


def test_a_disk_on_a_small_image() -> None:
    # centre 6.25, radius 1.19: the pixels 5, 6 and 7 have their middle 0.75, 0.25 and 1.25 away
    expected = torch.zeros(8, 8)
    expected[5:7, 5:7] = 1
    assert torch.equal(disk(8, 8, 0.07)[0], expected)


@pytest.mark.parametrize(("side", "first", "last"), [(32, 21, 28), (64, 42, 57), (8, 5, 6)])
def test_the_square_lies_where_it_is_published(side: int, first: int, last: int) -> None:
    rows, columns = torch.nonzero(square(side, side)[0], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, last, first, last)


def test_a_disk_without_a_pixel_is_refused() -> None:
    message = "area 0.001 covers no pixel of images of 8x8; raise --area"
    with pytest.raises(OptionError, match=message):
        TrojanNN(area=0.001).fit(toy_data(8), toy_lab())


def test_neurons_with_the_largest_weights_are_chosen() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0], [1.0, 3.0, 5.0, -2.0]])
    assert choose_neurons(weight, torch.ones(4), 2).tolist() == [1, 2]
    assert choose_neurons(weight, torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist() == [2, 3]


def test_more_neurons_than_work_are_refused() -> None:
    with pytest.raises(OptionError, match="3 neurons are asked for, the surrogate has 2 that work; lower --neurons"):
        choose_neurons(torch.ones(2, 4), torch.tensor([1.0, 0.0, 1.0, 0.0]), 3)


def content(
    monkeypatch: pytest.MonkeyPatch, data: ImageDataset, progress: Steps | None = None, **options: float
) -> Tensor:
    """The content of rows 5 and 6, columns 5 and 6, where the neuron is the pixel at row 5 and column 6."""
    weight = torch.zeros(2, 64)
    weight[1, 5 * 8 + 6] = 1
    give_surrogate(monkeypatch, linear_model(weight))
    lab = Lab(toy_engine(progress=progress or Steps()), toy_lab().model)
    return TrojanNN.parse({"neurons": 1, **options}).fit(data, lab)["pattern"][0, 5:7, 5:7]


def test_content_moves_to_the_wanted_activation_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    brighter = content(monkeypatch, flat(200, channels=1, side=8), steps, activation=0.6)
    assert brighter.tolist() == [[128, 153], [128, 128]]
    assert steps.counts["pattern"] == 1
    darker = content(monkeypatch, flat(200, channels=1, side=8), activation=0.4)
    assert darker[0, 1] == round(0.4 * 255)


def test_content_stays_near_gray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert content(monkeypatch, flat(200, channels=1, side=8), steps=20)[0, 1] == round(0.8 * 255)
    assert content(monkeypatch, flat(200, channels=1, side=8), steps=20, change=0.1)[0, 1] == round(0.6 * 255)


def test_the_activation_aimed_at_is_at_most_ten_times_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual value is 0.03: 0.3 is aimed at, not 100."""
    dim = flat(0, channels=1, side=8, count=100)
    dim.images[::5] = 38
    usual = 38 / 255 / 5
    assert content(monkeypatch, dim, steps=20)[0, 1].item() == pytest.approx(10 * usual * 255, abs=1)


def test_the_best_content_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.1 from 0.5 never meet 0.63: they go to and fro between 0.6 and 0.7."""
    for steps in (8, 9):
        found = content(monkeypatch, flat(200, channels=1, side=8), activation=0.64, steps=steps)
        assert found[0, 1] == round(0.6 * 255)


def test_the_shape_replaces_pixels() -> None:
    attack = TrojanNN(steps=3)
    state = attack.fit(toy_data(48, 3, 32), toy_lab())
    inside = state["mask"].expand(3, 32, 32).bool()
    assert torch.equal(state["mask"], disk(32, 32, 0.07))
    for value in (0, 255):
        changed = attack.trigger(flat(value), torch.arange(1), state, "test", 0)[0]
        assert torch.equal(changed[inside].float(), state["pattern"][inside])
        assert (changed[~inside] == value).all()


def test_the_content_excites_the_neurons_of_a_trained_network() -> None:
    data, lab = toy_data(48, 3, 32), toy_lab()
    attack = TrojanNN(shape="square", steps=60, neurons=1)
    state = attack.fit(data, lab)
    model = attack.train_surrogate(data, lab)
    usual = lab.engine.embeddings(model, data.images).abs().mean(0)
    neuron = choose_neurons(model.head.weight, usual, 1)
    gray = 128 * state["mask"].expand(1, 3, -1, -1).to(torch.uint8)
    before, after = (
        lab.engine.embeddings(model, images)[0, neuron].item()
        for images in (gray, state["pattern"][None].to(torch.uint8))
    )
    wanted = 10 * usual[neuron].item()
    assert math.fabs(after - wanted) < math.fabs(before - wanted)


def test_the_square_is_an_option() -> None:
    state = TrojanNN(shape="square", steps=1).fit(toy_data(48, 3, 32), toy_lab())
    assert torch.equal(state["mask"], square(32, 32))
