"""Surrogates: trained once, shared, refused when they have not learned; and what attacks do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from linear import linear_model
from toys import Fuse, are_equal, attack_of, toy_batch, toy_data, toy_engine, toy_lab, toy_model, toy_source, weights_of

from bdbench.attacks.base import Lab
from bdbench.attacks.parts import surrogates
from bdbench.attacks.parts.surrogates import (
    SurrogateAttack,
    adversarial_cross_entropy,
    change_images,
    check_learned,
    on_device,
    rows_of_target,
)
from bdbench.data import ImageDataset
from bdbench.errors import OptionError, TrainingError
from bdbench.models.classifier import Classifier
from bdbench.progress import Silent
from bdbench.protocol.poisoning import poison_source
from bdbench.training.loop import Batch, mean_cross_entropy


def attack(name: str = "narcissus", **options: Any) -> SurrogateAttack:
    made = attack_of(name, **options)
    assert isinstance(made, SurrogateAttack)
    return made


def at_work(folder: Path | None, progress: Silent) -> Lab:
    """A lab whose engine keeps checkpoints in a folder."""
    return replace(toy_lab(), engine=toy_engine(folder, progress=progress))


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "surrogates").glob("*.safetensors")}


# trained once


def test_another_attack_takes_the_surrogate_from_the_cache(tmp_path: Path) -> None:
    data = toy_data(48)
    first = attack("narcissus").train_surrogate(data, toy_lab(cache=tmp_path))
    nothing = Fuse(0)
    lab = replace(toy_lab(cache=tmp_path), engine=toy_engine(progress=nothing))
    second = attack("lf").train_surrogate(data, lab)
    assert second is not first
    assert nothing.started == []
    assert are_equal(weights_of(first), weights_of(second))
    assert torch.equal(lab.engine.logits(first, data.images), lab.engine.logits(second, data.images))
    assert [row["phase"] for row in lab.engine.history] == ["surrogate"] * 10


def test_a_lab_without_a_cache_trains_its_surrogate_once() -> None:
    lab, data = toy_lab(), toy_data(48)
    assert attack("lf").train_surrogate(data, lab) is attack("lba").train_surrogate(data, lab)
    assert len(lab.engine.history) == 10


def test_two_labs_share_nothing_without_a_cache() -> None:
    data, labs = toy_data(48), (toy_lab(), toy_lab())
    one, two = (attack().train_surrogate(data, lab) for lab in labs)
    assert one is not two
    assert are_equal(weights_of(one), weights_of(two))


@pytest.mark.parametrize("name", ["lc", "fc", "narcissus", "lf", "trojannn", "lba"])
def test_poisoning_trains_one_surrogate(name: str) -> None:
    lab = toy_lab()
    small = {"lc": {"steps": 1}, "fc": {"steps": 1}, "narcissus": {"rounds": 12, "lr": 0.05}, "lf": {"passes": 1}}
    options = small.get(name, {"steps": 1} if name == "trojannn" else {"epochs": 1})
    poison_source(toy_source(), attack(name, rate=0.1, **options), lab, trusted=0)
    assert sum(str(row["phase"]).startswith("surrogate") for row in lab.engine.history) == 10


Change = Callable[[ImageDataset], ImageDataset]


def same(data: ImageDataset) -> ImageDataset:
    return data


def with_other_pixel(data: ImageDataset) -> ImageDataset:
    images = data.images.clone()
    images[0, 0, 0, 0] ^= 1
    return ImageDataset(images, data.labels, data.class_names)


def with_other_label(data: ImageDataset) -> ImageDataset:
    labels = data.labels.clone()
    labels[0] = 3
    return ImageDataset(data.images, labels, data.class_names)


@pytest.mark.parametrize(
    ("options", "lab", "change"),
    [
        ({"surrogate_epochs": 11}, {}, same),
        ({"surrogate_lr": 0.05}, {}, same),
        ({"surrogate_adversarial": True}, {}, same),
        ({}, {"engine": toy_engine(seed=1)}, same),
        ({}, {"augment": "flip"}, same),
        ({}, {"model": lambda *_: toy_model(toy_data(1), "other")}, same),
        ({}, {}, with_other_pixel),
        ({}, {}, with_other_label),
    ],
)
def test_what_determines_a_surrogate_makes_another_one(
    tmp_path: Path, options: dict[str, Any], lab: dict[str, Any], change: Change
) -> None:
    data = toy_data(48)
    attack().train_surrogate(data, toy_lab(cache=tmp_path))
    attack(**options).train_surrogate(change(data), replace(toy_lab(cache=tmp_path), **lab))
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("options", [{"target": 2}, {"epsilon": 8.0}, {"rate": 0.3}])
def test_what_does_not_determine_a_surrogate_makes_none(tmp_path: Path, options: dict[str, Any]) -> None:
    for given in ({}, options):
        attack(**given).train_surrogate(toy_data(48), toy_lab(cache=tmp_path))
    assert len(kept(tmp_path)) == 1


def test_an_interrupted_surrogate_goes_on_where_it_was(tmp_path: Path) -> None:
    data = toy_data(384)  # three steps an epoch
    whole = attack(surrogate_epochs=4).train_surrogate(data, at_work(None, Silent()))
    with pytest.raises(KeyboardInterrupt):
        attack(surrogate_epochs=4).train_surrogate(data, at_work(tmp_path, Fuse(7, size=128)))
    rest = Fuse(6, size=128)  # two epochs of four are left
    resumed = attack(surrogate_epochs=4).train_surrogate(data, at_work(tmp_path, rest))
    assert rest.left == 0
    assert are_equal(weights_of(whole), weights_of(resumed))


def test_a_surrogate_is_frozen_and_evaluates() -> None:
    model = attack().train_surrogate(toy_data(48), toy_lab())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# what it has learned


def test_a_surrogate_that_did_not_learn_is_refused(tmp_path: Path) -> None:
    message = (
        "the surrogate did not learn: accuracy 0.500 on its training images, at least 0.625 is needed for 2 classes; "
        "raise --surrogate-epochs or lower --surrogate-lr"
    )
    lab = toy_lab(cache=tmp_path)
    for _ in range(2):  # trained, then from the cache
        with pytest.raises(TrainingError, match=message):
            attack(surrogate_epochs=1).train_surrogate(black([0, 1] * 5), lab)
    assert len(lab.engine.history) == 2
    assert kept(tmp_path)


def says(label: int) -> Classifier:
    """A model of 8x8 gray images in two classes that always says one of them."""
    model = linear_model(torch.zeros(2, 64))
    model.head.bias.data[label] = 1
    return model


def black(labels: list[int]) -> ImageDataset:
    return ImageDataset(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), torch.tensor(labels), ("a", "b"))


def test_saying_the_commonest_class_is_not_learning() -> None:
    with pytest.raises(TrainingError, match=r"accuracy 0\.500"):
        check_learned(toy_lab(), says(0), black([0] * 90 + [1] * 10), "surrogate", "--epochs")


def test_a_class_without_images_does_not_count() -> None:
    check_learned(toy_lab(), says(0), black([0] * 10), "surrogate", "--epochs")
    check_learned(toy_lab(), says(1), black([1] * 10), "surrogate", "--epochs")


def test_images_that_are_asked_do_not_come_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second image would be of one class."""
    monkeypatch.setattr(surrogates, "JUDGED", 50)
    with pytest.raises(TrainingError, match="did not learn"):
        check_learned(toy_lab(), says(0), black([0, 1] * 50), "surrogate", "--epochs")


def test_a_model_of_numbers_that_are_none_is_refused() -> None:
    model = says(0)
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="did not learn"):
        check_learned(toy_lab(), model, black([0, 1] * 5), "surrogate", "--epochs")


# losses


def watched(model: Classifier) -> list[torch.Tensor]:
    """Collect what a model is shown."""
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    return seen


def test_adversarial_images_stay_near_and_go_up_the_loss() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 64)
    model = linear_model(weight)
    images = torch.full((4, 1, 8, 8), 0.5)
    batch = Batch(images, torch.tensor([0, 1, 0, 1]), torch.arange(4), 0)
    seen = watched(model)
    loss = adversarial_cross_entropy(model, batch)
    delta = (seen[-1] - images) * 255
    # for class 0 the loss rises along weight[1] - weight[0]; from a start within 8, a step of 10 ends in 2..8
    uphill = torch.stack([weight[1] - weight[0], weight[0] - weight[1]] * 2).view(4, 1, 8, 8).sign()
    assert (delta * uphill >= 2 - 1e-3).all()
    assert (delta.abs() <= 8 + 1e-3).all()
    assert (delta.abs() < 7.9).any()  # the start was random
    assert loss > mean_cross_entropy(model, batch)


def test_adversarial_images_are_images() -> None:
    model, data = toy_model(toy_data(8)), toy_data(8)
    white = ImageDataset(torch.full_like(data.images, 255), data.labels, data.class_names)
    seen = watched(model)
    adversarial_cross_entropy(model, toy_batch(white))
    assert len(seen) == 2
    assert all(shown.max() <= 1 for shown in seen)


# what attacks share


def test_images_for_networks_are_shares_of_white() -> None:
    shown = on_device(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3), toy_lab())
    torch.testing.assert_close(shown.flatten(), torch.tensor([0.0, 0.2, 1.0]))


def test_the_target_class_is_found() -> None:
    assert rows_of_target(toy_data(9), 1).tolist() == [1, 5]


@pytest.mark.parametrize(("labels", "said"), [([1, 1], "0 of 2"), ([0, 0], "2 of 2")])
def test_a_target_class_needs_images_and_others(labels: list[int], said: str) -> None:
    message = f"{said} training images are of class 0, some and not all must be; choose another --target"
    with pytest.raises(OptionError, match=message):
        rows_of_target(black(labels), 0)


@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_images_are_changed_each_in_its_place(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(surrogates, "CHANGED_AT_ONCE", at_once)
    images = toy_data(7).images
    add = torch.arange(7.0) * 60

    def change(part: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return part + add[places].view(-1, 1, 1, 1) / 255

    changed = change_images(toy_lab(), "test", images, change)
    assert torch.equal(changed, (images.int() + add.int().view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8))


def test_changed_images_are_rounded_and_clipped() -> None:
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    up = change_images(toy_lab(), "test", images, lambda part, _: part + 0.6 / 255)
    down = change_images(toy_lab(), "test", images, lambda part, _: part - 0.4 / 255)
    assert up.flatten().tolist() == [1, 101, 255]
    assert down.flatten().tolist() == [0, 100, 255]
