"""Who is poisoned and how labels change: one place for all attacks."""

from __future__ import annotations

import torch
from torch import Tensor

from bdbench.attacks.base import Attack
from bdbench.data import ImageDataset, PoisonedDataset, Role, SourceData
from bdbench.errors import OptionError
from bdbench.seeds import generator


def poison_source(source: SourceData, attack: Attack, seed: int, trusted: float) -> PoisonedDataset:
    """Poison a training split, trigger the eligible test images, and reserve a trusted clean set.

    Args:
        source: both clean splits.
        attack: with its options.
        seed: of every random choice.
        trusted: share of the training split that is reserved, clean, before anything is poisoned; 0 for none.

    Raises:
        OptionError: the target class does not exist, or the rate asks for none or for more than are eligible.
    """
    clean = source.train
    if attack.target >= clean.num_classes:
        raise OptionError(f"target {attack.target} does not exist: the classes are 0..{clean.num_classes - 1}")
    kept, reserved = _reserve(len(clean), trusted, seed)
    train = clean.take(kept)
    state = attack.fit(train, seed)
    poisoned = choose_poisoned(train.labels, attack, generator(seed, "poison", "choose"))
    covers = _choose_covers(len(train), poisoned, attack, seed)

    images, labels = train.images, train.labels.clone()
    roles = torch.zeros(len(train), dtype=torch.uint8)
    roles[poisoned], roles[covers] = Role.POISON, Role.COVER
    originals = images[roles != Role.CLEAN]
    images[poisoned] = attack.trigger(images[poisoned], poisoned, state, "poison", seed)
    images[covers] = attack.trigger(images[covers], covers, state, "cover", seed)
    labels[poisoned] = wanted_labels(train.labels[poisoned], attack, clean.num_classes)

    tested = eligible_for_test(source.test.labels, attack)
    if not len(tested):
        raise OptionError(
            f"no test image is eligible for target {attack.target}; raise --test-fraction or use more images"
        )
    return PoisonedDataset(
        visible=ImageDataset(images, labels, clean.class_names),
        clean_labels=train.labels,
        roles=roles,
        source_rows=kept,
        originals=originals,
        test=source.test,
        triggered=ImageDataset(
            attack.trigger(source.test.images[tested], tested, state, "test", seed),
            wanted_labels(source.test.labels[tested], attack, clean.num_classes),
            clean.class_names,
        ),
        triggered_rows=tested,
        trusted=clean.take(reserved),
        trigger_state=state,
    )


def wanted_labels(labels: Tensor, attack: Attack, num_classes: int) -> Tensor:
    """Return what the attacker wants triggered images of these true labels (N,) to be called."""
    if attack.labels == "all-to-all":
        return (labels + 1) % num_classes
    return torch.full_like(labels, attack.target)


def eligible_for_test(labels: Tensor, attack: Attack) -> Tensor:
    """Return the rows of test images that count for ASR: all for all-to-all, else those of other classes."""
    if attack.labels == "all-to-all":
        return torch.arange(len(labels))
    return torch.nonzero(labels != attack.target).flatten()


def choose_poisoned(labels: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    """Draw the training rows to poison: an exact count, without replacement, sorted.

    `rate` counts from all N samples, `class_rate` from those of the target class; both are rounded to nearest.
    Eligible are all samples (clean labels: the target class; `exclude_target`: all but it).

    Raises:
        OptionError: the count is 0, or more than are eligible.
    """
    in_target = labels == attack.target
    if attack.labels == "clean":
        eligible = in_target
    elif attack.labels == "all-to-one" and attack.exclude_target:
        eligible = ~in_target
    else:
        eligible = torch.ones_like(in_target)
    rows = torch.nonzero(eligible).flatten()
    if attack.class_rate is not None:
        said, count = f"class_rate {attack.class_rate}", round(attack.class_rate * int(in_target.sum()))
    else:
        said, count = f"rate {attack.rate}", round((attack.rate or 0) * len(labels))
    if count < 1:
        raise OptionError(f"{said} of {len(labels)} samples is less than one sample; raise it")
    if count > len(rows):
        raise OptionError(f"{said} asks for {count} samples, only {len(rows)} are eligible; lower it")
    return rows[torch.randperm(len(rows), generator=rng)[:count]].sort().values


def _choose_covers(total: int, poisoned: Tensor, attack: Attack, seed: int) -> Tensor:
    count = attack.cover_count(len(poisoned))
    free = torch.ones(total, dtype=torch.bool)
    free[poisoned] = False
    rows = torch.nonzero(free).flatten()
    if count > len(rows):
        raise OptionError(
            f"the attack asks for {count} cover samples, only {len(rows)} are not poisoned; lower its rate"
        )
    chosen = torch.randperm(len(rows), generator=generator(seed, "cover", "choose"))[:count]
    return rows[chosen].sort().values


def _reserve(total: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split row numbers into those that stay and the trusted ones, both sorted."""
    count = round(share * total)
    order = torch.randperm(total, generator=generator(seed, "trusted", "choose"))
    return order[count:].sort().values, order[:count].sort().values
