"""Wrappers: bounds on modules of any network, and artifacts that hold them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys import are_equal, seal_again, toy_data, toy_model, weights_of

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import verify
from bdbench.artifacts.manifests import MANIFEST
from bdbench.artifacts.model import ModelArtifact
from bdbench.defenses.base import Defended
from bdbench.defenses.repair.ft import FineTuning
from bdbench.errors import ArtifactError, DamagedError, MethodError, OptionError
from bdbench.models.bounds import UpperBounds
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.models.structure import rectified
from bdbench.models.wrappers import Wrapper, wrap
from bdbench.registry import MODELS, WRAPPERS
from bdbench.seeds import generator, scoped

SHAPE = (3, 8, 8)
RELU = "features.layers.2"


def network(name: str, side: int = 16) -> Classifier:
    half = torch.full((3,), 0.5)
    with scoped(0, name):
        return build_classifier(MODELS.load(name), (3, side, side), 4, half, half).eval()


def bounded(model: Classifier, *sites: str, per: Any = "channel", shape: tuple[int, int, int] = SHAPE) -> Classifier:
    return wrap(model, UpperBounds(sites=sites, per=per), shape)


def images(side: int = 8) -> Tensor:
    return torch.rand(5, 3, side, side, generator=generator(0, "images"))


# bounds


@pytest.mark.parametrize(("per", "shape"), [("channel", (6, 1, 1)), ("place", (6, 8, 8))])
def test_infinite_bounds_change_nothing(per: str, shape: tuple[int, ...]) -> None:
    plain, wrapped = toy_model(toy_data()).eval(), bounded(toy_model(toy_data()), RELU, per=per).eval()
    assert torch.equal(plain(images()), wrapped(images()))
    assert wrapped.get_buffer(f"{RELU}.upper_bound").shape == shape
    assert wrapped.state_dict().keys() - plain.state_dict().keys() == {f"{RELU}.upper_bound"}


def test_what_lies_below_a_bound_stays_and_the_rest_is_cut() -> None:
    model = toy_model(toy_data()).eval()
    free = model.features.layers(images())  # type: ignore[operator, union-attr]
    bounded(model, RELU).get_buffer(f"{RELU}.upper_bound").fill_(0.1)
    cut = model.features.layers(images())  # type: ignore[operator, union-attr]
    assert torch.equal(cut, free.clamp_max(0.1))
    assert 0.1 < float((free > 0.1).double().mean()) < 0.9


def test_a_bound_does_the_same_before_a_relu_as_after_it() -> None:
    before, after = (bounded(toy_model(toy_data()), site).eval() for site in ("features.layers.1", RELU))
    for model, site in ((before, "features.layers.1"), (after, RELU)):
        model.get_buffer(f"{site}.upper_bound").fill_(0.5)
    assert torch.equal(before(images()), after(images()))


def test_a_copy_has_bounds_of_its_own() -> None:
    model = bounded(toy_model(toy_data()), RELU).eval()
    other = copy.deepcopy(model)
    other.get_buffer(f"{RELU}.upper_bound").zero_()
    assert not torch.equal(model(images()), other(images()))
    assert torch.equal(model(images()), toy_model(toy_data()).eval()(images()))
    assert other.wrapper == model.wrapper


def test_bounds_are_no_weights() -> None:
    plain, wrapped = toy_model(toy_data()), bounded(toy_model(toy_data()), RELU)
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        (("features.layers.9",), "the network has no module 'features.layers.9' in its features"),
        (("head",), "no module 'head' in its features"),
        (("",), "sites.0"),
        ((), "sites"),
        ((RELU, RELU), "sites must be different"),
        (("features." + "x" * 200,), "sites.0"),
        (tuple(f"features.{place}" for place in range(1001)), "sites"),
        (RELU, "sites"),
        ((3,), "sites.0"),
    ],
)
def test_sites_that_cannot_be_are_refused(sites: Any, said: str) -> None:
    model = toy_model(toy_data())
    with pytest.raises(OptionError) as refused:
        wrap(model, UpperBounds.parse({"sites": sites}), SHAPE)
    assert said in str(refused.value)
    assert model.wrapper is None


def test_a_module_that_is_passed_twice_has_no_bound_of_its_own() -> None:
    model = network("torchvision:resnet18", 32)
    with pytest.raises(
        OptionError, match=r"'features\.network\.layer1\.0\.relu' cannot be bounded: it gives 2 tensors"
    ):
        bounded(model, "features.network.layer1.0.relu", shape=(3, 32, 32))


def test_a_network_has_one_wrapper_at_most() -> None:
    with pytest.raises(OptionError, match="has the wrapper 'upper-bounds' already, and can have one only"):
        bounded(bounded(toy_model(toy_data()), RELU), "features.layers.1")


# where ReLUs are


def test_relus_are_found_by_module_or_by_what_goes_into_them() -> None:
    assert rectified(network("convnet"), (3, 16, 16)) == ["features.layers.2", "features.layers.5", "features.layers.9"]
    blocks = [f"features.blocks.{block}.norm{norm}" for block in range(6) for norm in (1, 2)]
    assert rectified(network("wrn-16-1"), (3, 16, 16)) == [*blocks, "features.norm"]
    assert rectified(network("resnet-18"), (3, 16, 16))[:3] == [
        "features.stem.2", "features.blocks.0.norm1", "features.blocks.0"
    ]  # fmt: skip


def test_a_relu_that_a_block_shares_is_found_by_the_norm_before_it_and_by_the_block_after_it() -> None:
    found = rectified(network("torchvision:resnet18", 32), (3, 32, 32))
    assert found[:3] == ["features.network.relu", "features.network.layer1.0.bn1", "features.network.layer1.0"]
    assert len(found) == 17


@pytest.mark.parametrize("name", ["wrn-16-1", "resnet-18", "convnet", "torchvision:resnet18", "torchvision:vgg11_bn"])
def test_bounding_all_of_them_at_0_leaves_nothing(name: str) -> None:
    """Every ReLU is found: with all of them at 0 the answer does not depend on the image."""
    side = 32 if name.startswith("torchvision") else 16
    model = network(name, side)
    bounded(model, *rectified(model, (3, side, side)), shape=(3, side, side))
    free = model(images(side))
    for buffer_name, bound in model.named_buffers():
        if buffer_name.endswith("upper_bound"):
            bound.zero_()
    cut = model(images(side))
    assert not torch.allclose(free[0], free[1])
    torch.testing.assert_close(cut[0], cut[1])


def test_a_network_without_relus_has_none() -> None:
    class Smooth(nn.Module):
        size = 3

        def __init__(self, _: tuple[int, int, int]) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, images: Tensor) -> Tensor:
            return self.act(images).mean((2, 3))

    assert rectified(toy_model(toy_data(), features=Smooth), SHAPE) == []


# artifacts


@pytest.fixture(scope="module")
def stored(toys: DatasetArtifact, tmp_path_factory: pytest.TempPathFactory) -> ModelArtifact:
    """A convnet whose first ReLU is bounded at 0.25; tests copy it."""
    folder = tmp_path_factory.mktemp("stored")
    suspect = stages.defend(toys.path, "none", options={"epochs": 1}, out=folder / "none")

    def run(_: Any, task: Any) -> Defended:
        model = wrap(task.suspect, UpperBounds(sites=(RELU,)), task.train.image_shape)
        model.get_buffer(f"{RELU}.upper_bound").fill_(0.25)
        return Defended(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "run", run)
        return stages.defend(toys.path, "ft", suspect=suspect.path, out=folder / "wrapped")


def changed(stored: ModelArtifact, folder: Path, wrapper: Any) -> Path:
    """A copy of the artifact that says something else of its wrapper, with the hashes that belong to it."""
    folder.mkdir()
    for file in stored.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / MANIFEST).read_text())
    raw["facts"]["wrapper"] = wrapper
    if wrapper is None:
        del raw["facts"]["wrapper"]
    seal_again(folder, raw)
    return folder


def test_a_wrapped_model_is_stored_and_loaded(stored: ModelArtifact, toys: DatasetArtifact) -> None:
    assert stored.manifest.facts["wrapper"] == {
        "name": "upper-bounds", "options": {"sites": [RELU], "per": "channel"}, "plugin": None
    }  # fmt: skip
    verify(stored.path)
    model = stored.classifier()
    assert model.get_buffer(f"{RELU}.upper_bound").tolist() == [[[0.25]]] * 32
    taken: list[Tensor] = []
    model.get_submodule("features.layers.3").register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    model(toys.test.images.float() / 255)
    assert taken[0].max().item() == 0.25


def test_a_repair_of_a_wrapped_suspect_keeps_its_wrapper(
    stored: ModelArtifact, toys: DatasetArtifact, tmp_path: Path
) -> None:
    tuned = stages.defend(toys.path, "ft", options={"epochs": 1}, suspect=stored.path, out=tmp_path / "ft")
    assert tuned.manifest.facts["wrapper"] == stored.manifest.facts["wrapper"]
    assert float(tuned.network().get_buffer(f"{RELU}.upper_bound").max()) == 0.25
    assert not are_equal(weights_of(tuned.network()), weights_of(stored.network()))


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        ("upper-bounds", "facts.wrapper"),
        ({"name": "upper-bounds"}, "facts.wrapper.options"),
        ({"name": 3, "options": {}}, "facts.wrapper.name"),
        ({"name": "../evil", "options": {}}, "facts.wrapper.name"),
        ({"name": "x" * 101, "options": {}}, "facts.wrapper.name"),
        ({"name": "upper-bounds", "options": [], "more": 1}, "facts.wrapper."),
        ({"name": "upper-bounds", "options": {str(place): 0 for place in range(101)}}, "facts.wrapper.options"),
        ({"name": "upper-bounds", "options": {}, "plugin": "p"}, "facts.wrapper.plugin"),
    ],
)
def test_a_manifest_whose_wrapper_has_another_form_is_damaged(
    stored: ModelArtifact, tmp_path: Path, wrapper: Any, said: str
) -> None:
    with pytest.raises(DamagedError) as refused:
        ModelArtifact.open(changed(stored, tmp_path / "changed", wrapper))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "options of the wrapper 'upper-bounds' cannot be (sites"),
        ({"sites": [RELU], "rank": 3}, "rank"),
        ({"sites": ["features.layers.77"]}, "the network has no module 'features.layers.77'"),
        ({"sites": ["features.layers.2.upper_bound"]}, "the network has no module"),
        ({"sites": RELU}, "sites"),
        ({"sites": [RELU], "per": "pixel"}, "per"),
        ({"sites": [RELU, 1.5]}, "sites.1"),
        ({"sites": [RELU], "per": "place"}, "does not hold weights of convnet (Error(s) in loading state_dict"),
        ({"sites": ["features.layers.5"]}, "does not hold weights of convnet"),
    ],
)
def test_options_of_a_wrapper_that_do_not_fit_are_refused(
    stored: ModelArtifact, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    artifact = ModelArtifact.open(changed(stored, tmp_path / "changed", {"name": "upper-bounds", "options": options}))
    with pytest.raises(ArtifactError) as refused:
        artifact.network()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("plugin", "way_out"),
    [(None, "upgrade bdbench"), ({"package": "mine", "version": "2", "source": ""}, "install mine 2")],
)
def test_a_wrapper_that_is_not_there_is_named(stored: ModelArtifact, tmp_path: Path, plugin: Any, way_out: str) -> None:
    wrapper = {"name": "polarizer", "options": {}, "plugin": plugin}
    artifact = ModelArtifact.open(changed(stored, tmp_path / "changed", wrapper))
    with pytest.raises(ArtifactError, match=rf"needs the wrapper 'polarizer', which is not there; {way_out}"):
        artifact.network()


def test_weights_of_a_wrapper_need_the_wrapper(stored: ModelArtifact, tmp_path: Path) -> None:
    artifact = ModelArtifact.open(changed(stored, tmp_path / "changed", None))
    with pytest.raises(ArtifactError, match="does not hold weights of convnet"):
        artifact.network()


class Doubled(Wrapper):
    """Logits are doubled: a wrapper as a plugin may have one."""

    name: ClassVar[str] = "doubled"

    def build(self, model: Classifier, image_shape: tuple[int, int, int]) -> None:  # noqa: ARG002
        model.head.register_forward_hook(double)


def double(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def store_doubled(toys: DatasetArtifact, stored: ModelArtifact, folder: Path) -> ModelArtifact:
    suspect = stored.path.with_name("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "run", lambda _, task: Defended(wrap(task.suspect, Doubled(), (1, 8, 8))))
        return stages.defend(toys.path, "ft", suspect=suspect, out=folder / "doubled")


def test_a_wrapper_has_to_be_registered(toys: DatasetArtifact, stored: ModelArtifact, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"wrapper 'doubled' \(Doubled\) is not registered; name it in the entry-poi"):
        store_doubled(toys, stored, tmp_path)
    assert not (tmp_path / "doubled").exists()


def test_a_registered_wrapper_is_built_when_the_model_is_loaded(
    toys: DatasetArtifact, stored: ModelArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {**WRAPPERS.rows, "doubled": WRAPPERS.rows["upper-bounds"]._replace(target=f"{__name__}:Doubled")}
    monkeypatch.setitem(WRAPPERS.__dict__, "rows", rows)
    doubled = store_doubled(toys, stored, tmp_path)
    plain = ModelArtifact.open(stored.path.with_name("none")).network()
    batch = toys.test.images.float() / 255
    torch.testing.assert_close(doubled.network()(batch), 2 * plain(batch))
