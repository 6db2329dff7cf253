"""Running statistics counted anew are those of the images."""

from __future__ import annotations

import pytest
import torch
from toys import DroppedFeatures, are_equal, toy_data, toy_engine, toy_model, weights_of

from bdbench.defenses.parts import refreshing
from bdbench.defenses.parts.refreshing import refresh_norms
from bdbench.models.structure import norms_of


def test_refreshed_statistics_are_those_of_the_images() -> None:
    data = toy_data(60)
    model = toy_model(data)
    (norm,) = norms_of(model)
    norm.running_mean.fill_(7.0)
    norm.num_batches_tracked.fill_(99)
    momentum = norm.momentum
    refresh_norms(toy_engine(), model, data.images, "none")
    with torch.no_grad():
        maps = model.features.layers[0]((data.images.float() / 255 - model.mean) / model.std)  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)))
    assert (int(norm.num_batches_tracked), norm.momentum, norm.training) == (1, momentum, False)


def test_several_batches_are_about_equal_and_their_mean_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the images, a batch would be of one class, and a last one of one image has no variance."""
    data = toy_data(61)
    data = data.take(data.labels.argsort())
    whole, parts = toy_model(data), toy_model(data)
    refresh_norms(toy_engine(), whole, data.images, "none")
    monkeypatch.setattr(refreshing, "AT_ONCE", 20)
    refresh_norms(toy_engine(), parts, data.images, "none")
    one, other = norms_of(whole)[0], norms_of(parts)[0]
    assert int(other.num_batches_tracked) == 4
    torch.testing.assert_close(other.running_mean, one.running_mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(other.running_var, one.running_var, rtol=0.05, atol=0.01)


def test_only_norms_change_and_nothing_is_dropped() -> None:
    data = toy_data(24)
    models = [toy_model(data, features=DroppedFeatures) for _ in range(2)]
    before = weights_of(models[0])
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        refresh_norms(toy_engine(), model, data.images, "none")
        assert not any(part.training for part in model.modules())
    assert are_equal(weights_of(models[0]), weights_of(models[1]))
    changed = {name for name, value in weights_of(models[0]).items() if not torch.equal(value, before[name])}
    assert changed == {f"features.layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_images_are_augmented_as_in_training_since_zeros_around_a_crop_move_the_first_layers() -> None:
    data = toy_data(64)
    as_they_are, cropped = (toy_model(data).eval() for _ in range(2))
    cropped.load_state_dict(as_they_are.state_dict())
    refresh_norms(toy_engine(), as_they_are, data.images, "none")
    refresh_norms(toy_engine(), cropped, data.images, "crop")
    first, other = (norms_of(model)[0].running_mean for model in (as_they_are, cropped))
    assert first is not None
    assert other is not None
    assert not torch.allclose(first, other, rtol=0.02)
