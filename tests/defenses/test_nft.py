"""NFT: mixed images, the bounds and the price of masks, and the whole method on a small backdoored model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import Fuse, are_equal, toy_batch, toy_data, toy_engine, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.masks import Masks
from bdbench.defenses.repair.nft import Landing, NeuralMaskFineTuning, clamp, distance, images_of_a_class, lowest, mixup
from bdbench.training.loop import Batch

NORM = "features.layers.1"
RECIPE: dict[str, Any] = {"epochs": 5, "lr": 0.05, "momentum": 0.95, "weight_decay": 0.0, "schedule": "cosine"}


def defend(task: Task | None = None, **options: Any) -> Defended:
    return NeuralMaskFineTuning.parse({"steps_per_epoch": 4} | options).run(task or task_of(**RECIPE))


def ratios(defended: Defended) -> Tensor:
    """The masks (6,), from the weights before and after."""
    return defended.model.state_dict()[f"{NORM}.weight"] / backdoored_weights()[f"{NORM}.weight"]


def flat_batch() -> Batch:
    """Two images of one gray each, of classes 0 and 1."""
    images = torch.tensor([0.2, 0.6]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    return Batch(images, torch.tensor([0, 1]), torch.arange(2), 0)


# mixing


def test_images_and_labels_are_mixed_in_the_same_share() -> None:
    seen: list[Tensor] = []
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])

    def network(images: Tensor) -> Tensor:
        seen.append(images)
        return logits

    found = mixup(network, flat_batch(), torch.tensor(0.25), torch.tensor([1, 0]))
    # 0.25 * 0.2 + 0.75 * 0.6 = 0.5, and 0.25 * 0.6 + 0.75 * 0.2 = 0.3
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([0.5, 0.3]))
    # softplus(-2), softplus(-1) for the own classes, softplus(2), softplus(1) for the others'
    own, other = ((math.log1p(math.exp(sign * 2)) + math.log1p(math.exp(sign))) / 2 for sign in (-1, 1))
    assert found.item() == pytest.approx(0.25 * own + 0.75 * other)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_nothing_is_one_of_the_two_images(share: float) -> None:
    model, batch = suspect_model(), toy_batch(trusted_data())
    order = torch.arange(31, -1, -1)
    found = mixup(model, batch, torch.tensor(share), order)
    rows = order if share == 0 else torch.arange(32)
    torch.testing.assert_close(found, F.cross_entropy(model(batch.images[rows]), batch.labels[rows]))


# masks


def test_the_first_norms_can_change_least() -> None:
    assert lowest(3, 0.8, 0.5) == pytest.approx([0.485, 0.294, 0.179], abs=5e-4)
    assert lowest(2, 0.8, 0.0) == [0.8, 0.8]


def test_masks_never_leave_their_bounds() -> None:
    ratio = ratios(defend(task_of(**RECIPE | {"lr": 50.0}), end_lr=50.0))
    assert ratio.min().item() == pytest.approx(0.8 * math.exp(-0.5))
    assert (ratio <= 1).all()


def test_masks_are_brought_back_between_their_lowest_value_and_one() -> None:
    masks = Masks(suspect_model(), "nft")
    masks.factors[0].data.copy_(torch.tensor([-1.0, 0.4, 0.5, 0.75, 1.0, 2.0]))
    clamp(masks, [0.5])
    assert masks.factors[0].tolist() == [0.5, 0.5, 0.5, 0.75, 1.0, 1.0]


def test_the_distance_is_the_sum_over_all_channels() -> None:
    masks = Masks(suspect_model(), "nft")
    masks.factors[0].data.copy_(torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0, 1.0]))
    assert distance(masks).item() == 1.25


def test_images_of_a_class_are_counted_over_the_classes_that_have_any() -> None:
    data = toy_data(30)
    few = ImageDataset(data.images, data.labels % 3, data.class_names)
    assert images_of_a_class(few) == 10


# the schedule


def test_the_rate_falls_to_its_end_and_not_to_zero() -> None:
    recipe = Landing.parse({"epochs": 5, "lr": 0.05, "schedule": "cosine", "end_lr": 0.02})
    assert [recipe.lr_at(epoch) for epoch in (0, 2.5, 5)] == pytest.approx([0.05, 0.035, 0.02])


# the method


def test_without_a_rate_only_the_statistics_of_norms_move() -> None:
    before = backdoored_weights()
    after = weights_of(defend(task_of(**RECIPE | {"lr": 1e-30}), end_lr=0.0).model)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {f"{NORM}.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}


def test_masks_are_multiplied_into_the_weights_of_norms_and_no_other_weight_moves() -> None:
    before, defended = backdoored_weights(), defend()
    after = weights_of(defended.model)
    moved = {name for name, _ in defended.model.named_parameters() if not torch.equal(before[name], after[name])}
    assert moved == {f"{NORM}.weight"}
    assert defended.findings["mean_masks"] == {NORM: pytest.approx(ratios(defended).mean().item(), abs=1e-4)}


def test_a_high_price_keeps_the_masks_at_one() -> None:
    assert defend(penalty=1e4).findings["mean_masks"][NORM] > 0.99 > defend().findings["mean_masks"][NORM]


def test_an_interrupted_run_has_the_same_statistics_of_norms(tmp_path: Path) -> None:
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = weights_of(defend(task_of(toy_engine(tmp_path / "whole"), **RECIPE)).model)
    with pytest.raises(KeyboardInterrupt):
        defend(task_of(toy_engine(tmp_path / "cut", progress=Fuse(10)), **RECIPE))
    assert are_equal(whole, weights_of(defend(task_of(toy_engine(tmp_path / "cut"), **RECIPE)).model))


def test_without_bounds_the_mended_model_forgets_the_trigger_and_nothing_else() -> None:
    suspect = suspect_model()
    defended = defend(task_of(suspect=suspect, **RECIPE), steps_per_epoch=40, mask_floor=0.0)
    right, taken = accuracies(defended.model)
    assert right >= 0.9
    assert taken <= 0.2
    assert not defended.model.training
    assert are_equal(weights_of(suspect), backdoored_weights())
