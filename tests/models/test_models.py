"""Every registered model: images in [0, 1] in, embedding and float32 logits out."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier, build_classifier, pool
from bdbench.registry import MODELS
from bdbench.seeds import generator, scoped

NAMES = [name for name in MODELS.names() if not name.endswith(":NAME")]
NAMES += ["torchvision:mobilenet_v3_small", "torchvision:resnet18"]
every_model = pytest.mark.parametrize("name", NAMES)


def build(name: str, shape: tuple[int, int, int] = (3, 16, 16), classes: int = 5, purpose: str = "model") -> Classifier:
    with scoped(0, "weights", purpose):
        blank = torch.zeros(shape[0])
        return build_classifier(MODELS.load(name), shape, classes, blank, blank + 1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(0, "images"))


@every_model
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 20, 28)])
def test_logits_and_embeddings_have_their_shapes(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape)
    images = noise(3, *shape)
    with torch.inference_mode():
        for mode in (model.eval(), model.train()):
            embedding, logits = mode.embed(images), mode(images)
            assert embedding.shape == (3, model.embedding_size)
            assert logits.shape == (3, 5)
            assert embedding.dtype == logits.dtype == torch.float32
            assert logits.isfinite().all()


@every_model
def test_logits_are_the_head_on_the_embedding(name: str) -> None:
    model, images = build(name).eval(), noise(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model(images), model.classify(model.embed(images)))
        assert torch.equal(model.classify(model.embed(images)), model.head(model.embed(images)))


@every_model
def test_logits_stay_float32_under_autocast(name: str) -> None:
    model = build(name).eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(noise(2, 3, 16, 16)).dtype == torch.float32
        assert model.embed(noise(2, 3, 16, 16)).dtype == torch.float32


@every_model
def test_all_weights_learn(name: str) -> None:
    model = build(name)
    model(noise(4, 3, 32, 32)).square().sum().backward()
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []


@every_model
def test_equal_purposes_give_equal_weights(name: str) -> None:
    one, same, other = build(name), build(name), build(name, purpose="twin")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@every_model
def test_building_leaves_the_global_randomness_as_it_was(name: str) -> None:
    before = torch.get_rng_state()
    build(name)
    assert torch.equal(torch.get_rng_state(), before)


@every_model
def test_trying_the_model_on_a_blank_pair_leaves_no_trace(name: str) -> None:
    model = build(name)
    assert model.training
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            assert not value.any()


def test_normalisation_is_the_first_layer() -> None:
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.5, 0.25, 0.125])
    with scoped(0, "weights"):
        inside = build_classifier(MODELS.load("convnet"), (3, 8, 8), 4, mean, std).eval()
    with scoped(0, "weights"):
        outside = build_classifier(MODELS.load("convnet"), (3, 8, 8), 4, torch.zeros(3), torch.ones(3)).eval()
    images = noise(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(inside(images), outside((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


def test_the_network_gets_channels_last_whatever_it_is_given() -> None:
    model = build_classifier(MODELS.load("convnet"), (3, 8, 8), 2, torch.zeros(3), torch.ones(3))
    seen: list[Tensor] = []
    model.features.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.rand(2, 3, 8, 8, generator=generator(0, "layout"))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model(images.contiguous(memory_format=memory_format))
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in seen)


def test_normalisation_travels_with_the_weights() -> None:
    model = build("convnet")
    assert {"mean", "std"} <= set(model.state_dict())
    assert "mean" not in dict(model.named_parameters())


def test_wide_resnet_16_1_has_the_published_size() -> None:
    # Zagoruyko and Komodakis, table of WRN-16-1: 0.2 M with ten classes
    count = sum(weight.numel() for weight in build("wrn-16-1", (3, 32, 32), 10).parameters())
    assert 170_000 < count < 180_000


@pytest.mark.parametrize("name", ["preact-resnet-18", "resnet-18"])
def test_resnet_18_has_the_published_size(name: str) -> None:
    count = sum(weight.numel() for weight in build(name, (3, 32, 32), 10).parameters())
    assert count == pytest.approx(11.17e6, rel=0.001)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("preact-resnet-18-open", 11_171_146),  # BackdoorBench's, with ten classes
        ("preact-resnet-18", 11_172_170),  # and a norm of 2 x 512
        ("resnet-18", 11_173_962),
    ],
)
def test_resnet_18_has_exactly_so_many_parameters(name: str, parameters: int) -> None:
    assert sum(weight.numel() for weight in build(name, (3, 32, 32), 10).parameters()) == parameters


def test_the_open_form_is_that_of_backdoorbench_under_its_names() -> None:
    model = build("preact-resnet-18-open", (3, 16, 16), 10).eval()
    with scoped(0, "statistics"):
        for name, buffer in model.features.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    theirs = {_backdoorbench_name(name): value for name, value in model.state_dict().items()}
    images = noise(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(_backdoorbench_logits(theirs, images), model(images))


def _backdoorbench_name(name: str) -> str:
    """`features.blocks.3.norm1.bias` is `layer2.1.bn1.bias` there."""
    name = name.removeprefix("features.").replace("norm", "bn").replace("head.", "linear.")
    name = name.replace("stem.", "conv1.").replace("shortcut.", "shortcut.0.")
    found = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
    return name if found is None else f"layer{int(found[1]) // 2 + 1}.{int(found[1]) % 2}.{found[2]}"


def _backdoorbench_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """BackdoorBench's network, written anew as a function of its state dict."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            out = norm(x, f"{at}.bn1")
            kept = F.conv2d(out, state[f"{at}.shortcut.0.weight"], stride=stride) if stride == 2 else x
            out = F.conv2d(out, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            x = F.conv2d(norm(out, f"{at}.bn2"), state[f"{at}.conv2.weight"], padding=1) + kept
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def test_wide_resnet_halves_the_image_twice() -> None:
    model = build("wrn-16-1", (3, 32, 32)).eval()
    stem, blocks = model.features.stem, model.features.blocks
    assert isinstance(stem, nn.Module)
    assert isinstance(blocks, nn.Module)
    with torch.inference_mode():
        assert blocks(stem(noise(1, 3, 32, 32))).shape == (1, 64, 8, 8)


def test_wide_resnet_pools_whatever_size_is_left() -> None:
    model = build("wrn-16-1", (3, 64, 64)).eval()
    with torch.inference_mode():
        assert model(noise(2, 3, 64, 64)).shape == (2, 5)


def test_pooling_averages_over_pixels_in_float32() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], dtype=torch.bfloat16)
    assert pool(maps).tolist() == [[3.0]]
    assert pool(maps).dtype == torch.float32


class Wide(nn.Module):
    """A convolution that needs 9 pixels."""

    size = 2

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(image_shape[0], 2, 9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return pool(self.layer(images))


def test_an_image_too_small_for_the_model_is_said() -> None:
    blank = torch.zeros(3)
    with pytest.raises(
        OptionError, match=r"cannot take images of shape \(3, 8, 8\) .* choose another --model or a larger"
    ):
        build_classifier(Wide, (3, 8, 8), 4, blank, blank + 1)
    assert build_classifier(Wide, (3, 9, 9), 4, blank, blank + 1).embedding_size == 2


@pytest.mark.parametrize("name", ["torchvision:densenet121", "torchvision:vit_b_32"])
def test_an_image_too_small_for_a_torchvision_model_is_said(name: str) -> None:
    with pytest.raises(OptionError, match=r"cannot take images of shape \(3, 8, 8\)"):
        build(name, (3, 8, 8))


def test_gray_images_are_repeated_for_torchvision() -> None:
    model = build("torchvision:resnet18", (1, 32, 32)).eval()
    with torch.inference_mode():
        assert model(noise(2, 1, 32, 32)).shape == (2, 5)


def test_a_torchvision_model_keeps_no_last_layer_of_its_own() -> None:
    assert build("torchvision:resnet18").embedding_size == 512
    assert build("torchvision:mobilenet_v3_small").embedding_size == 1024


def test_a_torchvision_name_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown torchvision model 'resnet81'\. Did you mean 'resnet"):
        build("torchvision:resnet81")


def test_a_torchvision_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(OptionError, match="'squeezenet1_1' has no linear layer to replace"):
        build("torchvision:squeezenet1_1")


@pytest.mark.parametrize("name", ["wrn-16-2", "torchvision:", "timm:resnet18"])
def test_a_model_that_is_not_registered_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"unknown model '{name}'.* Known: .*wrn-16-1"):
        MODELS.load(name)


def test_a_family_is_no_model() -> None:
    with pytest.raises(OptionError, match="'torchvision:NAME' stands for many: put the name of one in place of NAME"):
        MODELS.load("torchvision:NAME")


def test_a_network_of_torchvision_by_its_short_name_is_told_its_whole_name() -> None:
    with pytest.raises(OptionError, match="A network of torchvision is named as in 'torchvision:resnet50'"):
        MODELS.load("resnet50")
