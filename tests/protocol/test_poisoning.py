"""Who is poisoned, how labels change, and what stays apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import attack_of, toy_data, toy_lab, toy_source

from bdbench.attacks.badnets import BadNets
from bdbench.attacks.base import Attack
from bdbench.attacks.sig import Sig
from bdbench.attacks.tact import TaCT
from bdbench.data import PoisonedDataset, Role, SourceData
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import choose_poisoned, eligible_for_test, idle_options, poison_source, wanted_labels
from bdbench.seeds import generator

LABELS = torch.arange(120) % 4


def poison(trusted: float = 0.0, seed: int = 0, **options: Any) -> PoisonedDataset:
    return poison_source(toy_source(), BadNets.parse(options), toy_lab(seed), trusted)


def chosen(seed: int = 0, **options: Any) -> Tensor:
    return choose_poisoned(LABELS, BadNets.parse(options), generator(seed, "poison", "choose"))


# counts


@pytest.mark.parametrize(("rate", "count"), [(0.1, 12), (0.004, 0), (0.0042, 1), (0.013, 2), (1.0, 120)])
def test_a_rate_counts_from_all_samples_and_is_rounded(rate: float, count: int) -> None:
    # 0.004 * 120 = 0.48 -> 0; 0.0042 * 120 = 0.504 -> 1; 0.013 * 120 = 1.56 -> 2
    if count == 0:
        with pytest.raises(OptionError, match=r"rate 0\.004 of 120 images is 0\.48 images; use at least 0\.0083"):
            chosen(rate=rate)
    else:
        assert len(chosen(rate=rate)) == count


@pytest.mark.parametrize("attack", [BadNets, Sig, TaCT])
def test_a_rate_of_0_poisons_nothing_and_still_triggers_test_images(attack: type[Attack]) -> None:
    source = toy_source()
    found = poison_source(source, attack.parse({"rate": 0}), toy_lab(0), 0)
    assert (found.roles == Role.CLEAN).all()
    assert torch.equal(found.visible.images, source.train.images)
    assert len(found.triggered) > 0
    assert not torch.equal(found.triggered.images, source.test.images[found.triggered_rows])


def test_a_class_rate_counts_from_the_target_class() -> None:
    assert len(chosen(class_rate=0.5)) == 15
    with pytest.raises(OptionError, match=r"class_rate 0\.01 of 30 images is 0\.3 images; use at least 0\.033"):
        chosen(class_rate=0.01)


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        ({"labels": "clean", "target": 2}, "target class 2, which has none; choose another --target"),
        ({"labels": "clean", "target": 2, "class_rate": 0.5, "rate": None}, "choose another --target"),
        ({"labels": "source-specific", "source": 2, "target": 0}, "source class 2 has none; choose another --source"),
    ],
)
def test_a_class_without_images_is_named_with_the_flag_that_chooses_it(options: dict[str, Any], way_out: str) -> None:
    labels = torch.tensor([0, 1] * 20)
    with pytest.raises(OptionError, match=way_out):
        choose_poisoned(labels, BadNets.parse(options), generator(0, "poison", "choose"))


def test_more_than_a_class_has_names_both_ways_out() -> None:
    with pytest.raises(OptionError, match="only 30 are eligible; lower it or choose another --target"):
        chosen(rate=0.5, labels="clean")


def test_covers_of_two_classes_are_refused_with_the_flag_that_goes_without() -> None:
    two = toy_data(120).take(torch.nonzero(toy_data(120).labels < 2).flatten())
    source = SourceData("toy", two, two, "none")
    with pytest.raises(OptionError, match="pass --cover-ratio 0"):
        poison_source(source, TaCT.parse({"rate": 0.1}), toy_lab(0), 0)


def test_rows_are_drawn_once_each_and_sorted() -> None:
    rows = chosen(rate=0.5)
    assert torch.equal(rows, rows.unique())


def test_all_classes_are_drawn_from_unless_told_otherwise() -> None:
    assert LABELS[chosen(rate=0.5)].unique().tolist() == [0, 1, 2, 3]


def test_the_target_class_can_be_left_out() -> None:
    rows = chosen(rate=0.75, exclude_target=True, target=2)
    assert len(rows) == 90
    assert 2 not in LABELS[rows]


def test_clean_labels_draw_from_the_target_class_alone() -> None:
    rows = chosen(rate=0.1, labels="clean", target=3)
    assert len(rows) == 12
    assert LABELS[rows].unique().tolist() == [3]


def test_the_whole_target_class_may_be_taken() -> None:
    assert torch.equal(chosen(class_rate=1.0, labels="clean"), torch.arange(0, 120, 4))


@pytest.mark.parametrize(
    ("options", "asked", "eligible"),
    [({"labels": "clean", "rate": 0.5}, 60, 30), ({"exclude_target": True, "rate": 0.8}, 96, 90)],
)
def test_more_than_are_eligible_is_refused(options: dict[str, Any], asked: int, eligible: int) -> None:
    message = rf"rate 0\.\d asks for {asked} samples, only {eligible} are eligible; lower it"
    with pytest.raises(OptionError, match=message):
        chosen(**options)


def test_another_seed_draws_other_rows() -> None:
    assert torch.equal(chosen(seed=0), chosen(seed=0))
    assert not torch.equal(chosen(seed=0), chosen(seed=1))


def test_samples_are_drawn_evenly() -> None:
    drawn = torch.zeros(120)
    for seed in range(200):
        drawn[chosen(rate=0.1, seed=seed)] += 1
    # each row is drawn 20 times on average, with a deviation of 4.2
    assert drawn.sum() == 200 * 12
    assert drawn.min() > 3
    assert drawn.max() < 40


# labels


def test_all_to_one_relabels_to_the_target() -> None:
    poisoned = poison(target=2)
    assert (poisoned.visible.labels[poisoned.roles == Role.POISON] == 2).all()


def test_all_to_all_relabels_to_the_next_class_and_the_last_to_the_first() -> None:
    attack = BadNets(labels="all-to-all")
    assert wanted_labels(torch.tensor([0, 1, 2, 3]), attack, 4).tolist() == [1, 2, 3, 0]


def test_the_attacker_wants_the_target_of_clean_label_attacks_too() -> None:
    assert wanted_labels(torch.tensor([0, 1]), Sig(target=3), 4).tolist() == [3, 3]


def test_labels_of_others_stay() -> None:
    poisoned = poison()
    clean = poisoned.roles == Role.CLEAN
    assert torch.equal(poisoned.visible.labels[clean], poisoned.clean_labels[clean])


def test_poisoned_samples_of_the_target_class_count_as_poison() -> None:
    poisoned = poison(rate=0.5)
    chosen_labels = poisoned.clean_labels[poisoned.roles == Role.POISON]
    assert len(chosen_labels) == 60
    assert (chosen_labels == 0).any()


def test_a_target_that_is_no_class_is_refused() -> None:
    with pytest.raises(OptionError, match=r"target 4 does not exist: the classes are 0\.\.3"):
        poison(target=4)


# rows


def test_every_training_row_knows_its_source() -> None:
    poisoned, source = poison(trusted=0.25), toy_source()
    clean = poisoned.roles == Role.CLEAN
    assert torch.equal(poisoned.visible.images[clean], source.train.images[poisoned.source_rows[clean]])
    assert torch.equal(poisoned.clean_labels, source.train.labels[poisoned.source_rows])


def test_training_and_trusted_rows_share_no_image_and_lose_none() -> None:
    poisoned, source = poison(trusted=0.25), toy_source()
    assert (len(poisoned.visible), len(poisoned.trusted)) == (90, 30)
    kept = set(poisoned.source_rows.tolist())
    trusted = {
        int(row)
        for image in poisoned.trusted.images
        for row in torch.nonzero((source.train.images == image).flatten(1).all(1)).flatten()
    }
    assert not kept & trusted
    assert kept | trusted == set(range(120))


def test_trusted_images_are_clean_and_truly_labelled() -> None:
    poisoned, source = poison(trusted=0.25, rate=1.0), toy_source()
    pairs = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(source.train.images, source.train.labels, strict=True)
    }
    for image, label in zip(poisoned.trusted.images, poisoned.trusted.labels, strict=True):
        assert (image.numpy().tobytes(), int(label)) in pairs


def test_the_rate_counts_from_what_remains_for_training() -> None:
    assert int((poison(trusted=0.25, rate=0.1).roles == Role.POISON).sum()) == 9


def test_no_trusted_images_leave_all_for_training() -> None:
    poisoned = poison(trusted=0)
    assert (len(poisoned.visible), len(poisoned.trusted)) == (120, 0)
    assert torch.equal(poisoned.source_rows, torch.arange(120))


def test_the_rate_does_not_change_which_images_are_trusted() -> None:
    assert poison(trusted=0.1, rate=0.1).trusted.fingerprint == poison(trusted=0.1, rate=0.5).trusted.fingerprint


def test_roles_are_clean_or_poison_where_there_are_no_covers() -> None:
    poisoned = poison()
    assert poisoned.roles.dtype == torch.uint8
    assert poisoned.roles.bincount().tolist() == [108, 12]


# test images


def test_the_clean_test_set_is_untouched_and_whole() -> None:
    assert poison().test.fingerprint == toy_source().test.fingerprint


@pytest.mark.parametrize("target", [0, 3])
def test_triggered_test_set_leaves_out_the_target_class(target: int) -> None:
    poisoned = poison(target=target)
    assert len(poisoned.triggered) == 30
    assert target not in poisoned.test.labels[poisoned.triggered_rows]
    assert (poisoned.triggered.labels == target).all()


def test_all_to_all_triggers_all_test_images() -> None:
    poisoned = poison(labels="all-to-all")
    assert torch.equal(poisoned.triggered_rows, torch.arange(40))
    assert torch.equal(poisoned.triggered.labels, (poisoned.test.labels + 1) % 4)


def test_triggered_images_are_their_test_images_but_for_the_patch() -> None:
    poisoned = poison()
    differing = poisoned.triggered.images != poisoned.test.images[poisoned.triggered_rows]
    assert differing.flatten(1).any(1).all()
    assert not differing[..., :5, :].any()
    assert not differing[..., :5].any()


def test_eligible_rows_by_hand() -> None:
    labels = torch.tensor([0, 1, 0, 2])
    assert eligible_for_test(labels, BadNets(target=0)).tolist() == [1, 3]
    assert eligible_for_test(labels, BadNets(labels="all-to-all")).tolist() == [0, 1, 2, 3]


def test_a_test_split_of_the_target_class_alone_is_refused() -> None:
    alone = toy_data(8).take(torch.tensor([0, 4]))
    source = SourceData("toy", toy_data(120), alone, "none")
    with pytest.raises(OptionError, match="no test image is eligible for all-to-one labels with target 0"):
        poison_source(source, BadNets(), toy_lab(0), 0)


@pytest.mark.parametrize(
    ("name", "options", "idle"),
    [
        ("badnets", {}, {"source", "cover_ratio"}),
        ("badnets", {"labels": "all-to-all"}, {"source", "target", "exclude_target", "cover_ratio"}),
        ("badnets", {"labels": "source-specific", "cover_ratio": 0.5}, {"exclude_target"}),
        ("sig", {"cover_ratio": 1.0}, {"source", "exclude_target"}),
    ],
)  # fmt: skip
def test_options_that_have_no_effect_are_known(name: str, options: dict[str, Any], idle: set[str]) -> None:
    given = attack_of(name, **options).model_dump()
    assert {option for option in idle_options(given) if given[option] is not None} == idle
    assert idle_options({"epochs": 3, "cover_ratio_of_another_kind": 0}) == set()
