"""Who is poisoned and how labels change: one place for all attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, TrainingAttack, wanted_labels
from bdbench.attacks.none import NoAttack
from bdbench.data import ImageDataset, PoisonedDataset, Role, SourceData
from bdbench.errors import MethodError, OptionError
from bdbench.seeds import generator
from bdbench.wording import counted

TRUSTED = 0.05
"""Share of the training split that is reserved unless another is asked for."""


class PerClass(NamedTuple):
    """So many trusted images of every class."""

    images: int


def trusted_images(share: float | None = None, per_class: int | None = None) -> float | PerClass:
    """Return which training images are reserved: a share of them (default 0.05), or so many of every class.

    Raises:
        OptionError: both are given, or one is out of its range.
    """
    if per_class is not None:
        if share is not None:
            raise OptionError("trusted is a share, trusted_per_class a count; give one of the two")
        if per_class < 1:
            raise OptionError(f"trusted_per_class {per_class} must be at least 1; for no trusted images give trusted 0")
        return PerClass(per_class)
    share = TRUSTED if share is None else share
    if not 0 <= share < 1:
        raise OptionError(f"trusted {share} must be at least 0 and less than 1")
    return share


def trusted_config(trusted: float | PerClass) -> dict[str, float | int]:
    """Return how the options of a dataset artifact say which images are trusted."""
    return {"trusted_per_class": trusted.images} if isinstance(trusted, PerClass) else {"trusted": trusted}


def poison_source(
    source: SourceData, attack: Attack | NoAttack, lab: Lab, trusted: float | PerClass
) -> PoisonedDataset:
    """Poison a training split, trigger the eligible test images, and reserve a trusted clean set.

    Args:
        source: both clean splits.
        attack: with its options.
        lab: the seed of every random choice, and what trains networks for attacks that need them.
        trusted: share of the training split that is reserved, clean, before anything is poisoned, 0 for none; or so
            many images of every class.

    Raises:
        OptionError: a class does not exist, `trusted` takes all images, or the rate asks for none or for more than are
            eligible.
        MethodError: the trigger changes nothing, or is not finite.
    """
    clean, seed = source.train, lab.seed
    kept, reserved, poisoned, covers, tested = choose_rows(source, attack, seed, trusted)
    if isinstance(attack, NoAttack):
        return _left_alone(source, kept, reserved)
    train = clean.take(kept)

    if isinstance(attack, TrainingAttack):
        state, victim = attack.train(train, lab)
    else:
        state, victim = attack.fit(train, lab), None
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise MethodError("`fit` must give a dictionary of tensors")
    images, labels = train.images, train.labels.clone()
    roles = torch.zeros(len(train), dtype=torch.uint8)
    roles[poisoned], roles[covers] = Role.POISON, Role.COVER
    originals, before = images[roles != Role.CLEAN], images[poisoned]
    if len(poisoned):
        images[poisoned] = attack.craft(train, poisoned, state, lab)
    shown = attack.trigger(train, poisoned, state, "poison", seed)
    images[covers] = attack.trigger(train, covers, state, "cover", seed)
    images[poisoned] = shown
    labels[poisoned] = wanted_labels(train.labels[poisoned], attack, clean.num_classes)
    triggered = attack.trigger(source.test, tested, state, "test", seed)
    _check_changed(before, shown, "poisoned training")
    _check_changed(source.test.images[tested], triggered, "triggered test")

    return PoisonedDataset(
        visible=ImageDataset(images, labels, clean.class_names),
        clean_labels=train.labels,
        roles=roles,
        source_rows=kept,
        originals=originals,
        test=source.test,
        triggered=ImageDataset(
            triggered,
            wanted_labels(source.test.labels[tested], attack, clean.num_classes),
            clean.class_names,
        ),
        triggered_rows=tested,
        trusted=clean.take(reserved),
        trigger_state=state,
        victim=victim,
    )


def _check_changed(before: Tensor, after: Tensor, what: str) -> None:
    """Refuse a trigger that nobody could see.

    Raises:
        MethodError: no pixel of any image changes.
    """
    if len(before) and torch.equal(before, after):
        raise MethodError(f"the trigger changes no pixel of any of the {len(before):,} {what} images")


class Rows(NamedTuple):
    """Who plays which role; each is a tensor of ascending rows, int64.

    Attributes:
        kept, reserved: of the source's training split: to train on, and trusted.
        poisoned, covers: of the images that are kept.
        tested: test images to trigger.
    """

    kept: Tensor
    reserved: Tensor
    poisoned: Tensor
    covers: Tensor
    tested: Tensor


def choose_rows(source: SourceData, attack: Attack | NoAttack, seed: int, trusted: float | PerClass) -> Rows:
    """Draw who is trusted, poisoned, a cover or triggered.

    Args:
        source: both clean splits.
        attack: with its options.
        seed: of every random choice.
        trusted: see `poison_source`.

    Raises:
        OptionError: see `poison_source`.
    """
    clean = source.train
    if isinstance(attack, NoAttack):
        none = torch.empty(0, dtype=torch.int64)
        return Rows(*_reserve(clean.labels, clean.class_names, trusted, seed), none, none, none)
    _check_classes(attack, clean.num_classes)
    kept, reserved = _reserve(clean.labels, clean.class_names, trusted, seed)
    labels = clean.labels[kept]
    poisoned = choose_poisoned(labels, attack, generator(seed, "poison", "choose"))
    covers = _choose_covers(labels, poisoned, attack, seed)
    return Rows(kept, reserved, poisoned, covers, eligible_for_test(source.test.labels, attack))


def unpoisoned(source: SourceData) -> PoisonedDataset:
    """Return a source as it is: nothing is poisoned, triggered or reserved."""
    return _left_alone(source, torch.arange(len(source.train)), torch.empty(0, dtype=torch.int64))


def _left_alone(source: SourceData, kept: Tensor, reserved: Tensor) -> PoisonedDataset:
    """Return the rows of a source that are kept, as they are, and those that are reserved; nothing is triggered."""
    train = source.train.take(kept) if len(reserved) else source.train
    none = torch.empty(0, dtype=torch.int64)
    return PoisonedDataset(
        visible=train,
        clean_labels=train.labels,
        roles=torch.zeros(len(train), dtype=torch.uint8),
        source_rows=kept,
        originals=train.images[none],
        test=source.test,
        triggered=source.test.take(none),
        triggered_rows=none,
        trusted=source.train.take(reserved),
        trigger_state={},
    )


def idle_options(options: Mapping[str, Any]) -> set[str]:
    """Return which of an attack's options have no effect with these values, whatever they are.

    Args:
        options: of an attack, all of them; nothing is idle in other settings.
    """
    labels = options.get("labels")
    idle = {name for name, value in options.items() if value is None}
    if labels is not None:
        idle |= {"source"} if labels != "source-specific" else set()
        idle |= {"target"} if labels == "all-to-all" else set()
        idle |= {"exclude_target"} if labels != "all-to-one" else set()
        idle |= {"cover_ratio"} if not options.get("cover_ratio") else set()
    return idle & options.keys()


def eligible_for_test(labels: Tensor, attack: Attack) -> Tensor:
    """Return the rows of test images to trigger: all for all-to-all, else those of other classes than the target.

    ASR counts all of them, but for source-specific labels the source class alone (see `bdbench.protocol.judging`).

    Raises:
        OptionError: none counts.
    """
    triggered = torch.ones_like(labels, dtype=torch.bool) if attack.labels == "all-to-all" else labels != attack.target
    counts = labels == attack.source if attack.labels == "source-specific" else triggered
    if not counts.any():
        of_source = attack.labels == "source-specific"
        which = f"source {attack.source}" if of_source else f"target {attack.target}"
        raise OptionError(
            f"no test image is eligible for {attack.labels} labels with {which}; choose another "
            f"--{'source' if of_source else 'target'}, raise --test-fraction or use more images"
        )
    return torch.nonzero(triggered).flatten()


def _check_classes(attack: Attack, num_classes: int) -> None:
    for name in ("target", "source") if attack.labels == "source-specific" else ("target",):
        if getattr(attack, name) >= num_classes:
            raise OptionError(f"{name} {getattr(attack, name)} does not exist: the classes are 0..{num_classes - 1}")


def choose_poisoned(labels: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    """Draw the training rows to poison: an exact count, without replacement, sorted; none at a rate of 0.

    `rate` counts from all N samples, `class_rate` from those of the target class (source-specific: of the source
    class); both are rounded to nearest. Eligible are all samples (clean labels: the target class; source-specific: the
    source class; `exclude_target`: all but the target class).

    Raises:
        OptionError: the count is 0, or more than are eligible.
    """
    if attack.rate == 0:
        return torch.empty(0, dtype=torch.int64)
    in_target = labels == attack.target
    if attack.labels == "clean":
        eligible = in_target
    elif attack.labels == "source-specific":
        eligible = labels == attack.source
    elif attack.labels == "all-to-one" and attack.exclude_target:
        eligible = ~in_target
    else:
        eligible = torch.ones_like(in_target)
    rows = torch.nonzero(eligible).flatten()
    if not len(rows):
        raise OptionError(f"no training image can be poisoned: {_why_none(attack)}")
    of_class = int((labels == attack.source if attack.labels == "source-specific" else in_target).sum())
    if attack.class_rate is not None:
        said, rate, total = f"class_rate {attack.class_rate}", attack.class_rate, of_class
    else:
        said, rate, total = f"rate {attack.rate}", attack.rate or 0, len(labels)
    count = round(rate * total)
    if count < 1:
        raise OptionError(
            f"{said} of {total} images is {rate * total:.2g} images; use at least {1 / max(1, total):.2g}"
        )
    if count > len(rows):
        flags = {"clean": " or choose another --target", "source-specific": " or choose another --source"}
        way_out = f"lower it{flags.get(attack.labels, '')}"
        raise OptionError(f"{said} asks for {counted(count, 'sample')}, only {len(rows)} are eligible; {way_out}")
    return rows[torch.randperm(len(rows), generator=rng)[:count]].sort().values


def _why_none(attack: Attack) -> str:
    """Say which class has no images that an attack could poison, and what to change."""
    if attack.labels == "clean":
        return f"clean labels take images of the target class {attack.target}, which has none; choose another --target"
    if attack.labels == "source-specific":
        return f"the source class {attack.source} has none; choose another --source"
    return f"all images are of the target class {attack.target}; choose another --target"


def _choose_covers(labels: Tensor, poisoned: Tensor, attack: Attack, seed: int) -> Tensor:
    count = round(attack.cover_ratio * len(poisoned))
    free = torch.ones_like(labels, dtype=torch.bool)
    free[poisoned] = False
    rows = torch.nonzero(free & attack.may_cover(labels)).flatten()
    if count and not len(rows):
        raise OptionError(
            "no training image can be a cover sample: for source-specific labels they come from other classes than "
            "source and target; pass --cover-ratio 0 to go without, or take a dataset of more classes"
        )
    if count > len(rows):
        raise OptionError(
            f"the attack asks for {count} cover samples, only {len(rows)} can be; lower --cover-ratio or its rate"
        )
    chosen = torch.randperm(len(rows), generator=generator(seed, "cover", "choose"))[:count]
    return rows[chosen].sort().values


def _reserve(labels: Tensor, names: Sequence[str], trusted: float | PerClass, seed: int) -> tuple[Tensor, Tensor]:
    """Split the rows of training labels (N,) into those that stay and the trusted ones, both sorted.

    Raises:
        OptionError: none stays, or a class has too few images.
    """
    total = len(labels)
    order = torch.randperm(total, generator=generator(seed, "trusted", "choose"))
    if isinstance(trusted, PerClass):
        reserved = torch.cat(
            [_of_class(order, labels, index, name, trusted.images) for index, name in enumerate(names)]
        )
        stays = torch.ones(total, dtype=torch.bool)
        stays[reserved] = False
        return torch.nonzero(stays).flatten(), reserved.sort().values
    count = round(trusted * total)
    if count == total:
        raise OptionError(f"trusted {trusted} leaves none of the {total} training images; lower it")
    return order[count:].sort().values, order[:count].sort().values


def _of_class(order: Tensor, labels: Tensor, index: int, name: str, count: int) -> Tensor:
    """Return the first `count` rows of a class in an order; a class that has no images gives none.

    Raises:
        OptionError: none of its images would stay.
    """
    rows = order[labels[order] == index]
    if len(rows) and count >= len(rows):
        raise OptionError(
            f"trusted_per_class {count} leaves none of the {len(rows)} training images of class {name}; lower it"
        )
    return rows[:count]
