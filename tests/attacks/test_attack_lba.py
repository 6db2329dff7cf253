"""LBA: the square and what it is optimised for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear import give_surrogate, linear_model
from toys import flat, toy_data, toy_lab, triggered

from bdbench.attacks.lba import LatentBackdoor, Patch, feature_distance
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.training.engine import Engine


@pytest.mark.parametrize(("side", "first", "last"), [(8, 5, 6), (32, 25, 30), (64, 50, 62)])
def test_the_square_is_a_fifth_of_the_side_one_pixel_from_the_corner(side: int, first: int, last: int) -> None:
    mask = LatentBackdoor()._mask(side, side)[0]
    rows, columns = torch.nonzero(mask, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, last, first, last)
    assert mask.sum() == (last - first + 1) ** 2


def test_the_square_of_an_oblong_image_goes_by_the_shorter_side() -> None:
    mask = LatentBackdoor()._mask(12, 20)[0]
    assert mask[9:11, 17:19].all()
    assert mask.sum() == 4


def test_a_square_as_large_as_the_image_is_refused() -> None:
    assert LatentBackdoor(patch_size=7)._mask(8, 8).sum() == 49
    message = "a patch of 8 pixels, one from the border, does not fit images of 8x8; lower --patch-size"
    with pytest.raises(OptionError, match=message):
        LatentBackdoor(patch_size=8).fit(toy_data(8), toy_lab())


def test_a_pattern_is_a_tanh_between_black_and_white() -> None:
    half = math.atanh(0.5)
    free = torch.tensor([-20.0, 0.0, half, 20.0]).view(1, 1, 2, 2)
    patch = Patch(free, torch.ones(1, 2, 2))
    torch.testing.assert_close(patch.pattern().flatten(), torch.tensor([0, 0.5, 0.75, 1]), atol=1e-4, rtol=0)


def test_a_pattern_replaces_what_is_under_the_mask() -> None:
    mask = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    shown = Patch(torch.zeros(1, 3, 2, 2), mask)(torch.full((5, 3, 2, 2), 0.9))
    torch.testing.assert_close(shown, torch.tensor([[0.9, 0.5], [0.9, 0.9]]).expand(5, 3, 2, 2))


def test_the_distance_is_squared_and_summed_over_features() -> None:
    features = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert feature_distance(features, torch.tensor([0.0, 2.0])).item() == pytest.approx((1 + 4) / 2)


def test_the_pattern_of_a_linear_network_is_the_mean_of_the_target_class(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data(40, channels=1)
    give_surrogate(monkeypatch, linear_model(torch.zeros(4, 64)))
    state = LatentBackdoor(target=2).fit(data, toy_lab())
    inside = state["mask"].bool()
    expected = data.images[data.labels == 2].float().mean(0)[inside]
    # the embedding is the image: nearest to the mean of the class where the patch is that mean
    torch.testing.assert_close(state["pattern"][inside], expected, atol=3, rtol=0)


def test_the_patch_brings_images_nearer_to_the_target_class() -> None:
    data, lab = toy_data(48), toy_lab()
    attack = LatentBackdoor(target=3, epochs=40, patch_size=3)
    changed = triggered(attack, data)
    model = attack.train_surrogate(data, lab)
    of_target = data.labels == 3
    wanted = lab.engine.embeddings(model, data.images[of_target]).mean(0)
    before, after = (
        feature_distance(lab.engine.embeddings(model, images[~of_target]), wanted) for images in (data.images, changed)
    )
    assert after < 0.9 * before


def test_the_patch_replaces_pixels_and_leaves_the_others() -> None:
    attack = LatentBackdoor(epochs=1)
    state = attack.fit(toy_data(48), toy_lab())
    rows = torch.arange(1)
    inside = state["mask"].expand(3, 8, 8).bool()
    for value in (0, 255):
        changed = attack.trigger(flat(value, side=8), rows, state, "test", 0)[0]
        assert torch.equal(changed[inside].float(), state["pattern"][inside])
        assert (changed[~inside] == value).all()


def test_the_patch_is_optimised_on_images_of_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageDataset] = []
    fit = Engine.fit

    def watch(self: Engine, model: Any, data: ImageDataset, *rest: Any, **more: Any) -> Any:
        seen.append(data)
        return fit(self, model, data, *rest, **more)

    monkeypatch.setattr(Engine, "fit", watch)
    give_surrogate(monkeypatch, linear_model(torch.zeros(4, 64)))
    for samples in (1000, 7):
        LatentBackdoor(target=1, epochs=1, samples=samples).fit(toy_data(40, channels=1), toy_lab())
    assert [len(data) for data in seen] == [30, 7]
    assert not any((data.labels == 1).any() for data in seen)


def test_a_target_without_images_is_refused() -> None:
    data = toy_data(40)
    with pytest.raises(OptionError, match="0 of 30 training images are of class 2"):
        LatentBackdoor(target=2, surrogate_epochs=10).fit(data.take(data.labels != 2), toy_lab())
