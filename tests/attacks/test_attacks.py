"""Rules that every registered attack keeps; each trigger against its formula is in a file of its own."""

from __future__ import annotations

import inspect
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import ATTACK_NAMES, TOY_ATTACKS, toy_attack, toy_data, toy_lab, toy_source

from bdbench.attacks import base
from bdbench.attacks.badnets import BadNets
from bdbench.attacks.base import Attack, Occasion, State, TrainingAttack, Use
from bdbench.attacks.parts.surrogates import SurrogateAttack
from bdbench.data import ImageDataset, PoisonedDataset, Role
from bdbench.errors import OptionError
from bdbench.options import describe_options
from bdbench.protocol.poisoning import poison_source, wanted_labels
from bdbench.registry import ATTACKS
from bdbench.seeds import addressed

USES: tuple[Use, ...] = ("poison", "cover", "test")
every_attack = pytest.mark.parametrize("name", ATTACK_NAMES)


@cache
def fitted(name: str, side: int = 8) -> tuple[Attack, ImageDataset, State]:
    """Return an attack, 48 images and what it has made of them."""
    attack, data = toy_attack(name), toy_data(48, 3, side)
    return attack, data, attack.fit(data, toy_lab())


@cache
def poisoned(name: str, **options: Any) -> PoisonedDataset:
    return poison_source(toy_source(), toy_attack(name, **options), toy_lab(), trusted=0.1)


@every_attack
@pytest.mark.parametrize("side", [8, 33])
def test_images_do_not_depend_on_the_batch_they_are_triggered_in(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, data, state = fitted(name, side)
    rows = torch.tensor([3, 40, 17, 8, 21, 30, 5, 44])
    for use in USES:
        at_once = attack.trigger(data, rows, state, use, 0)
        for start, stop in ((0, 1), (1, 6), (6, 8)):
            assert torch.equal(attack.trigger(data, rows[start:stop], state, use, 0), at_once[start:stop])
        assert torch.equal(attack.trigger(data, rows.flip(0), state, use, 0).flip(0), at_once)
        monkeypatch.setattr(base, "CHUNK", 3)
        assert torch.equal(attack.trigger(data, rows, state, use, 0), at_once)
        monkeypatch.undo()


@every_attack
def test_triggering_changes_copies_only(name: str) -> None:
    attack, data, state = fitted(name)
    before = data.images.clone()
    assert not torch.equal(attack.trigger(data, torch.arange(48), state, "test", 0), before)
    assert torch.equal(data.images, before)


@every_attack
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 12, 20)])
def test_any_image_shape_goes_in_and_comes_out_as_bytes(name: str, shape: tuple[int, int, int]) -> None:
    attack, data = toy_attack(name), toy_data(32, *shape)
    state, rows = attack.fit(data, toy_lab()), torch.arange(4)
    for use in USES:
        changed = attack.trigger(data, rows, state, use, 0)
        assert changed.shape == (4, *shape)
        assert changed.dtype == torch.uint8
        assert not torch.equal(changed, data.images[rows])


@every_attack
def test_large_photographs_can_be_triggered(name: str) -> None:
    if issubclass(ATTACKS.load(name), (SurrogateAttack, TrainingAttack)):
        pytest.skip("trains a network on them")
    attack, data = toy_attack(name), toy_data(8, 3, 224, 224)
    changed = attack.trigger(data, torch.arange(2), attack.fit(data, toy_lab()), "test", 0)
    assert not torch.equal(changed, data.images[:2])


@every_attack
def test_no_images_are_triggered_to_no_images(name: str) -> None:
    attack, data, state = fitted(name)
    assert attack.trigger(data, torch.arange(0), state, "cover", 0).shape == (0, 3, 8, 8)


@every_attack
def test_only_chosen_rows_change(name: str) -> None:
    made = poisoned(name)
    clean = toy_source().train.take(made.source_rows)
    untouched = made.roles == Role.CLEAN
    assert torch.equal(made.visible.images[untouched], clean.images[untouched])
    assert torch.equal(made.visible.labels[untouched], clean.labels[untouched])
    changed = (made.visible.images != clean.images).flatten(1).any(1)
    assert changed[~untouched].all()


@every_attack
def test_the_images_from_before_are_kept(name: str) -> None:
    made = poisoned(name)
    clean = toy_source().train.take(made.source_rows)
    assert torch.equal(made.originals, clean.images[made.roles != Role.CLEAN])
    assert torch.equal(made.clean_labels, clean.labels)


@every_attack
def test_counts_are_exact(name: str) -> None:
    roles = poisoned(name, rate=0.1).roles
    # 10 % of the 108 samples that are not reserved
    assert int((roles == Role.POISON).sum()) == 11
    assert int((roles == Role.COVER).sum()) == round(11 * toy_attack(name).cover_ratio)


@every_attack
def test_covers_keep_their_labels(name: str) -> None:
    made = poisoned(name, cover_ratio=1.0)
    covers = made.roles == Role.COVER
    assert int(covers.sum()) == int((made.roles == Role.POISON).sum())
    assert torch.equal(made.visible.labels[covers], made.clean_labels[covers])


@every_attack
def test_no_cover_has_the_label_of_the_poison_where_its_own_images_would_teach_the_trigger(name: str) -> None:
    for labels in {"clean", "source-specific"} & set(ATTACKS.load(name).label_modes):
        if name == "cba":
            continue  # its covers are mixes of one class, the target's among them, as published
        made = poisoned(name, labels=labels, cover_ratio=1.0)
        covers = made.roles == Role.COVER
        assert int(covers.sum()) == int((made.roles == Role.POISON).sum())
        assert not (made.visible.labels[covers] == toy_attack(name, labels=labels).target).any()


@every_attack
def test_every_label_rule_that_an_attack_names_works(name: str) -> None:
    for labels in ATTACKS.load(name).label_modes:
        attack, made = toy_attack(name, labels=labels, target=2), poisoned(name, labels=labels, target=2)
        chosen = made.roles == Role.POISON
        before = made.clean_labels[chosen]
        expected = before if labels == "clean" else wanted_labels(before, attack, 4)
        assert torch.equal(made.visible.labels[chosen], expected)
        eligible = {"clean": [2], "source-specific": [1]}.get(labels, [0, 1, 2, 3])
        assert set(before.tolist()) <= set(eligible)
        assert torch.equal(made.triggered.labels, wanted_labels(made.test.labels[made.triggered_rows], attack, 4))
        assert len(made.triggered) == (40 if labels == "all-to-all" else 30)


@every_attack
def test_other_label_rules_are_refused(name: str) -> None:
    modes = ATTACKS.load(name).label_modes
    for labels in {"all-to-one", "all-to-all", "source-specific", "clean"} - set(modes):
        with pytest.raises(OptionError, match=f"{labels} labels make no sense here; give {modes[0]}"):
            toy_attack(name, labels=labels)


@every_attack
def test_a_stored_state_triggers_the_same_test_set_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = poisoned(name)
    state = {key: value.contiguous() for key, value in made.trigger_state.items()}
    save_file(state, tmp_path / "attack.safetensors")
    read = load_file(tmp_path / "attack.safetensors")
    again = toy_attack(name).trigger(made.test, made.triggered_rows, read, "test", 0)
    assert torch.equal(again, made.triggered.images)


@every_attack
def test_equal_seeds_poison_alike_and_another_seed_otherwise(name: str) -> None:
    one, same, other = (poison_source(toy_source(), toy_attack(name), toy_lab(seed), trusted=0) for seed in (0, 0, 1))
    assert one.visible.fingerprint == same.visible.fingerprint
    assert one.triggered.fingerprint == same.triggered.fingerprint
    assert one.visible.fingerprint != other.visible.fingerprint


@every_attack
def test_the_source_is_left_as_it_was(name: str) -> None:
    source = toy_source()
    before = source.train.fingerprint, source.test.fingerprint
    poison_source(source, toy_attack(name), toy_lab(), trusted=0.1)
    again = ImageDataset(source.train.images, source.train.labels, source.train.class_names)
    assert (again.fingerprint, source.test.fingerprint) == before


@every_attack
def test_learning_looks_at_the_training_split_only(name: str) -> None:
    """The state is made before the test images are seen: other test images, same state."""
    source = toy_source()
    other = toy_source()
    other.test.images.copy_(255 - other.test.images)
    one, two = (poison_source(it, toy_attack(name), toy_lab(), trusted=0) for it in (source, other))
    assert one.trigger_state.keys() == two.trigger_state.keys()
    assert all(torch.equal(one.trigger_state[key], two.trigger_state[key]) for key in one.trigger_state)


@every_attack
def test_only_attacks_that_control_training_have_a_victim(name: str) -> None:
    victim = poisoned(name).victim
    assert (victim is not None) == issubclass(ATTACKS.load(name), TrainingAttack)


@every_attack
def test_an_attack_says_what_it_is(name: str) -> None:
    cls = ATTACKS.load(name)
    assert cls.paper.startswith("https://")
    assert cls.paper in (inspect.getdoc(cls) or "")
    assert cls.version >= 1
    assert all(option.description for option in describe_options(cls))


@every_attack
def test_the_threat_model_in_the_list_is_that_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A trigger that is random draws anew for tests: that alone makes it no other one.
    monkeypatch.setattr(
        Occasion, "uniform",
        lambda self, purpose, *shape: addressed(self.rows, prod(shape), self.seed, purpose).view(-1, *shape),
    )  # fmt: skip
    cls = ATTACKS.load(name)
    attack, data, state = fitted(name)
    default = cls()
    rows = torch.arange(8)
    crafted = ImageDataset(data.images.clone(), data.labels, data.class_names)
    crafted.images[rows] = attack.craft(data, rows, state, toy_lab())
    in_training, in_tests = (
        attack.trigger(split, rows, state, use, 0) for split, use in ((crafted, "poison"), (data, "test"))
    )
    traits = [
        "clean label" if default.labels == "clean" else "dirty label",
        "trains the victim" if issubclass(cls, TrainingAttack) else "data only",
        "surrogate" if issubclass(cls, SurrogateAttack) else "",
        "covers" if default.cover_ratio else "",
        "" if torch.equal(in_training, in_tests) else "another trigger in tests",
    ]
    assert ATTACKS.rows[name].threat == ", ".join(filter(None, traits))


def test_toy_settings_are_for_attacks_that_exist() -> None:
    assert TOY_ATTACKS.keys() <= set(ATTACKS.names())


# rates


def test_rate_and_class_rate_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="give either rate or class_rate"):
        BadNets.parse({"rate": 0.1, "class_rate": 0.1})


def test_class_rate_alone_takes_the_place_of_the_default_rate() -> None:
    assert BadNets.parse({"class_rate": 0.5}).class_rate == 0.5


def test_neither_rate_is_refused() -> None:
    with pytest.raises(OptionError, match="give either rate or class_rate"):
        BadNets.parse({"rate": None})


def test_class_rate_has_no_meaning_for_all_to_all() -> None:
    with pytest.raises(OptionError, match="no meaning with all-to-all"):
        BadNets.parse({"class_rate": 0.5, "labels": "all-to-all"})


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_is_a_share(rate: float) -> None:
    with pytest.raises(OptionError, match=f"rate {rate}"):
        BadNets.parse({"rate": rate})


def test_a_target_is_not_negative() -> None:
    with pytest.raises(OptionError, match="target -1"):
        BadNets.parse({"target": -1})
