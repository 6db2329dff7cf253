"""MCLDef: the contrast, the decision, and the whole method on a small backdoored model."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backdoored import CHECKER, TARGET, Watched, accuracies, backdoored_weights, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import Fuse, are_equal, toy_batch, toy_data, toy_engine, toy_model, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts import inversion
from bdbench.defenses.parts import triggers as parts
from bdbench.defenses.parts.inversion import Stamp, Triggers, smallest_p
from bdbench.defenses.parts.triggers import Found, invert_together, pulled
from bdbench.defenses.repair.mcldef import MCLDef, contrast
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.progress import Silent
from bdbench.seeds import generator, scoped

FORMS: dict[str, dict[str, Any]] = {
    "mask": {"form": "mask", "inversion_lr": 0.1, "inversion_cost": 0.1, "inversion_epochs": 20},
    "pixel": {"form": "pixel", "inversion_lr": 0.2, "inversion_cost": 0.01, "inversion_epochs": 30},
}
"""Budgets that find a 3x3 patch in 8x8 pixels."""

QUICK: dict[str, Any] = {"form": "mask", "oracle_target": TARGET, "inversion_lr": 0.1, "inversion_epochs": 3}
"""A trigger that works, if not a small one."""

every_form = pytest.mark.parametrize("form", sorted(FORMS))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=torch.float64)


def true_stamp() -> Stamp:
    """The patch as a trigger."""
    keep, add = torch.ones(1, 8, 8), torch.zeros(3, 8, 8)
    keep[:, 5:, 5:] = 0
    add[:, 5:, 5:] = CHECKER / 255
    return Stamp(keep, add)


def defend(task: Task | None = None, **options: Any) -> Defended:
    """Run the method for a tenth of a second."""
    task = task or task_of(epochs=1)
    return MCLDef.parse({"inversion_batch_size": 32, "significance": 1.0} | options).run(task)


# the contrast


def test_equal_positive_and_negative_give_ln_2_and_no_gradient() -> None:
    anchor, both = noise(5, 4).requires_grad_(), noise(5, 4, seed=1)
    loss = contrast(anchor, both, both, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert anchor.grad is not None
    assert anchor.grad.abs().max() < 1e-15


def test_the_contrast_by_hand() -> None:
    # cosines 1 and 0, then 0 and 1: (softplus(-1 / 0.5) + softplus(1 / 0.5)) / 2
    anchor = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    positive, negative = torch.tensor([[5.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert contrast(anchor, positive, negative, 0.5).item() == pytest.approx(expected)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_contrast_is_the_cross_entropy_of_choosing_the_positive(tau: float) -> None:
    anchor, positive, negative = noise(6, 4), noise(6, 4, seed=1), noise(6, 4, seed=2)
    cosines = [F.cosine_similarity(anchor, other) for other in (positive, negative)]
    expected = F.cross_entropy(torch.stack(cosines, 1) / tau, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(contrast(anchor, positive, negative, tau), expected)


def test_swapping_positive_and_negative_adds_the_difference_over_tau() -> None:
    anchor, one, other = noise(6, 4), noise(6, 4, seed=1), noise(6, 4, seed=2)
    difference = (F.cosine_similarity(anchor, one) - F.cosine_similarity(anchor, other)).mean()
    found = contrast(anchor, one, other, 0.5) - contrast(anchor, other, one, 0.5)
    torch.testing.assert_close(found, -difference / 0.5)


def test_a_step_down_the_contrast_goes_to_the_positive_and_away_from_the_negative() -> None:
    anchor, positive, negative = noise(6, 4).requires_grad_(), noise(6, 4, seed=1), noise(6, 4, seed=2)
    contrast(anchor, positive, negative, 0.5).backward()
    assert anchor.grad is not None
    moved = (anchor - 0.1 * anchor.grad).detach()
    gain = F.cosine_similarity(moved, positive) - F.cosine_similarity(moved, negative)
    assert (gain > F.cosine_similarity(anchor, positive) - F.cosine_similarity(anchor, negative)).all()


def test_the_contrast_has_the_gradient_of_its_formula() -> None:
    positive, negative = noise(3, 4, seed=1), noise(3, 4, seed=2)
    assert torch.autograd.gradcheck(
        lambda anchor: contrast(anchor, positive, negative, 0.5), noise(3, 4).requires_grad_()
    )


def test_extreme_cosines_at_a_tiny_temperature_stay_finite() -> None:
    anchor = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = contrast(anchor, -anchor.detach(), anchor.detach(), 1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(2000)
    assert anchor.grad is not None
    assert anchor.grad.isfinite().all()


def test_before_the_first_step_the_negative_is_the_anchor() -> None:
    """The model that is tuned and the one it began as agree: softplus((1 - cos(z, z+)) / tau), at least ln 2."""
    model, batch = suspect_model(), toy_batch(trusted_data())
    with torch.no_grad():
        stamped, clean = model.embed(true_stamp()(batch.images)), model.embed(batch.images)
        found = contrast(stamped, clean, stamped, 0.5)
        expected = F.softplus((1 - F.cosine_similarity(stamped, clean)) / 0.5).mean()
    torch.testing.assert_close(found, expected)
    assert found > math.log(2)


# the decision


def found_of(sizes: list[float], success: list[float] | None = None, classes: list[int] | None = None) -> Found:
    count = len(sizes)
    stamps = [Stamp(torch.ones(1, 8, 8), torch.full((3, 8, 8), float(place))) for place in range(count)]
    return Found(
        torch.tensor(classes or range(count)), torch.tensor(sizes), torch.tensor(success or [1.0] * count), stamps
    )


def decide(found: Found, **options: Any) -> tuple[int | None, dict[str, Any]]:
    return MCLDef.parse(options)._decide(found)


def test_the_smallest_trigger_is_the_targets() -> None:
    # the median is 12, distances 8, 2, 0, 1, 2, their median 2: 8 / (1.4826 * 2) = 2.698
    target, findings = decide(found_of([14.0, 10.0, 12.0, 4.0, 13.0]))
    assert target == 3
    assert findings.pop("p") == pytest.approx(smallest_p(torch.tensor([14.0, 10.0, 12.0, 4.0, 13.0])))
    assert findings == {
        "said": "target class 3 inferred, p-value 0.016", "unchanged": False, "target": 3, "classes": [0, 1, 2, 3, 4],
        "sizes": [14, 10, 12, 4, 13], "success": [1, 1, 1, 1, 1], "anomaly": [0, 0.6745, 0, 2.698, 0],
    }  # fmt: skip


def test_the_p_value_of_the_target_may_be_the_limit_but_not_above() -> None:
    found = found_of([14.0, 10.0, 12.0, 4.0, 13.0])
    p = decide(found)[1]["p"]
    assert decide(found, significance=p)[0] == 3
    assert decide(found, significance=0.999 * p)[0] is None
    assert decide(found_of([64.0, 64.0, 64.0]), significance=0.999)[0] is None


def test_when_no_class_stands_out_the_reason_is_told() -> None:
    target, findings = decide(found_of([14.0, 10.0, 12.0, 4.0, 13.0]), significance=0.01)
    assert target is None
    assert (findings["target"], findings["unchanged"]) == (None, True)
    assert findings["said"] == (
        "no class stands out: the smallest trigger, of class 3, has a p-value of 0.016 (limit 0.01); model unchanged"
    )


def test_a_small_trigger_that_does_not_work_is_not_the_targets() -> None:
    sizes, success = [14.0, 10.0, 12.0, 4.0, 1.0], [1.0, 1.0, 1.0, 0.9, 0.89]
    assert decide(found_of(sizes, success))[0] == 3


def test_where_one_trigger_works_the_others_count_as_the_whole_image() -> None:
    assert decide(found_of([4.0, 9.0, 1.0, 2.0, 3.0], [1.0, 0.5, 0.5, 0.5, 0.5]))[0] == 0


def test_a_trigger_that_does_not_work_counts_as_the_largest_that_does() -> None:
    # 64 pixels thrice: all distances but two are 0
    target, findings = decide(found_of([4.0, 64.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.5, 0.5, 0.5]))
    assert target == 0
    assert findings["sizes"] == [4, 64, 1, 2, 3]
    assert findings["anomaly"] == [None, 0, 0, 0, 0]  # infinite
    assert findings["p"] == 0


def test_when_no_trigger_works_the_inversion_has_failed() -> None:
    for options in ({}, {"oracle_target": 1}, {"significance": 1}):
        target, findings = decide(found_of([4.0, 64.0], [0.89, 0.0]), **options)
        assert target is None
        assert (findings["target"], findings["unchanged"]) == (None, True)
        assert findings["said"] == (
            "inversion failed: no trigger turns 90% of the trusted images to a class; model unchanged"
        )


def test_a_target_that_is_told_needs_no_anomaly() -> None:
    place, findings = decide(found_of([60.0], classes=[2]), oracle_target=2, significance=1e-9)
    assert place == 0
    assert (findings["said"], findings["target"]) == ("target class 2 as told", 2)


def test_groups_of_classes_are_joined_in_order() -> None:
    joined = Found.join([found_of([1.0, 2.0]), found_of([3.0], [0.5], [2])])
    assert joined.classes.tolist() == [0, 1, 2]
    assert joined.sizes.tolist() == [1, 2, 3]
    assert joined.success.tolist() == [1, 1, 0.5]
    assert [stamp.add[0, 0, 0].item() for stamp in joined.stamps] == [0, 1, 0]


# the whole method on a backdoored model


class Walk(NamedTuple):
    """A run on the backdoored model."""

    engine: Watched
    suspect: Classifier
    defended: Defended


@cache
def walk(form: str) -> Walk:
    engine, suspect = Watched(), suspect_model()
    return Walk(engine, suspect, defend(task_of(engine, suspect=suspect), **FORMS[form]))


def test_the_model_under_test_is_backdoored() -> None:
    right, taken = accuracies(suspect_model())
    assert right >= 0.95
    assert taken >= 0.95


@every_form
def test_the_targets_trigger_is_the_smallest_and_works(form: str) -> None:
    findings = walk(form).defended.findings
    sizes = findings["sizes"]
    assert findings["target"] == sizes.index(min(sizes)) == TARGET
    assert findings["success"][TARGET] >= 0.9
    assert findings["anomaly"][TARGET] > 1
    assert findings["classes"] == [0, 1, 2, 3]
    assert not findings["unchanged"]
    assert findings["said"].startswith("target class 1 inferred, p-value ")


@every_form
def test_the_trigger_that_is_found_works_as_often_as_it_says(form: str) -> None:
    """Its success was counted while it was trained; here it is judged as it is kept, on other images."""
    model, task = suspect_model(), task_of()
    options = {"inversion_batch_size": 32, "oracle_target": TARGET} | FORMS[form]
    found = invert_together(task, model, trusted_data(), torch.tensor([TARGET]), MCLDef.parse(options).search)
    test = toy_batch(toy_data(80, seed=1))
    with torch.no_grad():
        taken = model(found.stamps[0](test.images)).argmax(1) == TARGET
    assert taken[test.labels != TARGET].double().mean() >= 0.85


@every_form
def test_the_purified_model_forgets_the_trigger_and_nothing_else(form: str) -> None:
    right, taken = accuracies(walk(form).defended.model)
    assert right >= 0.9
    assert taken <= 0.2


@every_form
def test_the_head_stays_as_it_was_and_the_features_do_not(form: str) -> None:
    before, after = backdoored_weights(), weights_of(walk(form).defended.model)
    heads = [name for name in before if name.startswith("head.")]
    assert len(heads) == 2
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert not torch.equal(before["features.layers.0.weight"], after["features.layers.0.weight"])


@every_form
def test_the_suspect_is_not_touched(form: str) -> None:
    assert are_equal(weights_of(walk(form).suspect), backdoored_weights())
    assert walk(form).defended.model is not walk(form).suspect


@every_form
def test_the_contrast_falls(form: str) -> None:
    losses = walk(form).engine.losses_of("purify")
    assert len(losses) == 20
    assert losses[0] > math.log(2)
    assert losses[-1] < math.log(2)  # stamped images are nearer to clean ones than to stamped ones of old


def test_stamped_images_come_to_look_like_clean_ones() -> None:
    model, suspect, batch = walk("mask").defended.model, suspect_model(), toy_batch(toy_data(80, seed=1))
    stamped = true_stamp()(batch.images)
    with torch.no_grad():
        to_clean = F.cosine_similarity(model.embed(stamped), suspect.embed(batch.images)).mean()
        to_stamped = F.cosine_similarity(model.embed(stamped), suspect.embed(stamped)).mean()
    assert to_clean > to_stamped


@every_form
def test_findings_are_json(form: str) -> None:
    findings = dict(walk(form).defended.findings)
    assert json.loads(json.dumps(findings, allow_nan=False)) == findings
    infinite = decide(found_of([4.0, 64.0, 64.0]))[1]
    assert json.loads(json.dumps(infinite, allow_nan=False)) == infinite


def test_the_method_scores_no_training_sample() -> None:
    assert walk("mask").defended.scores is None
    assert walk("mask").defended.set_aside is None


def test_it_needs_the_suspect_and_trusted_images_and_only_the_trusted_are_seen() -> None:
    assert MCLDef.needs_trusted
    assert MCLDef.needs_suspect
    engine = walk("mask").engine
    assert set(engine.data) == {"invert", "purify"}
    assert {data.fingerprint for data in engine.data.values()} == {trusted_data().fingerprint}
    for missing in ({"suspect": None}, {"trusted": None}):
        task = task_of()
        bare = Task(**{field: getattr(task, field) for field in task.__dataclass_fields__} | missing)
        with pytest.raises(OptionError, match="MCLDef needs the undefended model and trusted images"):
            defend(bare)


# nothing found: nothing changed


def unchanged(**options: Any) -> str:
    """Run where nothing can be found, check that nothing changed, and return what was said."""
    engine = Watched(progress=Notes())
    defended = defend(task_of(engine), **options)
    assert defended.findings["unchanged"] is True
    assert defended.findings["target"] is None
    assert are_equal(weights_of(defended.model), backdoored_weights())
    assert not defended.model.training
    assert "purify" not in engine.data
    said: str = defended.findings["said"]
    assert isinstance(engine.progress, Notes)
    assert engine.progress.lines == [said]
    json.dumps(dict(defended.findings), allow_nan=False)
    return said


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def test_a_failed_inversion_leaves_the_model_as_it_was() -> None:
    # a cost that makes every mask vanish
    said = unchanged(form="mask", inversion_epochs=12, inversion_lr=0.1, inversion_cost=1e3, inversion_keep="last")
    assert said.startswith("inversion failed: no trigger turns 90%")


def test_a_failed_inversion_of_a_target_that_was_told_leaves_the_model_as_it_was() -> None:
    options = {"inversion_epochs": 12, "inversion_lr": 0.1, "inversion_cost": 1e3, "inversion_keep": "last"}
    assert unchanged(form="mask", oracle_target=0, **options).startswith("inversion failed")


def test_a_threshold_that_nothing_reaches_leaves_the_model_as_it_was() -> None:
    said = unchanged(**FORMS["mask"] | {"significance": 1e-12})
    assert said.startswith("no class stands out: the smallest trigger, of class 1, has a p-value of ")
    assert "(limit 1e-12)" in said


# purification


def purified(trusted: ImageDataset | None = None, stamp: Stamp | None = None, **settings: Any) -> dict[str, Tensor]:
    """Purify from the true trigger, or another, and return the weights."""
    recipe: dict[str, Any] = {
        name: settings.pop(name) for name in ("epochs", "batch_size", "weight_decay") if name in settings
    }
    trusted, suspect = trusted or trusted_data(), suspect_model()
    task = task_of(None, trusted, suspect, **{"epochs": 2} | recipe)
    model = MCLDef.parse(settings)._purify(task, suspect, trusted, stamp or true_stamp())
    assert are_equal(weights_of(suspect), backdoored_weights())
    return weights_of(model)


def permuted(data: ImageDataset) -> ImageDataset:
    return ImageDataset(data.images, (data.labels + 1) % 4, data.class_names)


def test_labels_of_the_trusted_images_play_no_part() -> None:
    for options in (QUICK, QUICK | {"clean_norms": True}):
        one, other = (
            defend(task_of(trusted=data, epochs=2), **options) for data in (trusted_data(), permuted(trusted_data()))
        )
        assert one.findings == other.findings
        assert not one.findings["unchanged"]
        assert are_equal(weights_of(one.model), weights_of(other.model))


def test_labels_play_a_part_if_clean_images_are_weighed() -> None:
    one, other = (purified(data, clean_weight=1.0) for data in (trusted_data(), permuted(trusted_data())))
    assert not are_equal(one, other)


def test_a_trigger_that_changes_nothing_leaves_the_weights_to_their_decay() -> None:
    """Positive and negative are equal, so the gradient is nothing."""
    nothing = Stamp(torch.ones(1, 8, 8), torch.zeros(3, 8, 8))
    after = purified(stamp=nothing, weight_decay=0.0)
    for name, value in backdoored_weights().items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def convolved(images: Tensor) -> Tensor:
    """What the suspect's batch norm sees of images: the mean of each of its channels."""
    model = suspect_model()
    with torch.no_grad():
        mean: Tensor = model.features.layers[0]((images - model.mean) / model.std).mean((0, 2, 3))  # type: ignore
    return mean


@pytest.mark.parametrize("options", [{}, {"clean_norms": True}, {"clean_weight": 1.0}])
def test_batch_norm_sees_stamped_images_and_clean_ones_only_if_told_so(options: dict[str, Any]) -> None:
    trusted = trusted_data(16)
    after = purified(trusted, epochs=1, batch_size=16, **options)["features.layers.1.running_mean"]
    clean = toy_batch(trusted).images
    seen = convolved(true_stamp()(clean))
    if options:
        seen = (seen + convolved(clean)) / 2
    # one step: a tenth of the batch's mean
    expected = 0.9 * backdoored_weights()["features.layers.1.running_mean"] + 0.1 * seen
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


def test_the_first_loss_by_hand_with_clean_images_weighed() -> None:
    trusted, suspect, engine = trusted_data(16), suspect_model(), Watched()
    batch = toy_batch(trusted)
    stamped = true_stamp()(batch.images)
    task = task_of(engine, trusted, suspect, epochs=1)
    with torch.no_grad():
        clean_D, stamped_D = suspect.embed(batch.images), suspect.embed(stamped)
        both = suspect_model().train().embed(torch.cat([stamped, batch.images]))
        cross_entropy = F.cross_entropy(suspect.classify(both[16:]), batch.labels)
        expected = contrast(both[:16], clean_D, stamped_D, 0.3) + 2 * cross_entropy
    MCLDef(tau=0.3, clean_weight=2)._purify(task, suspect, trusted, true_stamp())
    assert engine.losses_of("purify") == [pytest.approx(expected.item(), rel=1e-4)]


def test_weighing_clean_images_holds_the_head_too() -> None:
    after = purified(clean_weight=1.0)
    assert all(torch.equal(after[name], backdoored_weights()[name]) for name in ("head.weight", "head.bias"))


@pytest.mark.parametrize("options", [{"tau": 0.1}, {"clean_weight": 0.1}, {"clean_norms": True}])
def test_every_option_of_purification_changes_the_model(options: dict[str, Any]) -> None:
    assert not are_equal(purified(), purified(**options))


# inversion


def sizes_of(**options: Any) -> tuple[list[float], list[float], Watched]:
    """Sizes and success after three epochs, and the engine that saw them."""
    engine = Watched()
    chosen = MCLDef.parse({"form": "mask", "inversion_epochs": 3, "inversion_batch_size": 32} | options)
    found = invert_together(task_of(engine), suspect_model(), trusted_data(), torch.arange(4), chosen.search)
    return found.sizes.tolist(), found.success.tolist(), engine


@pytest.mark.parametrize(("form", "lr", "betas", "cost"), [
    ("mask", 0.005, (0.9, 0.999), 0.01), ("pixel", 0.1, (0.5, 0.9), 0.001),
])  # fmt: skip
def test_each_form_has_its_own_defaults(form: str, lr: float, betas: tuple[float, float], cost: float) -> None:
    engine = sizes_of(form=form)[2]
    recipe, optimizer = engine.recipes["invert"], engine.optimizers["invert"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["betas"] == betas
    assert (recipe.lr, recipe.schedule, recipe.warmup) == (lr, "constant", 0)
    assert sizes_of(form=form, inversion_lr=lr, inversion_cost=cost)[0] == sizes_of(form=form)[0]


@pytest.mark.parametrize(
    ("form", "asked", "augment"),
    [
        ("mask", "auto", "flip"),  # the first code augments
        ("pixel", "auto", "none"),  # the second one does not
        ("mask", "none", "none"),
        ("pixel", "crop", "crop"),
    ],
)
def test_purification_augments_as_the_code_of_the_form_does_unless_told(form: str, asked: str, augment: str) -> None:
    engine = Watched()
    inversion = {"inversion_lr": 0.1, "inversion_epochs": 3} if form == "mask" else {"inversion_epochs": 8}
    options = {"form": form, "oracle_target": TARGET, "purify_augment": asked, **inversion}
    result = defend(task_of(engine, epochs=1, augment="flip"), **options)
    assert not result.findings["unchanged"]
    assert engine.recipes["purify"].augment == augment


def test_an_augmentation_of_the_purification_that_does_not_exist_is_told_before_the_inversion() -> None:
    engine = Watched()
    with pytest.raises(OptionError, match="jitter"):
        defend(task_of(engine), purify_augment="jitter")
    assert not engine.recipes


def test_the_inversion_has_its_own_budget_and_no_augmentation_unless_told_so() -> None:
    recipe = sizes_of(inversion_epochs=2, inversion_batch_size=8, inversion_lr=0.3)[2].recipes["invert"]
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.augment) == (2, 8, 0.3, "none")
    assert sizes_of(inversion_augment="crop,flip")[2].recipes["invert"].augment == "crop,flip"


def test_purification_has_the_recipe_of_the_benchmark() -> None:
    engine = Watched()
    task = task_of(engine, epochs=2, augment="flip")
    defend(task, **QUICK)
    assert engine.recipes["purify"] == task.recipe
    assert engine.recipes[f"invert-{TARGET}"].augment == "none"


@pytest.mark.parametrize(
    "options",
    [
        {"form": "pixel"}, {"inversion_epochs": 4}, {"inversion_batch_size": 8}, {"inversion_lr": 0.3},
        {"inversion_cost": 0.5}, {"inversion_cost": 0.0}, {"inversion_augment": "crop"}, {"inversion_keep": "last"},
    ],
)  # fmt: skip
def test_every_option_of_the_inversion_changes_the_triggers(options: dict[str, Any]) -> None:
    base: dict[str, Any] = {"inversion_lr": 0.1}
    if "inversion_keep" in options:
        base |= {"inversion_epochs": 12, "inversion_cost": 1.0}
    assert sizes_of(**base)[0] != sizes_of(**base | options)[0]


@pytest.mark.parametrize(("form", "share"), [("mask", 0.3), ("pixel", 0.1)])
def test_patience_is_a_share_of_the_epochs(form: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    finish = Triggers.finish_epoch

    def watched(triggers: Triggers) -> bool:
        seen.append(triggers.patience)
        return finish(triggers)

    monkeypatch.setattr(Triggers, "finish_epoch", watched)
    for epochs in (1, 3, 20):
        sizes_of(form=form, inversion_epochs=epochs)
    assert set(seen[:1]) == {1}
    assert set(seen[4:]) == {round(20 * share)}


def test_the_loss_of_an_inversion_by_hand() -> None:
    """Mean cross entropy towards each class plus the cost of its mask, summed over classes."""
    engine = sizes_of(inversion_epochs=1, inversion_cost=0.5)[2]
    with scoped(0, "triggers", 0):
        triggers = inversion.MaskTriggers(torch.arange(4), (3, 8, 8), 0.5, "best")
    images, expected = toy_batch(trusted_data()).images, 0.0
    with torch.no_grad():
        for target in range(4):
            mask, pattern = triggers.mask[target], triggers.pattern[target]
            logits = suspect_model()((1 - mask) * images + mask * pattern)
            expected += F.cross_entropy(logits, torch.full((32,), target)).item() + 0.5 * mask.sum().item()
    assert engine.losses_of("invert") == [pytest.approx(expected, rel=1e-5)]


def test_masks_and_patterns_are_in_their_range_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    stamp = Triggers.stamp

    def watched(triggers: Triggers, images: Tensor) -> Tensor:
        seen.extend(parameter.detach().clone() for parameter in triggers.parameters())
        return stamp(triggers, images)

    monkeypatch.setattr(Triggers, "stamp", watched)
    sizes_of(inversion_lr=0.9, inversion_batch_size=16)
    assert len(seen) == 12  # masks and patterns in three epochs of two steps
    assert all(values.min() >= 0 and values.max() <= 1 for values in seen)


def test_success_leaves_out_images_of_the_class_itself() -> None:
    """Of a model that answers bee to all there is no image to turn to bee, and none turns to another class."""
    suspect = suspect_model()
    with torch.no_grad():
        suspect.head.weight.zero_()
        suspect.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    defended = defend(task_of(suspect=suspect), form="mask", inversion_epochs=2)
    assert defended.findings["success"] == [0, 0, 0, 0]
    assert defended.findings["unchanged"]


@every_form
def test_all_classes_together_are_inverted_as_each_alone_would_be(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = inversion.FORMS[form]

    def alike(classes: Tensor, *settings: Any) -> Triggers:
        """Triggers that begin, class for class, as those of all classes do."""
        with scoped(0, "alike"):
            whole = original(torch.arange(4), *settings)
        part = original(classes, *settings)
        for own, of_all in zip(part.parameters(), whole.parameters(), strict=True):
            own.data.copy_(of_all.data[classes])
        return part

    monkeypatch.setitem(inversion.FORMS, form, alike)
    search = MCLDef.parse(FORMS[form] | {"inversion_batch_size": 32, "inversion_epochs": 5}).search

    def invert(*classes: int) -> Found:
        return invert_together(task_of(), suspect_model(), trusted_data(), torch.tensor(classes), search)

    together, alone = invert(0, 1, 2, 3), Found.join([invert(target) for target in range(4)])
    # one batch holds all images, in another order; Adam carries the last bits of the sums on
    torch.testing.assert_close(together.sizes, alone.sizes, rtol=1e-4, atol=1e-3)
    assert together.success.tolist() == alone.success.tolist()
    for one, other in zip(together.stamps, alone.stamps, strict=True):
        torch.testing.assert_close(one.add, other.add, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.keep, other.keep, rtol=0, atol=1e-3)


def test_classes_beyond_what_fits_wait_for_the_next_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IMAGES_AT_ONCE", 3 * 32 + 1)
    engine = Watched()
    defended = defend(task_of(engine), **FORMS["mask"])
    assert list(engine.data) == ["invert-0", "invert-3", "purify"]
    assert defended.findings["classes"] == [0, 1, 2, 3]
    assert defended.findings["target"] == TARGET


def test_a_class_that_does_not_fit_is_inverted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IMAGES_AT_ONCE", 1)
    engine = Watched()
    assert defend(task_of(engine), form="mask", inversion_epochs=1).findings["classes"] == [0, 1, 2, 3]
    assert list(engine.data)[:4] == ["invert-0", "invert-1", "invert-2", "invert-3"]


# the target as told


def test_a_target_that_is_told_is_the_only_one_inverted() -> None:
    engine = Watched()
    findings = defend(task_of(engine, epochs=1), **QUICK | {"oracle_target": 2, "inversion_epochs": 10}).findings
    assert list(engine.data) == ["invert-2", "purify"]
    assert (findings["classes"], findings["target"], findings["said"]) == ([2], 2, "target class 2 as told")
    assert len(findings["sizes"]) == len(findings["success"]) == len(findings["anomaly"]) == 1


@pytest.mark.parametrize("target", [4, 99])
def test_a_target_that_does_not_exist_is_refused(target: int) -> None:
    with pytest.raises(OptionError, match=rf"oracle_target {target} does not exist: classes are 0\.\.3"):
        defend(oracle_target=target)


def test_of_two_classes_the_target_has_to_be_told() -> None:
    two = toy_data(32, classes=("ant", "bee"))
    task = task_of(epochs=1, trusted=two, suspect=toy_model(two))
    with pytest.raises(OptionError, match=r"among 2 classes none can stand out: .* at least 3; tell it with --oracle"):
        defend(task)
    assert defend(task, oracle_target=1).findings["classes"] == [1]


def test_a_negative_target_is_refused() -> None:
    with pytest.raises(OptionError, match="oracle_target -1"):
        MCLDef.parse({"oracle_target": -1})


# resume


@pytest.mark.parametrize(("form", "steps"), [("mask", 4), ("pixel", 9), ("mask", 16)])
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(form: str, steps: int, tmp_path: Path) -> None:
    """Two steps and a word an epoch: 6 epochs of inversion, then 3 of purification."""
    # a patience of one: costs and streaks change all the time
    options = FORMS[form] | {"inversion_batch_size": 16, "inversion_epochs": 6, "significance": 1.0}

    def run(folder: Path | None, progress: Silent) -> Defended:
        engine = toy_engine(folder, progress=progress)
        return defend(task_of(engine, epochs=3, augment="flip"), **options, inversion_augment="flip")

    whole = run(None, Silent())
    assert not whole.findings["unchanged"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fuse(steps))
    assert list(tmp_path.iterdir())
    resumed = run(tmp_path, Silent())
    assert resumed.findings == whole.findings
    assert are_equal(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_success_is_counted_over_the_images_that_were_not_of_the_class(
    monkeypatch: pytest.MonkeyPatch, augment: str
) -> None:
    tried: list[Tensor] = []
    finish = Triggers.finish_epoch

    def finish_epoch(triggers: Triggers) -> bool:
        tried.append(triggers.tries.clone())
        return finish(triggers)

    monkeypatch.setattr(Triggers, "finish_epoch", finish_epoch)
    trusted = trusted_data(30)
    defend(task_of(trusted=trusted), inversion_epochs=2, form="mask", inversion_augment=augment)
    predicted = toy_engine().logits(suspect_model(), trusted.images).argmax(1)
    others = torch.tensor([float((predicted != label).sum()) for label in range(trusted.num_classes)])
    assert len(set(others.tolist())) > 1
    if augment == "none":
        assert all(torch.equal(tries, others) for tries in tried)
    else:  # a flipped image may be called something else
        assert all((tries > 0).all() for tries in tried)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_classes_that_go_through_the_network_apart_pull_as_all_together(at_once: int) -> None:
    data = toy_data(6, classes=tuple("abc"))
    suspect = frozen(toy_model(data))
    stamped = torch.rand(3, 6, *data.image_shape, generator=generator(0, "stamped")).requires_grad_()
    wanted, weights = torch.arange(3), torch.tensor([1.0, 2.0, 3.0])
    losses, answers = pulled(suspect, stamped, wanted, at_once)
    (found,) = torch.autograd.grad((losses * weights).sum(), stamped)
    logits = suspect(stamped.flatten(0, 1))
    each = F.cross_entropy(logits, wanted.repeat_interleave(6), reduction="none").view(3, 6).mean(1)
    (expected,) = torch.autograd.grad((each * weights).sum(), stamped)
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(found, expected)
    assert torch.equal(answers, logits.argmax(1).view(3, 6))
