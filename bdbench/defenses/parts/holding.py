"""Choosing the strength of a repair on trusted images that were held out, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.engine import Engine

MIN_HELD = 8
"""Fewer held-out images decide nothing."""
FEW_HELD = 100
"""Below this many the usual tolerance would be less than their own error."""
TOLERANCE, TOLERANCE_OF_FEW = 0.05, 0.1


class Halves(NamedTuple):
    """Trusted images, split: those that a method works with, and those that its setting is chosen with."""

    tune: ImageDataset
    held: ImageDataset


class Choice(NamedTuple):
    """Which setting was taken, None if none keeps the accuracy, and what to tell of it."""

    setting: float | None
    findings: dict[str, Any]


def halves(trusted: ImageDataset, share: float, seed: int) -> Halves:
    """Split trusted images once, in every class alike; the last image of a class is never held out.

    Args:
        trusted: N images.
        share: of each class that is held out, in (0, 1).
        seed: draws which.

    Raises:
        OptionError: too few would be held out, or too few would be left.
    """
    is_held = held_rows(trusted, share, seed)
    held = int(is_held.sum())
    if held < MIN_HELD or len(trusted) - held < 2:
        raise OptionError(
            f"of {len(trusted)} trusted images, --holdout {share:g} holds out {held} (a share of each class), and to "
            f"choose a setting takes at least {MIN_HELD}, and 2 others; make the dataset with more of them (about "
            f"{max(MIN_HELD + 2, trusted.num_classes * 2, round(MIN_HELD / share))}): poison --trusted or "
            "--trusted-per-class; or choose a method that has nothing to choose, such as ft or ft-sam"
        )
    return Halves(trusted.take(~is_held), trusted.take(is_held))


def held_rows(trusted: ImageDataset, share: float, seed: int) -> Tensor:
    """Return which trusted images (N,) are held out, drawn once, as `halves` says."""
    is_held = torch.zeros(len(trusted), dtype=torch.bool)
    order = torch.randperm(len(trusted), generator=generator(seed, "held-out"))
    for label in range(trusted.num_classes):
        own = order[trusted.labels[order] == label]
        is_held[own[: min(round(share * len(own)), len(own) - 1)] if len(own) else own] = True
    return is_held


def accuracy(engine: Engine, model: Classifier, data: ImageDataset) -> float:
    """Return the share of images that a model classifies right; their labels are to be trusted."""
    return _share(engine.logits(model, data.images).argmax(1), data.labels)


def head_accuracy(model: Classifier, embeddings: Tensor, labels: Tensor) -> float:
    """Return the same from embeddings (N, D) that are known, on the model's device or not."""
    with torch.no_grad():
        answers = model.classify(embeddings.to(model.head.weight.device)).argmax(1).cpu()
    return _share(answers, labels)


def strongest(
    settings: Sequence[float], measure: Callable[[float], float], before: float, held: int, tolerance: float | None
) -> Choice:
    """Return the strongest setting whose accuracy on the held-out images keeps within the tolerance.

    How well a trigger still works cannot be known without the trigger. The strongest repair that the accuracy bears is
    the only choice that needs no such knowledge.

    Args:
        settings: the candidates, from the weakest repair to the strongest.
        measure: from a setting to the accuracy of the model repaired with it, on the held-out images.
        before: the suspect's accuracy on them.
        held: how many they are.
        tolerance: what a repair may cost; None for the usual: 0.05, and 0.1 below 100 images.

    Returns:
        The choice; its findings have every candidate with its accuracy.
    """
    floor = floor_of(before, held, tolerance)
    sweep = [{"setting": setting, "accuracy": round(measure(setting), 4)} for setting in settings]
    kept = [tried["setting"] for tried in sweep if tried["accuracy"] >= floor]
    chosen = kept[-1] if kept else None
    findings = {
        "chosen": chosen, "held_out": held, "accuracy_before": round(before, 4), "accuracy_floor": floor,
        "sweep": sweep,
    }  # fmt: skip
    return Choice(chosen, findings)


def floor_of(before: float, held: int, tolerance: float | None) -> float:
    """Return the least accuracy on the held-out images that a repair must keep, to four places; see `strongest`."""
    allowed = tolerance if tolerance is not None else TOLERANCE if held >= FEW_HELD else TOLERANCE_OF_FEW
    return round(before - allowed, 4)


def unmet(findings: Mapping[str, Any]) -> str:
    """Say that no setting keeps the accuracy, from the findings of a choice."""
    best = max(tried["accuracy"] for tried in findings["sweep"])
    return (
        f"no setting keeps the accuracy on {findings['held_out']} held-out images: the best has {best:.3f}, the floor "
        f"is {findings['accuracy_floor']:.3f}; model unchanged; a larger --tolerance allows more"
    )


def _share(answers: Tensor, labels: Tensor) -> float:
    return float((answers == labels).double().mean())
