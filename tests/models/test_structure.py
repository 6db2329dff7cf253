"""What a network is made of: which convolution feeds which norm, and where its stages end."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from toys import are_equal, weights_of

from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier, build_classifier, pool
from bdbench.models.structure import (
    Pair,
    embed_with_stages,
    frozen,
    named_norms,
    norms_of,
    pairs,
    stages_of,
    untracked_norms,
)
from bdbench.registry import MODELS
from bdbench.seeds import generator, scoped

SHAPE = (3, 32, 32)
STRIDED = (2, 4, 6)
"""Blocks of a ResNet-18 with another shape than the one before."""

CONVNET = [("layers.0", "layers.1"), ("layers.3", "layers.4"), ("layers.7", "layers.8")]


def pre_activation(blocks: int) -> list[tuple[str, str]]:
    """Of every block the first norm takes a sum; the stem alone feeds that of the first one."""
    inside = [(f"blocks.{place}.conv1", f"blocks.{place}.norm2") for place in range(blocks)]
    return [("stem", "blocks.0.norm1"), *inside]


def post_activation() -> list[tuple[str, str]]:
    found = [("stem.0", "stem.1")]
    for place in range(8):
        block = f"blocks.{place}"
        found += [(f"{block}.conv1", f"{block}.norm1"), (f"{block}.conv2", f"{block}.norm2")]
        found += [(f"{block}.shortcut.0", f"{block}.shortcut.1")] if place in STRIDED else []
    return found


def of_torchvision() -> list[tuple[str, str]]:
    found = [("network.conv1", "network.bn1")]
    for layer in range(1, 5):
        for place in range(2):
            block = f"network.layer{layer}.{place}"
            found += [(f"{block}.conv1", f"{block}.bn1"), (f"{block}.conv2", f"{block}.bn2")]
            found += [(f"{block}.downsample.0", f"{block}.downsample.1")] if layer > 1 and not place else []
    return found


PAIRS = {
    "convnet": CONVNET, "convnet-16": CONVNET, "wrn-16-1": pre_activation(6), "preact-resnet-18": pre_activation(8),
    "preact-resnet-18-open": pre_activation(8), "resnet-18": post_activation(),
    "torchvision:resnet18": of_torchvision(),
}  # fmt: skip

RESNET_STAGES = [(f"blocks.{place}", width, side) for place, width, side in
                 ((1, 64, 32), (3, 128, 16), (5, 256, 8), (7, 512, 4))]  # fmt: skip
STAGES = {
    "convnet": [("layers.2", 32, 32), ("layers.5", 64, 32), ("layers.9", 16, 16)],
    "convnet-16": [("layers.2", 32, 16), ("layers.5", 64, 16), ("layers.9", 16, 8)],
    "wrn-16-1": [("blocks.1", 16, 32), ("blocks.3", 32, 16), ("blocks.5", 64, 8)],
    "preact-resnet-18": RESNET_STAGES, "preact-resnet-18-open": RESNET_STAGES, "resnet-18": RESNET_STAGES,
    "torchvision:resnet18": [
        ("network.relu", 64, 16), ("network.layer1.1", 64, 8), ("network.layer2.1", 128, 4),
        ("network.layer3.1", 256, 2),
    ],
}  # fmt: skip
"""Name, channels and side of the map that ends each stage, for images of 32 pixels; one place is no map."""

every_network = pytest.mark.parametrize("name", PAIRS)


def build(name: str, shape: tuple[int, int, int] = SHAPE) -> Classifier:
    with scoped(0, "weights"):
        blank = torch.zeros(shape[0])
        return build_classifier(MODELS.load(name), shape, 5, blank, blank + 1)


@cache
def network(name: str) -> Classifier:
    """One that is looked at only."""
    return build(name).eval()


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(0, "images"))


class Chain(nn.Module):
    """Modules one after the other, averaged to 6 numbers."""

    size = 6

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        return pool(self.layers(images))


def chain(*parts: nn.Module) -> Classifier:
    return Classifier(Chain(*parts), 2, torch.zeros(3), torch.ones(3))


def test_every_registered_network_is_here() -> None:
    names = {name for name in MODELS.names() if not name.endswith(":NAME")}
    assert names <= PAIRS.keys() == STAGES.keys()


# pairs


@every_network
def test_a_norm_is_paired_with_the_convolution_that_feeds_it(name: str) -> None:
    expected = [Pair(f"features.{conv}", f"features.{norm}") for conv, norm in PAIRS[name]]
    assert pairs(network(name), SHAPE) == expected


@pytest.mark.parametrize(
    ("between", "is_pair"),
    [
        (nn.Identity(), True),
        (nn.ReLU(inplace=True), False),
        (nn.ReLU(), False),
        (nn.MaxPool2d(2), False),
    ],
)
def test_what_is_changed_on_the_way_feeds_no_norm(between: nn.Module, is_pair: bool) -> None:
    model = chain(nn.Conv2d(3, 6, 3), between, nn.BatchNorm2d(6))
    expected = [Pair("features.layers.0", "features.layers.2")] if is_pair else []
    assert pairs(model, (3, 8, 8)) == expected


def test_pairs_are_found_by_the_data_whatever_the_order_of_registration() -> None:
    class Crossed(nn.Module):
        size = 6

        def __init__(self) -> None:
            super().__init__()
            self.norm_of_second, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
            self.norm_of_first, self.first = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1)

        def forward(self, images: Tensor) -> Tensor:
            return pool(self.norm_of_second(self.second(self.norm_of_first(self.first(images)))))

    found = pairs(Classifier(Crossed(), 2, torch.zeros(3), torch.ones(3)), (3, 8, 8))
    assert found == [
        Pair("features.first", "features.norm_of_first"),
        Pair("features.second", "features.norm_of_second"),
    ]


def test_gray_images_of_a_torchvision_network_have_the_same_pairs() -> None:
    name = "torchvision:resnet18"
    assert pairs(build(name, (1, 32, 32)), (1, 32, 32)) == pairs(network(name), SHAPE)


def test_looking_at_a_network_leaves_no_trace() -> None:
    model = build("wrn-16-1").train()
    model.head.eval()
    before = weights_of(model)
    pairs(model, SHAPE)
    stages = stages_of(model, SHAPE)
    assert are_equal(weights_of(model), before)
    assert [part.training for part in model.modules()].count(False) == 1
    embed_with_stages(model, stages, noise(2, *SHAPE))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# stages


@every_network
def test_stages_end_where_the_resolution_changes(name: str) -> None:
    model = network(name)
    stages = stages_of(model, SHAPE)
    assert stages == [f"features.{stage}" for stage, _, _ in STAGES[name]]
    with torch.no_grad():
        _, maps = embed_with_stages(model, stages, noise(2, *SHAPE))
    assert [tuple(map_.shape) for map_ in maps] == [(2, width, side, side) for _, width, side in STAGES[name]]


@every_network
def test_the_embedding_beside_the_maps_is_that_of_embed(name: str) -> None:
    model, images = network(name), noise(2, *SHAPE)
    with torch.no_grad():
        embedding, _ = embed_with_stages(model, stages_of(model, SHAPE), images)
        assert torch.equal(embedding, model.embed(images))


def test_a_map_is_what_leaves_the_stage() -> None:
    model, images = build("wrn-16-1").eval(), noise(2, *SHAPE)
    with torch.no_grad():
        _, maps = embed_with_stages(model, stages_of(model, SHAPE), images)
        stem = model.features.stem(images)  # mean 0, deviation 1: images as they are
        expected = [model.features.blocks[:end](stem) for end in (2, 4, 6)]
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_larger_image_has_one_more_stage_in_a_torchvision_network() -> None:
    found = stages_of(build("torchvision:resnet18", (3, 64, 64)), (3, 64, 64))
    assert found[-1] == "features.network.layer4.1"
    assert len(found) == 5


def test_gradients_flow_through_the_maps() -> None:
    model = build("wrn-16-1")
    _, maps = embed_with_stages(model, ["features.blocks.1"], noise(2, *SHAPE))
    maps[0].sum().backward()
    grads = {name: weight.grad is not None for name, weight in model.named_parameters()}
    assert grads["features.blocks.1.conv2.weight"]
    assert not grads["features.blocks.2.conv1.weight"]


# norms


def test_norms_are_named_as_their_weights_are() -> None:
    model = build("wrn-16-1")
    found = named_norms(model, "clp")
    assert [f"{name}.weight" for name in found] == [
        name for name, weight in model.named_parameters() if "norm" in name and name.endswith("weight")
    ]
    assert list(found.values()) == norms_of(model)


def test_norms_without_weights_are_not_named() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6))
    assert list(named_norms(model, "clp")) == ["features.layers.2"]


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6, affine=False), nn.Identity()])
def test_a_network_without_batch_norms_is_refused_and_others_are_named(norm: nn.Module) -> None:
    with pytest.raises(
        OptionError, match=r"method 'clp' works on batch norms, and this network has none; choose .*wrn"
    ):
        named_norms(chain(nn.Conv2d(3, 6, 3), norm), "clp")


def test_untracked_norms_use_the_batch_and_keep_what_they_remember() -> None:
    model, images = build("convnet", (3, 8, 8)).train(), noise(4, 3, 8, 8)
    before = weights_of(model)
    with torch.no_grad():
        with untracked_norms(model):
            found = model(images)
        remembered = {name: value for name, value in weights_of(model).items() if "num_batches" not in name}
        assert all(torch.equal(value, before[name]) for name, value in remembered.items())
        assert torch.equal(found, model(images))
    assert not torch.equal(
        weights_of(model)["features.layers.1.running_mean"], before["features.layers.1.running_mean"]
    )


def test_momenta_come_back_after_an_error() -> None:
    model = build("convnet", (3, 8, 8))
    with pytest.raises(KeyError), untracked_norms(model):
        raise KeyError
    assert {norm.momentum for norm in norms_of(model)} == {0.1}


def test_a_frozen_network_has_neither_gradients_nor_the_mode_of_training() -> None:
    model = frozen(build("convnet", (3, 8, 8)))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(part.training for part in model.modules())
