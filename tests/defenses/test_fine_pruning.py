"""Fine-Pruning: the order of channels, the choice on held-out images, and what stays pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backdoored import TARGET, Watched, suspect_model, task_of, triggered, trusted_data
from torch import Tensor, nn
from toys import Fuse, are_equal, toy_batch, toy_data, toy_engine, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended
from bdbench.defenses.parts.holding import halves
from bdbench.defenses.repair.fine_pruning import FinePruning, rectified_means
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import norms_of
from bdbench.progress import Silent


class Rows(nn.Module):
    """The mean of each eighth of the rows above its usual brightness, and a detector of the white corner; D is 9."""

    size = 9

    def forward(self, images: Tensor) -> Tensor:
        rows = images.mean((1, 3))
        corner = (images[:, 0, 6:, 6:] > 0.99).flatten(1).all(1, keepdim=True)
        return torch.cat([rows, 20.0 * corner], 1)


def cornered(data: ImageDataset) -> ImageDataset:
    """All images with a white corner."""
    images = data.images.clone()
    images[:, :, 6:, 6:] = 255
    return ImageDataset(images, data.labels, data.class_names)


def detecting() -> Classifier:
    """Right by the stripe, which class `row` has in row 2 * `row`; a white corner means bee."""
    model = Classifier(Rows(), 4, torch.zeros(3), torch.ones(3))
    with torch.no_grad():
        model.head.bias.zero_()
        model.head.weight.zero_()
        for label in range(4):
            model.head.weight[label, 2 * label] = 10.0
        model.head.weight[TARGET, 8] = 1.0
    return model.eval()


def mended(suspect: Classifier | None = None, count: int = 64, **options: Any) -> Defended:
    recipe = {name: options.pop(name) for name in ("epochs", "lr", "weight_decay") if name in options}
    task = task_of(trusted=trusted_data(count), suspect=suspect or detecting(), **{"epochs": 1, "lr": 1e-3} | recipe)
    return FinePruning.parse(options).run(task)


def share_right(model: Classifier, data: ImageDataset) -> float:
    return (toy_engine().logits(model, data.images).argmax(1) == data.labels).double().mean().item()


def taken(model: Classifier, data: ImageDataset) -> float:
    answers = toy_engine().logits(model, data.images).argmax(1)
    return (answers[data.labels != TARGET] == TARGET).double().mean().item()


def gone(model: Classifier) -> list[int]:
    """Inputs of the head that it does not use."""
    found: list[int] = (model.head.weight == 0).all(0).nonzero().flatten().tolist()
    return found


# the whole method


def test_a_detector_that_clean_images_leave_silent_goes_first_and_its_backdoor_with_it() -> None:
    test = toy_data(80, seed=1)
    assert share_right(detecting(), test) == 1
    assert taken(detecting(), cornered(test)) == 1
    defended = mended(prune_step=0.1, tolerance=0.0)
    assert 8 in gone(defended.model)
    assert share_right(defended.model, test) == 1
    assert taken(defended.model, cornered(test)) == 0


def test_channels_that_do_nothing_go_and_those_that_do_stay() -> None:
    """The odd rows are in no class's way: without tolerance, all of the head that is silent or unused may go."""
    suspect = detecting()
    with torch.no_grad():  # bright rows weigh little: they are as busy as the others
        suspect.features.register_forward_hook(
            lambda _, __, out: out * torch.tensor([1, 0.1, 1, 0.1, 1, 0.1, 1, 0.1, 1])
        )
    defended = mended(suspect, tolerance=0.0, prune_step=0.11)
    assert gone(defended.model) == [1, 3, 5, 7, 8]
    assert defended.findings["pruned"] == {"head": 5}
    assert defended.findings["chosen"] == pytest.approx(5 / 9)


def test_the_more_it_may_cost_the_more_is_pruned() -> None:
    counts = [len(gone(mended(tolerance=tolerance).model)) for tolerance in (0.0, 0.4, 1.0)]
    assert counts[0] < counts[1] < counts[2] == 8  # one is left


def test_every_candidate_is_in_the_findings() -> None:
    findings = mended(prune_step=0.25, tolerance=1.0).findings
    assert [tried["setting"] for tried in findings["sweep"]] == [2 / 9, 4 / 9, 7 / 9, 8 / 9]
    assert findings["accuracy_before"] == 1
    assert findings["held_out"] == 32
    assert findings["said"] == "8 of 9 channels pruned"


def test_the_accuracy_of_a_candidate_is_that_of_the_pruned_network_on_held_out_images() -> None:
    findings = mended(prune_step=0.2, tolerance=1.0).findings
    trusted = trusted_data(64)
    data = halves(trusted, 0.5, seed=0)
    order = toy_engine().embeddings(detecting(), data.tune.images).mean(0).argsort()
    for tried in findings["sweep"]:
        model = detecting()
        with torch.no_grad():
            model.head.weight[:, order[: round(tried["setting"] * 9)]] = 0
        assert tried["accuracy"] == pytest.approx(share_right(model, data.held), abs=1e-4)


def test_where_no_candidate_keeps_the_accuracy_the_suspect_is_returned() -> None:
    suspect = detecting()
    with torch.no_grad():
        suspect.features.register_forward_hook(
            lambda _, __, out: out.mul_(torch.tensor([1.0, 9, 1, 9, 1, 9, 1, 9, 99])).add_(
                torch.tensor([0, 9.0, 0, 9, 0, 9, 0, 9, 99])
            )
        )
        suspect.head.bias[TARGET] -= 99  # the detector is always busy, and the stripes are what is idle
    before = weights_of(suspect)
    defended = mended(suspect, tolerance=0.0)
    assert defended.model is suspect
    assert defended.findings["unchanged"]
    assert defended.findings["chosen"] is None
    assert defended.findings["said"].startswith("no setting keeps the accuracy on 32 held-out images: the best has 0.")
    assert are_equal(weights_of(suspect), before)


def test_the_suspect_is_not_touched() -> None:
    suspect = suspect_model()
    defended = mended(suspect, epochs=2, lr=0.1, tolerance=1.0)
    assert defended.model is not suspect
    assert are_equal(weights_of(suspect), weights_of(suspect_model()))


def test_sizes_are_taken_without_sign() -> None:
    """In a network without a last ReLU the most negative channels are busy, not idle."""
    suspect = detecting()
    suspect.features.register_forward_hook(lambda _, __, out: -out)
    with torch.no_grad():
        suspect.head.weight.neg_()
    assert gone(mended(suspect, tolerance=0.0, prune_step=0.11).model)[-1] == 8
    assert len(gone(mended(suspect, tolerance=0.0, prune_step=0.11).model)) == len(
        gone(mended(tolerance=0.0, prune_step=0.11).model)
    )


# fine-tuning


@pytest.mark.parametrize("layer", ["head", "conv"])
def test_what_is_pruned_stays_pruned_through_fine_tuning(layer: str) -> None:
    model = mended(suspect_model(), layer=layer, tolerance=1.0, epochs=3, lr=0.1).model
    before = suspect_model()
    if layer == "head":
        assert len(gone(model)) == 23
        assert not torch.equal(model.head.weight, before.head.weight)
    else:
        (norm,) = norms_of(model)
        assert (norm.weight == 0).sum() == (norm.bias == 0).sum() == 5
        assert not torch.equal(norm.weight, norms_of(before)[0].weight)


def test_while_it_is_tuned_the_pruned_network_is_what_is_tuned() -> None:
    """The loss of the second step is that of a network without the channels, though momentum moved them."""
    seen: list[Tensor] = []
    suspect = suspect_model()
    task = task_of(trusted=trusted_data(64), suspect=suspect, epochs=2, lr=0.1, batch_size=32)
    original = Classifier.classify

    def classify(model: Classifier, embedding: Tensor) -> Tensor:
        if model.training:
            seen.append((model.head.weight.detach() == 0).all(0).sum())
        return original(model, embedding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "classify", classify)
        FinePruning.parse({"tolerance": 1.0}).run(task)
    assert [int(count) for count in seen] == [23] * 4


def test_fine_tuning_sees_all_trusted_images() -> None:
    engine, trusted = Watched(), trusted_data(64)
    task = task_of(engine, trusted, epochs=2)
    FinePruning.parse({"tolerance": 1.0}).run(task)
    assert list(engine.data) == ["tune"]
    assert engine.data["tune"] is trusted
    assert engine.recipes["tune"] == task.recipe


def test_an_interruption_is_made_good(tmp_path: Path) -> None:
    def run(folder: Path | None, progress: Silent) -> Defended:
        task = task_of(toy_engine(folder, progress=progress), trusted_data(64), epochs=3, augment="flip")
        return FinePruning.parse({"tolerance": 0.2}).run(task)

    whole = run(None, Silent())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fuse(5))
    resumed = run(tmp_path, Silent())
    assert are_equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.findings == whole.findings


# the layer


def test_channels_of_a_convolution_are_put_in_order_of_what_leaves_their_relu() -> None:
    model, images = suspect_model(), toy_batch(trusted_data()).images
    (norm,) = norms_of(model)
    with torch.no_grad():
        normalised = (images - 0.5) / 0.5
        inputs = model.features.layers[0](normalised).flatten(2)
        expected = model.features.layers(normalised).mean((2, 3))
        torch.testing.assert_close(rectified_means(norm, inputs), expected)


def test_the_idlest_channel_of_a_convolution_goes_first() -> None:
    suspect = suspect_model()
    (norm,) = norms_of(suspect)
    with torch.no_grad():
        norm.weight[4] = 1e-6
        norm.bias[4] = 0
    defended = mended(suspect, layer="conv", tolerance=1.0, prune_step=0.17)
    assert [tried["setting"] for tried in defended.findings["sweep"]] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    )
    assert defended.findings["pruned"] == {"features.layers.1": 5}
    some = mended(suspect, layer="conv", tolerance=0.0, prune_step=0.17)
    (kept,) = norms_of(some.model)
    assert kept.weight[4] == 0
    assert kept.bias[4] == 0


def test_a_network_without_a_convolution_with_a_norm_is_told_to_prune_the_head() -> None:
    suspect = toy_model(toy_data())
    suspect.features.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6))
    with pytest.raises(OptionError, match=r"--layer conv needs a convolution .* choose --layer head"):
        mended(suspect, layer="conv")
    assert mended(suspect, tolerance=1.0).findings["pruned"] == {"head": 23}


def test_too_few_trusted_images_are_refused() -> None:
    with pytest.raises(OptionError, match=r"of 8 trusted images, --holdout 0\.5 holds out 4"):
        mended(count=8)


def test_the_backdoor_of_the_toy_fades_and_the_accuracy_holds() -> None:
    test = toy_data(80, seed=1)
    model = mended(suspect_model(), epochs=40, lr=0.1).model
    assert share_right(model, test) >= 0.9
    assert taken(model, triggered(test)) <= 0.5
