"""Neural Cleanse: who is flagged, what is stamped, and the whole method on a small backdoored model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backdoored import TARGET, Watched, accuracies, suspect_model, task_of, trusted_data
from torch import Tensor
from toys import are_equal, toy_recipe, weights_of

from bdbench.defenses.base import Defended
from bdbench.defenses.parts.inversion import Stamp, smallest_p
from bdbench.defenses.parts.triggers import Found
from bdbench.defenses.repair.ft import FineTuning
from bdbench.defenses.repair.neural_cleanse import NeuralCleanse, among_none, stamped
from bdbench.errors import OptionError
from bdbench.seeds import generator, scoped

QUICK: dict[str, Any] = {"inversion_epochs": 20, "inversion_batch_size": 32, "inversion_cost": 0.1}
"""A budget that finds a 3x3 patch in 8x8 pixels."""
TOLD: dict[str, Any] = {**QUICK, "oracle_target": TARGET, "inversion_epochs": 5}


def gray(value: float) -> Stamp:
    """A trigger that makes an image gray."""
    return Stamp(torch.zeros(1, 8, 8), torch.full((3, 8, 8), value))


def found_of(sizes: list[float], success: list[float] | None = None, classes: list[int] | None = None) -> Found:
    stamps = [gray(place / 10) for place in range(len(sizes))]
    success = success or [1.0] * len(sizes)
    return Found(torch.tensor(classes or range(len(sizes))), torch.tensor(sizes), torch.tensor(success), stamps)


def flag(found: Found, **options: Any) -> tuple[list[int], dict[str, Any]]:
    return NeuralCleanse.parse(options).flag(found)


def defend(options: dict[str, Any], **recipe: Any) -> Defended:
    return NeuralCleanse.parse(options).run(task_of(**({"epochs": 2, "lr": 0.01} | recipe)))


# who is flagged


def test_a_class_is_flagged_by_an_index_above_2() -> None:
    # the median is 12, distances 8, 2, 0, 1, 2, their median 2: 8 / (1.4826 * 2) = 2.698
    sizes = [14.0, 10.0, 12.0, 4.0, 13.0]
    places, findings = flag(found_of(sizes))
    assert places == [3]
    assert findings.pop("smallest_p") == pytest.approx(smallest_p(torch.tensor(sizes)))
    assert findings == {
        "said": "unlearns the trigger of class 3: anomaly index 2.7", "unchanged": False, "flagged": [3],
        "classes": [0, 1, 2, 3, 4], "sizes": sizes, "success": [1, 1, 1, 1, 1], "anomaly": [0, 0.6745, 0, 2.698, 0],
    }  # fmt: skip


def test_several_classes_may_be_flagged() -> None:
    places, findings = flag(found_of([14.0, 3.0, 12.0, 4.0, 13.0, 12.0, 13.0]))
    assert places == findings["flagged"] == [1, 3]
    assert findings["said"] == "unlearns the trigger of classes 1 and 3: anomaly index 6.1 and 5.4"


def test_where_none_is_flagged_the_reason_is_told() -> None:
    places, findings = flag(found_of([14.0, 10.0, 12.0, 4.0, 13.0]), anomaly_threshold=2.7)
    assert (places, findings["unchanged"], findings["flagged"]) == ([], True, [])
    assert findings["said"] == (
        "no class is flagged: the smallest trigger, of class 3, has an anomaly index of 2.7 (limit 2.7); model "
        "unchanged"
    )


def test_where_all_sizes_but_one_are_equal_the_index_is_infinite() -> None:
    places, findings = flag(found_of([64.0, 64.0, 5.0, 64.0]))
    assert places == [2]
    assert findings["anomaly"] == [0, 0, None, 0]


def test_a_small_trigger_that_does_not_work_is_not_flagged_and_does_not_move_the_median() -> None:
    places, findings = flag(found_of([14.0, 10.0, 12.0, 4.0, 13.0, 1.0], [1, 1, 1, 1, 1, 0.89]))
    assert places == [3]
    # as large as the largest: median 12.5, distances 1.5, 2.5, 0.5, 8.5, 0.5, 1.5
    assert findings["anomaly"][3] == pytest.approx(8.5 / (1.4826 * 1.5), abs=1e-3)
    assert findings["anomaly"][5] == 0


def test_where_no_trigger_works_the_inversion_has_failed() -> None:
    for options in ({}, {"oracle_target": 1}, {"anomaly_threshold": 0}):
        places, findings = flag(found_of([4.0, 64.0, 70.0], [0.89, 0.0, 0.5]), **options)
        assert places == []
        assert findings["said"].startswith("inversion failed: no trigger turns 90% ")


def test_a_class_that_is_told_needs_no_anomaly() -> None:
    places, findings = flag(found_of([60.0], classes=[2]), oracle_target=2)
    assert (places, findings["flagged"], findings["said"]) == ([0], [2], "unlearns the trigger of class 2, as told")


def test_of_two_classes_the_target_has_to_be_told() -> None:
    two = trusted_data().take(trusted_data().labels < 2)
    two = type(two)(two.images, two.labels, ("ant", "bee"))
    with pytest.raises(OptionError, match="among 2 classes none can stand out: Neural Cleanse infers"):
        NeuralCleanse().run(task_of(trusted=two))


# what is stamped


def drawn(triggers: list[Stamp], share: float, count: int = 4000) -> Tensor:
    """The first value of each of so many black images that are stamped."""
    images = torch.zeros(count, 3, 8, 8)
    with scoped(0, "stamps"):
        return stamped(images, among_none(triggers, images.device), share)[:, 0, 0, 0]


def test_a_share_of_the_images_carries_each_of_two_triggers_and_the_rest_none() -> None:
    values = drawn([gray(0.5), gray(1.0)], 0.2)
    shares = [(values == value).double().mean().item() for value in (0.5, 1.0, 0.0)]
    # four deviations of a share of 4000
    assert shares == pytest.approx([0.2, 0.2, 0.6], abs=0.032)


def test_shares_that_are_more_than_all_become_equal_parts() -> None:
    values = drawn([gray(0.2), gray(0.5), gray(1.0)], 0.6)
    assert [(values == value).double().mean().item() for value in (0.2, 0.5, 1.0)] == pytest.approx(
        [1 / 3] * 3, abs=0.03
    )


@pytest.mark.parametrize(("share", "value"), [(0.0, 0.0), (1.0, 0.5)])
def test_none_or_all_are_stamped(share: float, value: float) -> None:
    assert (drawn([gray(0.5)], share) == value).all()


def test_an_image_without_a_trigger_keeps_its_bits() -> None:
    images = torch.rand(50, 3, 8, 8, generator=generator(0, "images"))
    assert torch.equal(stamped(images, among_none([gray(0.5)], images.device), 0.0), images)


# the whole method


@pytest.fixture(scope="module")
def cleansed() -> Defended:
    """Untold, on the backdoored model."""
    return defend({**QUICK, "anomaly_threshold": 1.0}, epochs=20, lr=0.05)


def test_the_target_is_flagged_and_its_trigger_unlearned(cleansed: Defended) -> None:
    assert cleansed.findings["flagged"] == [TARGET]
    right, taken = accuracies(cleansed.model)
    assert right >= 0.95
    assert taken <= 0.2


def test_the_model_that_was_trained_is_the_one_that_is_returned(cleansed: Defended) -> None:
    """BackdoorBench trains one copy of the suspect and returns another one."""
    assert not are_equal(weights_of(cleansed.model), weights_of(suspect_model()))
    assert not cleansed.model.training


def test_without_a_flag_the_suspect_comes_back_bit_for_bit() -> None:
    suspect = suspect_model()
    result = NeuralCleanse.parse({**QUICK, "anomaly_threshold": 1e9}).run(task_of(suspect=suspect))
    assert result.findings["unchanged"]
    assert result.model is suspect
    assert are_equal(weights_of(result.model), weights_of(suspect_model()))


class Renamed(Watched):
    """An engine for which fine-tuning is an unlearning: both draw from the same streams."""

    def fit(self, *given: Any, phase: str, **settings: Any) -> Any:
        return super().fit(*given, phase="unlearn" if phase == "tune" else phase, **settings)


def test_stamping_nothing_is_fine_tuning() -> None:
    recipe = {"epochs": 2, "lr": 0.01, "augment": "flip"}
    nothing, everything = (
        NeuralCleanse.parse({**TOLD, "stamp_share": share}).run(task_of(**recipe)).model for share in (0.0, 1.0)
    )
    tuned = FineTuning().run(task_of(Renamed(), **recipe)).model
    assert are_equal(weights_of(nothing), weights_of(tuned))
    assert not are_equal(weights_of(everything), weights_of(tuned))


def test_stamped_images_keep_their_labels_and_are_the_trusted_ones() -> None:
    """Two draws of trusted images would need twice as many as the other repairs have."""
    engine = Watched()
    seen: list[Tensor] = []
    cross_entropy = F.cross_entropy

    def watched(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        seen.append(labels.clone())
        return cross_entropy(logits, labels, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdbench.defenses.repair.neural_cleanse.F.cross_entropy", watched)
        options = {**TOLD, "stamp_share": 1.0}
        NeuralCleanse.parse(options).run(task_of(engine, epochs=1, batch_size=32))
    assert engine.data["unlearn"] is engine.data[f"invert-{TARGET}"]
    assert engine.data["unlearn"].fingerprint == trusted_data().fingerprint
    assert seen[-1].bincount().tolist() == trusted_data().labels.bincount().tolist()


def test_an_unlearning_is_a_recipe_of_its_own() -> None:
    engine = Watched()
    NeuralCleanse.parse(TOLD).run(task_of(engine, epochs=3, batch_size=16, lr=0.02))
    assert engine.recipes["unlearn"] == toy_recipe(epochs=3, lr=0.02, schedule="constant", nesterov=False)
    assert (engine.recipes["invert-1"].epochs, engine.recipes["invert-1"].lr) == (5, 0.1)
