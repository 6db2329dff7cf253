"""Masks and thresholds: what is pruned, what is chosen, what stays."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from backdoored import suspect_model, task_of, trusted_data
from torch import Tensor, nn
from toys import are_equal, toy_data, toy_engine, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import halves
from bdbench.defenses.parts.masks import Masks, prune
from bdbench.defenses.repair.masking import THRESHOLDS, Learned, MaskingRepair, below
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier

NORM = "features.layers.1"
RISING = (0.88, 1.0, 0.5, 0.0, 0.5, 0.12)
"""Masks that take first what the accuracy needs most."""

TOLD: list[ImageDataset] = []
"""Images that masks were learned from, last run last."""


class Given(MaskingRepair):
    """Has the masks of its channels told."""

    paper: ClassVar[str] = "none"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    masks: tuple[float, ...] = (1.0,) * 6

    def learn(self, task: Task, suspect: Classifier, tune: ImageDataset) -> Learned:  # noqa: ARG002
        TOLD.append(tune)
        masks = Masks(suspect, "given")
        masks.factors[0].data.copy_(torch.tensor(self.masks))
        return Learned(masks, {"learned": "well"})


def mended(*masks: float, **options: Any) -> tuple[Defended, Classifier]:
    suspect = suspect_model()
    task = task_of(trusted=trusted_data(48), suspect=suspect)
    return Given.parse({"masks": masks} | options).run(task), suspect


def accuracy_without(*channels: int) -> float:
    """The accuracy of the suspect on the held-out images, without some channels."""
    model = suspect_model()
    with torch.no_grad():
        model.get_submodule(NORM).weight[list(channels)] = 0
    held = halves(trusted_data(48), 0.5, 0).held
    right = toy_engine().logits(model, held.images).argmax(1) == held.labels
    return round(float(right.double().mean()), 4)


def test_a_pruned_channel_has_weight_zero_and_all_else_stays() -> None:
    defended, suspect = mended(0.2, 1.0, 0.21, 0.0, 1.0, 1.0, threshold=0.2)
    before, after = weights_of(suspect), weights_of(defended.model)
    assert after[f"{NORM}.weight"].tolist() == [
        0 if channel in (0, 3) else weight for channel, weight in enumerate(before[f"{NORM}.weight"].tolist())
    ]
    del before[f"{NORM}.weight"], after[f"{NORM}.weight"]
    assert are_equal(before, after)  # biases and running statistics too
    assert not defended.model.training
    assert defended.findings["pruned"] == {NORM: 2}
    assert defended.findings["learned"] == "well"


def test_the_suspect_stays_as_it_is() -> None:
    defended, suspect = mended(0.0, 1.0, 1.0, 1.0, 1.0, 1.0, tolerance=1.0)
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))
    assert not are_equal(weights_of(suspect), weights_of(defended.model))


def test_a_larger_threshold_prunes_a_superset() -> None:
    masks = {NORM: torch.linspace(0, 1, 6)}
    pruned = [set(torch.nonzero(below(masks, threshold)[NORM]).flatten().tolist()) for threshold in THRESHOLDS]
    assert pruned[0] == {0}
    assert pruned[-1] == {0, 1, 2, 3, 4}
    assert all(one <= other for one, other in pairwise(pruned))


def test_the_thresholds_are_those_of_the_published_tables() -> None:
    assert len(THRESHOLDS) == 19
    assert THRESHOLDS[:4] == (0.0, 0.05, 0.1, 0.15)
    assert THRESHOLDS[-1] == 0.9


def test_the_sweep_measures_what_each_threshold_would_prune() -> None:
    defended, _ = mended(*RISING, tolerance=1.0)
    sweep = {tried["setting"]: tried["accuracy"] for tried in defended.findings["sweep"]}
    assert set(sweep) == set(THRESHOLDS)
    assert sweep[0.0] == sweep[0.1] == accuracy_without(3)
    assert sweep[0.15] == sweep[0.45] == accuracy_without(3, 5)
    assert sweep[0.5] == sweep[0.85] == accuracy_without(3, 5, 2, 4)
    assert sweep[0.9] == accuracy_without(3, 5, 2, 4, 0)
    assert 1 > sweep[0.0] > sweep[0.15] > sweep[0.5]


def test_the_largest_threshold_within_the_tolerance_is_taken() -> None:
    for tolerance, chosen in ((0.0, None), (0.1, 0.1), (0.4, 0.45), (1.0, 0.9)):
        defended, suspect = mended(*RISING, tolerance=tolerance)
        assert defended.findings["chosen"] == chosen
        expected = weights_of(suspect)
        expected[f"{NORM}.weight"][torch.tensor(RISING) <= (-1 if chosen is None else chosen)] = 0
        assert are_equal(weights_of(defended.model), expected)


def test_a_tolerance_that_no_threshold_keeps_leaves_the_model_and_says_so() -> None:
    defended, suspect = mended(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert defended.model is suspect or are_equal(weights_of(defended.model), weights_of(suspect))
    findings = defended.findings
    assert findings["unchanged"] is True
    assert findings["chosen"] is None
    assert findings["pruned"] == {}
    best = max(tried["accuracy"] for tried in findings["sweep"])
    assert f"{findings['accuracy_floor']:.3f}" in findings["said"]
    assert f"{best:.3f}" in findings["said"]


def test_where_no_mask_is_low_enough_nothing_is_pruned_and_the_model_is_marked() -> None:
    defended, suspect = mended(0.91, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert are_equal(weights_of(defended.model), weights_of(suspect))
    assert defended.findings["unchanged"] is True
    assert "at most 0.9: nothing to prune" in defended.findings["said"]


def test_masks_are_learned_from_the_images_that_are_not_held_out() -> None:
    mended(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    tune, held = halves(trusted_data(48), 0.5, 0)
    assert torch.equal(TOLD[-1].images, tune.images)
    assert not {image.numpy().tobytes() for image in tune.images} & {image.numpy().tobytes() for image in held.images}


def test_a_given_threshold_is_what_is_kept_and_takes_all_images() -> None:
    """BackdoorBench saves the model that test ASR chose, even where a number is asked for."""
    defended, _ = mended(*RISING, threshold=0.12)
    assert len(TOLD[-1]) == 48
    assert defended.findings["chosen"] == 0.12
    assert defended.findings["pruned"] == {NORM: 2}
    assert "sweep" not in defended.findings


def test_masks_begin_at_one_and_replace_the_weights_of_norms_only() -> None:
    suspect = suspect_model()
    masks = Masks(suspect, "given")
    assert [factor.tolist() for factor in masks.factors] == [[1.0] * 6]
    masks.factors[0].data.copy_(torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 2.0]))
    changed = masks.changed()
    weight = suspect.get_submodule(NORM).weight
    assert isinstance(weight, Tensor)
    assert list(changed) == [f"{NORM}.weight"]
    torch.testing.assert_close(changed[f"{NORM}.weight"], weight * torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 2.0]))
    masks.clamp()
    assert masks.by_norm()[NORM].tolist() == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("bias", [False, True])
def test_pruning_takes_the_bias_too_where_it_is_asked_to(bias: bool) -> None:
    model = suspect_model()
    norm = model.get_submodule(NORM)
    assert isinstance(norm, nn.BatchNorm2d)
    before = norm.bias.detach().clone()
    gone = torch.tensor([True, False, False, True, False, False])
    assert prune(model, {NORM: gone}, bias=bias) == {NORM: 2}
    assert torch.equal(norm.weight == 0, gone)
    assert torch.equal(norm.bias == 0, gone) == bias
    assert torch.equal(norm.bias[~gone], before[~gone])


def test_a_network_without_norms_is_refused_by_name() -> None:
    class Bare(nn.Module):
        size = 12

        def __init__(self, image_shape: tuple[int, int, int]) -> None:
            super().__init__()
            self.layer = nn.Conv2d(image_shape[0], 12, 8)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.layer(images).flatten(1)
            return found

    with pytest.raises(OptionError, match="method 'anp' works on batch norms, and this network has none"):
        Masks(toy_model(toy_data(), features=Bare), "anp")
