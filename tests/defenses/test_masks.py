"""Masks of batch norms, and pruning."""

from __future__ import annotations

import pytest
import torch
from toys import are_equal, toy_batch, toy_data, toy_model, weights_of

from bdbench.defenses.parts.masks import Masks, prune
from bdbench.defenses.parts.replacing import called
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.models.convnet import ConvNet
from bdbench.models.structure import norms_of
from bdbench.seeds import scoped

DATA = toy_data(16)
NORM = "features.layers.1"


def trained_model() -> Classifier:
    """A toy whose norm has weights and biases of its own."""
    model = toy_model(DATA).eval()
    (norm,) = norms_of(model)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.0, 3.0, 0.25]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3, -0.4, 0.5, 0.6]))
    return model


def test_masks_begin_at_one_and_change_nothing() -> None:
    model, images = trained_model(), toy_batch(DATA).images
    masks = Masks(model, "anp")
    assert list(masks.by_norm()) == [NORM]
    assert masks.by_norm()[NORM].tolist() == [1.0] * 6
    assert torch.equal(called(model, masks.changed(), images), model(images))


def test_every_norm_has_its_masks() -> None:
    with scoped(0, "weights"):
        model = build_classifier(ConvNet, (3, 8, 8), 4, torch.zeros(3), torch.ones(3))
    sizes = {name: len(mask) for name, mask in Masks(model, "anp").by_norm().items()}
    assert sizes == {"features.layers.1": 32, "features.layers.4": 64, "features.layers.8": 16}


def test_a_mask_multiplies_the_weight_of_its_channel() -> None:
    model = trained_model()
    masks = Masks(model, "anp")
    with torch.no_grad():
        masks.factors[0].copy_(torch.tensor([1.0, 0.5, 0.0, 1.0, 0.1, 1.0]))
    changed = masks.changed()
    assert list(changed) == [f"{NORM}.weight"]
    torch.testing.assert_close(changed[f"{NORM}.weight"], torch.tensor([0.5, -0.5, 0.0, 1.0, 0.3, 0.25]))


def test_gradients_reach_the_masks_and_not_the_network() -> None:
    """The slope of a channel's mask is that of its weight, times the weight."""
    model, images = trained_model(), toy_batch(DATA).images
    masks = Masks(model, "anp")
    called(model, masks.changed(), images).square().sum().backward()
    assert all(weight.grad is None for name, weight in model.named_parameters() if name == f"{NORM}.weight")
    (norm,) = norms_of(model)
    found = masks.factors[0].grad
    model.zero_grad()
    model(images).square().sum().backward()
    assert norm.weight.grad is not None
    assert found is not None
    torch.testing.assert_close(found, norm.weight.grad * norm.weight.detach())


def test_the_network_is_no_part_of_its_masks() -> None:
    model = trained_model()
    before = weights_of(model)
    masks = Masks(model, "anp")
    assert list(masks.state_dict()) == ["factors.0"]
    masks.train()
    with torch.no_grad():
        masks.factors[0].zero_()
    assert not model.training
    assert are_equal(weights_of(model), before)


def test_masks_come_back_into_their_range() -> None:
    masks = Masks(trained_model(), "anp")
    with torch.no_grad():
        masks.factors[0].copy_(torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5, 2.0]))
    masks.clamp()
    torch.testing.assert_close(masks.by_norm()[NORM], torch.tensor([0.0, 0.0, 0.3, 1.0, 1.0, 1.0]))


def test_what_is_given_by_norm_is_a_copy() -> None:
    masks = Masks(trained_model(), "anp")
    masks.by_norm()[NORM].zero_()
    assert masks.by_norm()[NORM].tolist() == [1.0] * 6


def test_a_network_without_norms_is_refused() -> None:
    model = toy_model(DATA)
    model.features = torch.nn.Flatten()
    with pytest.raises(OptionError, match="method 'anp' works on batch norms"):
        Masks(model, "anp")


# pruning


def chosen(*places: int) -> dict[str, torch.Tensor]:
    gone = torch.zeros(6, dtype=torch.bool)
    gone[list(places)] = True
    return {NORM: gone}


def test_pruning_zeroes_the_weights_of_channels_and_nothing_else() -> None:
    model = trained_model()
    before = weights_of(model)
    assert prune(model, chosen(1, 4), bias=False) == {NORM: 2}
    after = weights_of(model)
    expected = before | {f"{NORM}.weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25])}
    assert are_equal(after, expected)


def test_pruning_with_the_bias_zeroes_it_too() -> None:
    model = trained_model()
    prune(model, chosen(1, 4), bias=True)
    (norm,) = norms_of(model)
    assert norm.weight.tolist() == pytest.approx([0.5, 0.0, 2.0, 1.0, 0.0, 0.25])
    assert norm.bias.tolist() == pytest.approx([0.1, 0.0, 0.3, -0.4, 0.0, 0.6])


def test_a_pruned_channel_is_gone_or_is_what_its_bias_makes_it() -> None:
    images = toy_batch(DATA).images
    for bias, left in ((True, 0.0), (False, 0.2)):
        model = trained_model()
        prune(model, chosen(1), bias=bias)
        with torch.no_grad():
            maps = model.features.layers((images - 0.5) / 0.5)
        torch.testing.assert_close(maps[:, 1], torch.full_like(maps[:, 1], left))
        assert maps[:, 0].std() > 0


def test_a_norm_that_loses_nothing_is_not_counted() -> None:
    model = trained_model()
    before = weights_of(model)
    assert prune(model, chosen(), bias=True) == {}
    assert are_equal(weights_of(model), before)


def test_a_mask_of_zero_and_pruning_without_the_bias_are_the_same() -> None:
    model, images = trained_model(), toy_batch(DATA).images
    masks = Masks(model, "anp")
    with torch.no_grad():
        masks.factors[0][2] = 0
    masked = called(model, masks.changed(), images)
    prune(model, chosen(2), bias=False)
    assert torch.equal(model(images), masked)
