"""RNP: the ascent and where it ends, the recovery, and the whole method on a small backdoored model."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import Fuse, are_equal, toy_batch, toy_engine, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy
from bdbench.defenses.parts.masks import Masks
from bdbench.defenses.repair.rnp import RNP
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.training.recipe import Recipe

NORM = "features.layers.1"
OPTIONS: dict[str, Any] = {"unlearn_stop": 0.25, "unlearn_lr": 0.1}
RECIPE: dict[str, Any] = {"epochs": 20, "lr": 0.04, "weight_decay": 0.0}


class Walk(NamedTuple):
    defended: Defended
    suspect: Classifier
    engine: Watched


@cache
def walk() -> Walk:
    suspect, engine = suspect_model(), Watched()
    task = task_of(engine, trusted_data(80), suspect, **RECIPE)
    return Walk(RNP.parse(OPTIONS).run(task), suspect, engine)


def unlearned(task: Task | None = None, **options: Any) -> Classifier:
    task = task or task_of(trusted=trusted_data(32))
    assert task.trusted is not None
    return RNP.parse(options)._unlearned(task, suspect_model(), task.trusted)


def test_unlearning_ascends_the_cross_entropy_of_the_trusted_images() -> None:
    data, engine = trusted_data(16), Watched()
    unlearned(task_of(engine, data, batch_size=16), unlearn_steps=1)
    (batch,) = engine.batches
    logits = suspect_model().train()(batch.images)
    assert engine.losses_of("unlearn") == [pytest.approx(-F.cross_entropy(logits, batch.labels).item(), rel=1e-5)]


def test_it_ends_where_the_accuracy_has_fallen_far_enough() -> None:
    data, engine = trusted_data(80), Watched()
    model = unlearned(task_of(engine, data), unlearn_lr=0.1, unlearn_stop=0.3)
    looks = len(engine.losses_of("unlearn"))
    assert accuracy(engine, model, data) <= 0.3
    assert 1 <= looks < 20
    assert len(engine.batches) == 4 * looks
    for stop, expected in ((1.0, 1), (0.0, 4)):
        unlearned(task_of(engine := Watched(), data), unlearn_stop=stop, unlearn_steps=16)
        assert len(engine.losses_of("unlearn")) == expected


def test_accuracy_is_that_on_the_images_it_unlearns_and_on_no_others() -> None:
    """backdoor-toolbox ends it by test accuracy."""
    assert torch.equal(walk().engine.data["unlearn"].images, walk().engine.data["recover"].images)
    assert len(walk().engine.data["unlearn"]) == 40
    assert walk().defended.findings["held_out"] == 40
    assert walk().defended.findings["unlearned_accuracy"] <= 0.25
    assert walk().defended.findings["took"]


def test_where_it_never_falls_so_far_the_findings_say_so_and_recovery_goes_on_with_this_very_model() -> None:
    """The official code saves nothing then, and loads what an earlier run left."""
    engine, notes = Watched(), []
    engine.progress.note = notes.append  # type: ignore[method-assign]
    task = task_of(engine, trusted_data(80), **RECIPE | {"epochs": 1})
    findings = RNP.parse({"unlearn_lr": 1e-6, "unlearn_steps": 5}).run(task).findings
    assert not findings["took"]
    assert findings["unlearned_accuracy"] == 1
    assert "unlearning did not take: the accuracy on the trusted images is 1.000 after 5 steps (limit 0.2)" in notes[0]
    assert engine.losses_of("recover")[0] < 0.1  # it has nothing to recover


def test_its_rate_falls_after_half_of_its_steps() -> None:
    engine = Watched()
    unlearned(task_of(engine, lr=9.0, schedule="cosine", weight_decay=0.0), unlearn_steps=16, unlearn_stop=0.0)
    recipe = engine.recipes["unlearn"]
    assert [recipe.lr_at(epoch) for epoch in range(4)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert recipe.weight_decay == 5e-4


def test_the_gradient_is_clipped_where_it_is_there() -> None:
    """The published codes clip before the backward pass, which does nothing."""
    settings: dict[str, Any] = {"batch_size": 32, "momentum": 0.0}

    def moved(clip: float) -> tuple[Tensor, Tensor]:
        """The whole way of the first step but weight decay, and its direction."""
        task = task_of(trusted=trusted_data(32), **settings)
        model = unlearned(task, unlearn_steps=1, unlearn_clip=clip, unlearn_lr=1.0)
        before, after = suspect_model(), dict(model.named_parameters())
        way = torch.cat([
            (after[name] - (1 - 5e-4) * weight).flatten().detach() for name, weight in before.named_parameters()
        ])  # fmt: skip
        return way.norm(), way / way.norm()

    (free, there), (clipped, same) = moved(1e6), moved(1e-3)
    assert free > 0.01
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(there, same, rtol=0, atol=1e-3)


def test_a_lower_cap_leaves_more_of_the_model() -> None:
    def last_loss(cap: float) -> float:
        engine = Watched()
        unlearned(task_of(engine, trusted_data(32)), unlearn_lr=0.5, unlearn_stop=0.0, unlearn_cap=cap)
        return float(engine.losses_of("unlearn")[-1])

    assert last_loss(3.0) < -math.log(4)
    assert -math.log(4) <= last_loss(1.0) < -0.5 * math.log(4)


def test_the_ascent_ends_at_ten_times_the_loss_of_guessing() -> None:
    engine = Watched()
    model = unlearned(task_of(engine, trusted_data(32)), unlearn_lr=5.0, unlearn_stop=0.0, unlearn_steps=24)
    assert -10 * math.log(4) <= engine.losses_of("unlearn")[-1] < -5 * math.log(4)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_suspect_stays_and_all_but_pruned_weights_of_the_result_are_its_own() -> None:
    """Neither the unlearned weights nor the statistics that either phase moved come back."""
    assert are_equal(weights_of(walk().suspect), backdoored_weights())
    after = weights_of(walk().defended.model)
    for name, value in backdoored_weights().items():
        same = after[name] == value
        assert same.all() or (name == f"{NORM}.weight" and (after[name][~same] == 0).all())
    assert not walk().defended.model.training


def test_recovery_moves_masks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[tuple[dict[str, Tensor], Classifier]] = []
    made = Masks.__init__

    def init(masks: Masks, model: Classifier, method: str) -> None:
        networks.append(({name: weight.detach().clone() for name, weight in model.named_parameters()}, model))
        made(masks, model, method)

    monkeypatch.setattr(Masks, "__init__", init)
    data = trusted_data(32)
    found = RNP.parse(OPTIONS).learn(task_of(trusted=data, epochs=3, lr=1.0), frozen(suspect_model()), data)
    ((before, network),) = networks
    assert all(torch.equal(before[name], weight) for name, weight in network.named_parameters())
    assert not torch.equal(before["head.weight"], suspect_model().head.weight)  # it is the unlearned one
    (masks,) = found.masks.by_norm().values()
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.min() < 1


def test_recovery_descends_the_cross_entropy_of_the_unlearned_network() -> None:
    data, engine = trusted_data(16), Watched()
    task = task_of(engine, data, epochs=1, batch_size=16, lr=0.5)
    options = RNP.parse({"unlearn_steps": 1, "unlearn_stop": 0.0})
    options.learn(task, frozen(suspect_model()), data)
    network = unlearned(task_of(trusted=data, batch_size=16), unlearn_steps=1, unlearn_stop=0.0).train()
    expected = F.cross_entropy(network(toy_batch(data).images), data.labels)
    assert engine.losses_of("recover") == [pytest.approx(expected.item(), rel=1e-4)]


def test_the_backdoor_goes_and_the_accuracy_stays() -> None:
    assert accuracies(walk().suspect) == (1.0, 1.0)
    benign, attacked = accuracies(walk().defended.model)
    assert benign > 0.9
    assert attacked < 0.1


def test_the_published_recovery_is_a_rate_of_0_2_on_a_loss_times_0_2() -> None:
    """Without weight decay the scale of a loss is that of the rate."""
    recipe = Recipe.parse({name: value for name, value in RNP.presets["paper"].items() if name in Recipe.model_fields})
    assert recipe.lr == pytest.approx(0.2 * 0.2)
    assert recipe.weight_decay == 0
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (20, 128, "constant")
    assert RNP().unlearn_steps == 20 * 4


@pytest.mark.parametrize("steps", [6, 17])
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(steps: int, tmp_path: Any) -> None:
    """The unlearning has 12 steps: the first one ends in it, the second one in the recovery."""

    def run(folder: Any, **settings: Any) -> Defended:
        data: ImageDataset = trusted_data(64)
        task = task_of(toy_engine(folder, **settings), data, **RECIPE | {"epochs": 6, "lr": 1.0})
        return RNP.parse(OPTIONS | {"unlearn_steps": 12, "unlearn_stop": 0.0}).run(task)

    whole = run(None)
    fuse = Fuse(steps)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=fuse)
    assert fuse.started[-1] == ("unlearn" if steps == 6 else "recover")
    resumed = run(tmp_path)
    assert resumed.findings == whole.findings
    assert are_equal(weights_of(resumed.model), weights_of(whole.model))
